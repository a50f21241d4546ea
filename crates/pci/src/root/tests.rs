use super::*;
use crate::{BarKind, Msix, MsixLayout, REGION_COUNT};
use outboard_bus::{MsiMessage, MsiSink};
use proptest::prelude::*;

struct NoSink;
impl MsiSink for NoSink {
    fn send(&self, _: MsiMessage) {}
}

/// A function with a 32-bit BAR 0 (64 KiB) and a 64-bit BAR 2 (1 MiB); reads of a BAR give a tag and the BAR's index.
struct Endpoint {
    tag: u64,
    config: Mutex<ConfigSpace>,
    moves: Mutex<Vec<(usize, Option<u64>)>>,
}

impl Endpoint {
    fn new(tag: u64) -> Arc<Self> {
        let mut config = ConfigSpace::endpoint(Identity { device: tag as u16, ..HOST_BRIDGE });
        config.add_bar(0, 0x1_0000, BarKind::Memory32);
        config.add_bar(2, 0x10_0000, BarKind::Memory64);
        config
            .add_msix(Arc::new(Msix::new(4, Arc::new(NoSink))), MsixLayout { bar: 0, table: 0, pba: 0x1000 });
        Arc::new(Self { tag, config: Mutex::new(config), moves: Mutex::default() })
    }

    fn moves(&self) -> Vec<(usize, Option<u64>)> {
        std::mem::take(&mut self.moves.lock().unwrap())
    }
}

impl PciFunction for Endpoint {
    fn name(&self) -> &str {
        "endpoint"
    }
    fn config_read(&self, access: ConfigAccess) -> u32 {
        self.config.lock().unwrap().read(access)
    }
    fn config_write(&self, access: ConfigAccess, value: u32) {
        self.config.lock().unwrap().write(access, value);
    }
    fn decoded(&self) -> Decoded {
        self.config.lock().unwrap().decoded()
    }
    fn bar_mapped(&self, bar: usize, address: Option<u64>) {
        self.moves.lock().unwrap().push((bar, address));
    }
    fn bar_read(&self, bar: usize, _: u64, _: Width) -> Result<u64, AccessError> {
        Ok(self.tag << 8 | bar as u64)
    }
    fn bar_write(&self, _: usize, _: u64, _: Width, _: u64) -> Result<(), AccessError> {
        Ok(())
    }
    fn reset(&self) {
        self.config.lock().unwrap().reset();
    }
}

const ECAM: u64 = 0x40_0000_0000;
const WINDOWS: Windows = Windows {
    mmio32: 0x1000_0000..0x3000_0000,
    mmio64: 0x80_0000_0000..0x90_0000_0000,
    io: 0x0f00_0000..0x0f10_0000,
};
const NONE: u64 = 0xffff_ffff;

struct Machine {
    bus: Arc<MmioBus>,
    root: Arc<RootComplex>,
}

impl Machine {
    fn new() -> Self {
        let bus = Arc::new(MmioBus::new());
        let root = RootComplex::new(&bus, WINDOWS);
        bus.insert(ECAM, Ecam::len(4), Arc::new(Ecam::new(Arc::clone(&root)))).unwrap();
        Self { bus, root }
    }

    fn at(&self, bus: u64, device: u64, function: u64) -> Config<'_> {
        Config { bus: &self.bus, base: ECAM + (bus << 20) + (device << 15) + (function << 12) }
    }
}

struct Config<'a> {
    bus: &'a MmioBus,
    base: u64,
}

impl Config<'_> {
    fn read(&self, offset: u64) -> u64 {
        self.bus.read(self.base + offset, Width::B4)
    }
    fn write(&self, offset: u64, value: u64) {
        self.bus.write(self.base + offset, Width::B4, value);
    }
    fn place(&self, bar0: u64, bar2: u64) {
        self.write(0x10, bar0);
        self.write(0x18, bar2 & 0xffff_ffff);
        self.write(0x1c, bar2 >> 32);
    }
    fn decode(&self, on: bool) {
        self.write(0x04, if on { 6 } else { 4 });
    }
}

#[test]
fn absent_functions_read_all_ones_and_count_as_nothing() {
    let m = Machine::new();
    assert_eq!(m.at(0, 0, 0).read(0), 0x0008_1b36);
    for (bus, device, function) in [(0, 0, 1), (0, 31, 7), (1, 0, 0), (3, 31, 7)] {
        assert_eq!(m.at(bus, device, function).read(0), NONE);
        m.at(bus, device, function).write(0x10, 0);
    }
    assert_eq!(m.bus.stats(), Default::default());
    assert_eq!(m.bus.read(ECAM + 1, Width::B4), NONE, "leaves the dword");
    assert_eq!(m.bus.stats().refused, 1);
}

#[test]
fn addresses_are_checked_when_functions_are_added() {
    let m = Machine::new();
    m.root.add(1, 0, Endpoint::new(1)).unwrap();
    assert!(matches!(m.root.add(1, 0, Endpoint::new(2)), Err(AddError::Taken { .. })));
    assert!(matches!(m.root.add(0, 0, Endpoint::new(2)), Err(AddError::Taken { .. })), "the host bridge");
    assert!(matches!(m.root.add(32, 0, Endpoint::new(2)), Err(AddError::NoSuchAddress { .. })));
    assert!(matches!(m.root.add(2, 8, Endpoint::new(2)), Err(AddError::NoSuchAddress { .. })));
    assert_eq!(m.root.add_behind(1, 0, Endpoint::new(2)), Err(AddError::NotAPort { device: 1 }));
}

#[test]
fn a_slot_with_two_functions_is_multifunction() {
    let m = Machine::new();
    m.root.add(1, 0, Endpoint::new(1)).unwrap();
    assert_eq!(m.at(0, 1, 0).read(0x0c) >> 16, 0);
    m.root.add(1, 2, Endpoint::new(2)).unwrap();
    assert_eq!(m.at(0, 1, 0).read(0x0c) >> 16, 0x80);
    assert_eq!(m.at(0, 1, 2).read(0x0c) >> 16, 0);
}

#[test]
fn bars_appear_move_and_go_with_decode() {
    let m = Machine::new();
    let endpoint = Endpoint::new(0x11);
    m.root.add(1, 0, endpoint.clone()).unwrap();
    let config = m.at(0, 1, 0);
    config.place(0x1000_0000, 0x80_0010_0000);
    assert_eq!(endpoint.moves(), []);
    config.decode(true);
    assert_eq!(endpoint.moves(), [(0, Some(0x1000_0000)), (2, Some(0x80_0010_0000))]);
    assert_eq!(m.bus.read(0x1000_fffc, Width::B4), 0x1100);
    assert_eq!(m.bus.read(0x80_0010_0000, Width::B8), 0x1102);
    // Moved while enabled: what a guest does half way is seen half way.
    config.write(0x10, 0x2000_0000);
    assert_eq!(endpoint.moves(), [(0, None), (0, Some(0x2000_0000))]);
    assert_eq!(m.bus.read(0x2000_0000, Width::B4), 0x1100);
    assert_eq!(m.bus.read(0x1000_0000, Width::B4), NONE);
    config.write(0x1c, 0x0001);
    assert_eq!(endpoint.moves(), [(2, None)], "outside the windows");
    config.write(0x1c, 0x80);
    assert_eq!(endpoint.moves(), [(2, Some(0x80_0010_0000))]);
    config.decode(false);
    assert_eq!(endpoint.moves(), [(0, None), (2, None)]);
    config.decode(true);
    m.root.reset();
    assert_eq!(m.bus.read(0x2000_0000, Width::B4), NONE);
    assert_eq!(config.read(0x04) & 0xffff, 0);
}

#[test]
fn only_the_windows_are_reachable() {
    let m = Machine::new();
    let endpoint = Endpoint::new(1);
    m.root.add(1, 0, endpoint.clone()).unwrap();
    let config = m.at(0, 1, 0);
    config.decode(true);
    for bar0 in [0u64, 0x0fff_0000, 0x3000_0000, 0x4000_0000, 0xffff_0000] {
        for bar2 in [0u64, ECAM, 0x90_0000_0000, 0x7f_fff0_0000, u64::MAX] {
            config.place(bar0, bar2);
        }
    }
    // Only half-written 64-bit addresses can have hit a window on the way.
    config.place(0, 0);
    let moves = endpoint.moves();
    assert!(
        moves
            .iter()
            .all(|(_, to)| to.is_none_or(|a| WINDOWS.mmio32.contains(&a) || WINDOWS.mmio64.contains(&a)))
    );
    assert_eq!(m.at(0, 0, 0).read(0), 0x0008_1b36, "the ECAM is still there");
}

#[test]
fn of_overlapping_bars_the_first_stays_and_the_second_follows_when_it_goes() {
    let m = Machine::new();
    let (a, b) = (Endpoint::new(0xa), Endpoint::new(0xb));
    m.root.add(1, 0, a.clone()).unwrap();
    m.root.add(2, 0, b.clone()).unwrap();
    let (config_a, config_b) = (m.at(0, 1, 0), m.at(0, 2, 0));
    config_a.place(0x1000_0000, 0);
    config_b.place(0x1000_0000, 0);
    config_b.decode(true);
    config_a.decode(true);
    assert_eq!(m.bus.read(0x1000_0000, Width::B4), 0xb00);
    config_b.write(0x10, 0x1800_0000);
    assert_eq!(m.bus.read(0x1000_0000, Width::B4), 0xa00);
    assert_eq!(m.bus.read(0x1800_0000, Width::B4), 0xb00);
    assert_eq!(a.moves(), [(0, Some(0x1000_0000))]);
}

#[test]
fn ports_route_by_bus_number_and_window() {
    let m = Machine::new();
    let endpoint = Endpoint::new(0x77);
    let port = Arc::new(RootPort::new(1));
    m.root.add_port(3, Arc::clone(&port)).unwrap();
    m.root.add_port(4, Arc::new(RootPort::new(2))).unwrap();
    let config = m.at(0, 3, 0);
    assert_eq!(config.read(0x0c) >> 16 & 0xff, 1);
    let slot_status = |config: &Config<'_>| config.read(0x40 + 0x18) >> 16 & 0x40;
    assert_eq!(slot_status(&config), 0);
    m.root.add_behind(3, 0, endpoint.clone()).unwrap();
    assert_eq!((slot_status(&config), slot_status(&m.at(0, 4, 0))), (0x40, 0));

    assert_eq!(m.at(1, 0, 0).read(0), NONE, "no bus number yet");
    config.write(0x18, 0x0002_0100);
    assert_eq!(m.at(1, 0, 0).read(0), 0x0077_1b36);
    assert_eq!(m.at(1, 1, 0).read(0), NONE, "one device behind a port");
    assert_eq!(m.at(2, 0, 0).read(0), NONE);
    // A second port with the same numbers does not take over.
    m.at(0, 4, 0).write(0x18, 0x0002_0100);
    assert_eq!(m.at(1, 0, 0).read(0), 0x0077_1b36);

    let behind = m.at(1, 0, 0);
    behind.place(0x1010_0000, 0x80_0010_0000);
    behind.decode(true);
    assert_eq!(endpoint.moves(), [], "the port forwards nothing");
    config.write(0x20, 0x1010_1010);
    config.write(0x24, 0x0010_0010);
    config.write(0x28, 0x80);
    config.write(0x2c, 0x80);
    config.decode(true);
    assert_eq!(endpoint.moves(), [(0, Some(0x1010_0000)), (2, Some(0x80_0010_0000))]);
    config.write(0x20, 0x1020_1020);
    assert_eq!(endpoint.moves(), [(0, None)]);
    // Secondary bus reset: the device behind loses its BARs, the port keeps its windows.
    config.write(0x3c, 1 << 22);
    assert_eq!(endpoint.moves(), [(2, None)]);
    assert_eq!(behind.read(0x04) & 0xffff, 0);
    assert_eq!(config.read(0x20), 0x1020_1020);
    m.root.reset();
    assert_eq!(slot_status(&config), 0x40, "reset does not pull the device");
}

/// A function with nothing but 32 I/O ports, wherever the test has put them; reads say from which.
struct Ports(Mutex<Option<u64>>, Mutex<Vec<Option<u64>>>);

impl PciFunction for Ports {
    fn name(&self) -> &str {
        "ports"
    }
    fn config_read(&self, _: ConfigAccess) -> u32 {
        0
    }
    fn config_write(&self, _: ConfigAccess, value: u32) {
        *self.0.lock().unwrap() = (value != 0).then_some(value.into());
    }
    fn decoded(&self) -> Decoded {
        let mut decoded = Decoded::default();
        decoded[1] = self.0.lock().unwrap().map(|address| BarRange::io(address, 32));
        decoded
    }
    fn bar_mapped(&self, bar: usize, address: Option<u64>) {
        assert_eq!(bar, 1);
        self.1.lock().unwrap().push(address);
    }
    fn bar_read(&self, _: usize, offset: u64, width: Width) -> Result<u64, AccessError> {
        Ok(width.truncate(0x1234_5600 + offset))
    }
    fn bar_write(&self, _: usize, _: u64, _: Width, _: u64) -> Result<(), AccessError> {
        Ok(())
    }
    fn reset(&self) {
        *self.0.lock().unwrap() = None;
    }
}

#[test]
fn io_ports_are_seen_in_their_window_as_far_as_bridges_forward_them() {
    let m = Machine::new();
    let ports = Arc::new(Ports(Mutex::default(), Mutex::default()));
    m.root.add_port(3, Arc::new(RootPort::new(1))).unwrap();
    m.root.add_behind(3, 0, ports.clone()).unwrap();
    let (port, behind) = (m.at(0, 3, 0), m.at(1, 0, 0));
    port.write(0x18, 0x0001_0100);
    assert_eq!(port.read(0x1c), 0x0101, "32-bit I/O");
    // Base 0x1000, limit 0x2fff; the function's ports are the first write to it.
    port.write(0x1c, 0x2010);
    behind.write(0x10, 0x2fe0);
    let at = WINDOWS.io.start + 0x2fe0;
    assert_eq!(m.bus.read(at, Width::B4), NONE, "the bridge does not forward");
    port.write(0x04, 1);
    assert_eq!(m.bus.read(at + 4, Width::B4), 0x1234_5604);
    assert_eq!((m.bus.read(at + 2, Width::B2), m.bus.read(at + 1, Width::B1)), (0x5602, 0x01));
    assert_eq!(m.bus.read(0x2fe0, Width::B4), NONE, "not in memory space");
    // Out of the bridge's window, then in an upper half, then past the end of the machine's window, in which ports are no address of memory.
    for (window, upper, address) in [
        (0x2010, 0, 0x3000),
        (0x2010, 0x0001_0001, 0x2fe0),
        (0xf0f0, 0xffff_ffff, 0xffff_fff0_u64),
        (0xf000, 0xffff_0000, 0x0010_0000),
        (0xf000, 0xffff_0000, 0x1000_0000),
    ] {
        port.write(0x1c, window);
        port.write(0x30, upper);
        behind.write(0x10, address);
        assert_eq!(m.bus.read(WINDOWS.io.start + address, Width::B4), NONE, "{address:#x}");
        assert_eq!(m.bus.read(address, Width::B4), NONE, "{address:#x}");
    }
    port.write(0x30, 0x000f_0000);
    behind.write(0x10, 0xf_ffe0);
    assert_eq!(m.bus.read(WINDOWS.io.end - 4, Width::B4), 0x1234_561c, "the last port");
    port.write(0x04, 6);
    assert_eq!(m.bus.read(WINDOWS.io.end - 4, Width::B4), NONE, "I/O forwarding is off");
    let told = ports.1.lock().unwrap().clone();
    assert_eq!(told, [Some(at), None, Some(WINDOWS.io.end - 32), None]);
}

/// What pciutils makes of a root port with something in its slot.
#[test]
fn lspci_reads_a_root_port() {
    let m = Machine::new();
    m.root.add_port(3, Arc::new(RootPort::new(5))).unwrap();
    m.root.add_behind(3, 0, Endpoint::new(1)).unwrap();
    m.at(0, 3, 0).write(0x18, 0x0001_0100);
    m.at(0, 3, 0).write(0x20, 0x1010_1000);
    let mut dump = String::from("00:03.0 port\n");
    for line in (0..0x100).step_by(16) {
        let bytes: Vec<String> = (line..line + 16)
            .map(|at| format!("{:02x}", m.bus.read(ECAM + (3 << 15) + at, Width::B1)))
            .collect();
        dump += &format!("{line:02x}: {}\n", bytes.join(" "));
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), dump).unwrap();
    let lspci = std::process::Command::new("lspci").args(["-vvn", "-F"]).arg(file.path()).output();
    let Ok(output) = lspci else { return eprintln!("skipped: lspci (pciutils) is not installed") };
    let text = String::from_utf8_lossy(&output.stdout);
    for expected in [
        "0604: 1b36:000c",
        "Bus: primary=00, secondary=01, subordinate=01",
        "Memory behind bridge: 10000000-101fffff",
        "Express (v2) Root Port (Slot+)",
        "Port #5, Speed 8GT/s, Width x4",
        "LnkSta:\tSpeed 8GT/s",
        "DLActive+",
        "Slot #5",
        "PresDet+",
    ] {
        assert!(text.contains(expected), "no '{expected}' in\n{text}");
    }
}

/// Every byte of every function read, then all ones and zeros written at every offset and width, BARs and all.
#[test]
fn abuse_of_every_function() {
    let m = Machine::new();
    m.root.add(1, 0, Endpoint::new(1)).unwrap();
    m.root.add(1, 1, Endpoint::new(2)).unwrap();
    m.root.add_port(2, Arc::new(RootPort::new(1))).unwrap();
    m.root.add_behind(2, 0, Endpoint::new(3)).unwrap();
    for value in [u64::MAX, 0, 0x0100_0000_0100] {
        for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
            for function in [0u64, 1 << 15, 1 << 15 | 1 << 12, 2 << 15, 1 << 20] {
                for offset in 0..4096 {
                    m.bus.read(ECAM + function + offset, width);
                    m.bus.write(ECAM + function + offset, width, value);
                }
            }
        }
    }
    assert_eq!(m.at(0, 1, 0).read(0), 0x0001_1b36);
    assert_eq!(m.at(0, 2, 0).read(0), 0x000c_1b36);
}

proptest! {
    /// Random config writes to everything: BARs on the bus always lie in the windows, never overlap, and are what the
    /// function was told.
    #[test]
    fn bars_stay_inside_the_windows(
        writes in prop::collection::vec((0usize..4, 0u64..0x60, 0usize..3, any::<u32>()), 0..300),
    ) {
        let m = Machine::new();
        let endpoints = [Endpoint::new(1), Endpoint::new(2), Endpoint::new(3)];
        m.root.add(1, 0, endpoints[0].clone()).unwrap();
        m.root.add(1, 1, endpoints[1].clone()).unwrap();
        m.root.add_port(2, Arc::new(RootPort::new(1))).unwrap();
        m.root.add_behind(2, 0, endpoints[2].clone()).unwrap();
        m.at(0, 2, 0).write(0x18, 0x0001_0100);
        for (function, offset, width, value) in writes {
            let base = ECAM + [1 << 15, 1 << 15 | 1 << 12, 2 << 15, 1 << 20][function];
            // Most writes land in BARs, and addresses are few, so that they meet.
            let (offset, value) = if value % 4 == 0 { (offset, u64::from(value)) } else {
                (0x10 + offset % 0x10 / 4 * 4, [0x1000_0000, 0x1001_0000, 0x80, 0x4000_0000][value as usize / 4 % 4])
            };
            m.bus.write(base + offset, [Width::B1, Width::B2, Width::B4][width], value);
            m.bus.write(base + 4, Width::B1, 6);
            let topology = m.root.lock();
            let mut mapped: Vec<Place> = topology.iter().flat_map(|n| n.mapped.iter().flatten().copied()).collect();
            mapped.sort_by_key(|r| r.address);
            let window = |p: &Place| WINDOWS.place(&BarRange::memory(p.address, p.len)) == Some(p.address);
            prop_assert!(mapped.iter().all(window));
            prop_assert!(mapped.windows(2).all(|w| w[0].address + w[0].len <= w[1].address));
        }
        let topology = m.root.lock();
        for endpoint in &endpoints {
            let node = topology.iter().find(|n| n.function.name() == "endpoint"
                && std::ptr::addr_eq(Arc::as_ptr(&n.function), Arc::as_ptr(endpoint))).unwrap();
            let mut told = [None; REGION_COUNT];
            for (bar, to) in endpoint.moves() { told[bar] = to; }
            prop_assert_eq!(told, node.mapped.map(|m| m.map(|r| r.address)));
        }
    }
}
