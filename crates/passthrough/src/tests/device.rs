//! A scripted device of the host, and a machine around it.

use crate::{Function, GuestMapper, IntxWiring, VectorBinder, Wiring, WiringError};
use outboard_bus::{Event, IrqLine, MmioBus, MsiMessage, MsiSink, Width, poll_readable};
use outboard_host_pci::{
    Error, FunctionIdentity, HostBar, HostBarKind, HostFunction, InterruptCounts, InterruptKind,
    InterruptSink, IoPorts, MappedBar, PciAddress, Result,
};
use outboard_pci::{Ecam, RootComplex, RootPort, Windows};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub(super) const ADDRESS: PciAddress = PciAddress { segment: 0, bus: 1, device: 0, function: 0 };

/// What happened, in order, to the device and to the guest's mappings.
#[derive(Clone, Default)]
pub(super) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(super) fn push(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }
    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Builds a config space byte by byte.
#[derive(Clone)]
pub(super) struct Space(pub(super) Vec<u8>);

impl Space {
    pub(super) fn put(&mut self, at: u16, value: u32) -> &mut Self {
        self.0[usize::from(at)..usize::from(at) + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// An endpoint with one of nearly everything:
    /// PM 40, VPD 48, MSI 50 (32 vectors, 64-bit, maskable), Express 70, MSI-X b0 (70 vectors), AGP bc, vendor c0;
    /// ARI 100, AER 120, SR-IOV 160, ReBAR 1a0 (BAR 2), VSEC 200, ATS 220, DSN 240.
    pub(super) fn endpoint() -> Self {
        let mut space = Self(vec![0; 4096]);
        space.put(0x00, 0x2b85_10de).put(0x04, 0x0010_0000).put(0x08, 0x0300_00a1).put(0x0c, 0x0080_0010);
        space.put(0x2c, 0x1234_10de).put(0x34, 0x40).put(0x3c, 0x0000_01ff);
        space.put(0x40, 0xfe03_4801).put(0x44, 0x0000_0008);
        space.put(0x48, 0x8000_5003).put(0x4c, 0x1122_3344);
        space.put(0x50, 0x018a_7005);
        space.put(0x70, 0x0012_b010).put(0x74, 0x1000_8fe1).put(0x78, 0x0009_2830);
        space.put(0x7c, 0x0040_0443).put(0x80, 0x1043_0000).put(0x94, 0x0000_003f);
        space.put(0xb0, 69 << 16 | 0xbc11).put(0xb4, 0x4000).put(0xb8, 0x5000);
        space.put(0xbc, 0x0000_c00e).put(0xc0, 0x0010_0009).put(0xc4, 0xaabb_ccdd);
        space.put(0x100, 0x1201_000e).put(0x120, 0x1601_0001).put(0x124, 0x0010_0000).put(0x12c, 0x0046_2030);
        space.put(0x160, 0x1a01_0010).put(0x168, 0xdead_0000);
        space.put(0x1a0, 0x2001_0015).put(0x1a4, 0x00ff_fff0).put(0x1a8, 0x0000_0022);
        space.put(0x200, 0x2201_000b).put(0x204, 0x0100_1234).put(0x208, 0x5555_5555);
        space.put(0x220, 0x2401_000f).put(0x224, 0x0000_0020);
        space.put(0x240, 0x0001_0003).put(0x244, 0x0102_0304);
        space
    }
}

/// Kind and count of the vectors that are enabled, and where they go.
pub(super) type Enabled = (InterruptKind, u16, Arc<dyn InterruptSink>);

/// A device that does what the test says, and records what is done to it.
pub(super) struct FakeHost {
    pub(super) log: Log,
    space: Mutex<Vec<u8>>,
    pristine: Mutex<Vec<u8>>,
    bars: [Option<HostBar>; 6],
    pub(super) counts: InterruptCounts,
    pub(super) address: PciAddress,
    /// Vendor ID, device ID and class of its identity, whatever its config space says.
    pub(super) ids: (u16, u16, u32),
    /// What the first dword of BAR 0 reads, if not what other dwords do.
    pub(super) boot: Option<u32>,
    rom: Option<Vec<u8>>,
    pub(super) sink: Mutex<Option<Enabled>>,
    pub(super) gone: AtomicBool,
    pub(super) reset_fails: AtomicBool,
    pub(super) bar_accesses: AtomicU64,
    /// BAR, offset, width and value of each write to a BAR.
    pub(super) written: Mutex<Vec<(usize, u64, Width, u64)>>,
    removal: Event,
}

impl FakeHost {
    pub(super) fn new(space: Space, bars: &[(usize, HostBarKind, u64)], log: &Log) -> Self {
        let mut all = [None; 6];
        for (index, kind, len) in bars {
            all[*index] = Some(HostBar { kind: *kind, len: *len });
        }
        Self {
            log: log.clone(),
            space: Mutex::new(space.0.clone()),
            pristine: Mutex::new(space.0),
            bars: all,
            counts: InterruptCounts { intx: 1, msi: 32, msix: 70 },
            address: ADDRESS,
            ids: (0x1234, 0x2b85, 0x03_0000),
            boot: None,
            rom: Some((0..3000u32).map(|i| i as u8).collect()),
            sink: Mutex::default(),
            gone: AtomicBool::new(false),
            reset_fails: AtomicBool::new(false),
            bar_accesses: AtomicU64::new(0),
            written: Mutex::default(),
            removal: Event::new().unwrap(),
        }
    }

    /// The one that most tests use: BAR0 64 KiB with the MSI-X structures at 0x4000 and 0x5000, BAR1 4 KiB, BAR2 1 MiB 64-bit, BAR4 I/O.
    pub(super) fn endpoint(log: &Log) -> Self {
        let bars = [
            (0, HostBarKind::Memory32 { prefetchable: false }, 0x1_0000),
            (1, HostBarKind::Memory32 { prefetchable: false }, 0x1000),
            (2, HostBarKind::Memory64 { prefetchable: true }, 0x10_0000),
            (4, HostBarKind::Io, 128),
        ];
        Self::new(Space::endpoint(), &bars, log)
    }

    pub(super) fn peek(&self, at: u16) -> u32 {
        let space = self.space.lock().unwrap();
        u32::from_le_bytes(space[usize::from(at)..usize::from(at) + 4].try_into().unwrap())
    }

    pub(super) fn poke(&self, at: u16, value: u32) {
        self.space.lock().unwrap()[usize::from(at)..usize::from(at) + 4]
            .copy_from_slice(&value.to_le_bytes());
    }

    /// What a reset will bring back.
    pub(super) fn change_pristine(&self, at: u16, value: u8) {
        self.pristine.lock().unwrap()[usize::from(at)] = value;
    }

    pub(super) fn pull(&self) {
        self.gone.store(true, Ordering::SeqCst);
        self.removal.signal();
    }

    fn alive(&self) -> Result<()> {
        if self.gone.load(Ordering::SeqCst) { Err(Error::Gone(self.address)) } else { Ok(()) }
    }

    pub(super) fn raise(&self, vector: u16) {
        if let Some((_, count, sink)) = &*self.sink.lock().unwrap()
            && vector < *count
        {
            match sink.event(vector) {
                Some(fd) => {
                    use std::io::Write;
                    let mut file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
                    file.write_all(&1u64.to_ne_bytes()).unwrap();
                }
                None => sink.raise(vector),
            }
        }
    }
}

struct Memory {
    bytes: Box<[u64]>,
    log: Log,
    what: String,
}

impl MappedBar for Memory {
    fn host(&self) -> NonNull<u8> {
        NonNull::from(&self.bytes[0]).cast()
    }
    fn len(&self) -> u64 {
        8 * self.bytes.len() as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.log.push(format!("drop {}", self.what));
    }
}

impl HostFunction for FakeHost {
    fn identity(&self) -> FunctionIdentity {
        let (vendor, device, class) = self.ids;
        FunctionIdentity { address: self.address, vendor, device, class, revision: 0xa1 }
    }
    fn config_read(&self, offset: u16, width: Width) -> Result<u32> {
        self.alive()?;
        assert!(u64::from(offset).is_multiple_of(width.bytes()), "unaligned");
        let value = self.peek(offset & !3) >> (8 * (offset % 4));
        Ok(value & width.all_ones() as u32)
    }
    fn config_write(&self, offset: u16, width: Width, value: u32) -> Result<()> {
        self.alive()?;
        assert!(u64::from(offset).is_multiple_of(width.bytes()), "unaligned");
        self.log.push(format!("write {offset:#x} {} {value:#x}", width.bytes()));
        let bytes = value.to_le_bytes();
        let at = usize::from(offset);
        self.space.lock().unwrap()[at..at + width.bytes() as usize]
            .copy_from_slice(&bytes[..width.bytes() as usize]);
        Ok(())
    }
    fn config_len(&self) -> u16 {
        self.space.lock().unwrap().len() as u16
    }
    fn bars(&self) -> [Option<HostBar>; 6] {
        self.bars
    }
    fn io_ports(&self) -> IoPorts {
        let io = self.bars.iter().flatten().any(|bar| bar.kind == HostBarKind::Io);
        if io { IoPorts::Reachable } else { IoPorts::None }
    }
    fn rom(&self) -> Result<Option<Vec<u8>>> {
        Ok(self.rom.clone())
    }
    fn map_bar(&self, bar: usize, offset: u64, len: u64) -> Result<Arc<dyn MappedBar>> {
        self.alive()?;
        assert!(offset.is_multiple_of(0x4000) && len.is_multiple_of(0x4000) && len > 0);
        assert!(offset + len <= self.bars[bar].unwrap().len);
        let what = format!("bar{bar} {offset:#x}+{len:#x}");
        // The length is all that anybody looks at.
        Ok(Arc::new(Memory { bytes: vec![0; (len / 8) as usize].into(), log: self.log.clone(), what }))
    }
    fn bar_read(&self, bar: usize, offset: u64, width: Width) -> Result<u64> {
        self.alive()?;
        assert!(offset + width.bytes() <= self.bars[bar].unwrap().len);
        self.bar_accesses.fetch_add(1, Ordering::Relaxed);
        if let Some(boot) = self.boot.filter(|_| (bar, offset) == (0, 0)) {
            return Ok(boot.into());
        }
        Ok(width.truncate(0xbabe_0000_0000 + ((bar as u64) << 24) + offset))
    }
    fn bar_write(&self, bar: usize, offset: u64, width: Width, value: u64) -> Result<()> {
        self.alive()?;
        assert!(offset + width.bytes() <= self.bars[bar].unwrap().len);
        self.bar_accesses.fetch_add(1, Ordering::Relaxed);
        self.written.lock().unwrap().push((bar, offset, width, value));
        Ok(())
    }
    fn interrupts(&self) -> InterruptCounts {
        self.counts
    }
    fn enable_interrupts(&self, kind: InterruptKind, count: u16, sink: Arc<dyn InterruptSink>) -> Result<()> {
        self.alive()?;
        assert!(count > 0);
        self.log.push(format!("enable {count} {kind:?}"));
        *self.sink.lock().unwrap() = Some((kind, count, sink));
        Ok(())
    }
    fn disable_interrupts(&self) -> Result<()> {
        self.log.push("disable".into());
        *self.sink.lock().unwrap() = None;
        self.alive()
    }
    fn unmask_intx(&self) -> Result<()> {
        self.log.push("unmask".into());
        self.alive()
    }
    fn set_bus_master(&self, on: bool) -> Result<()> {
        self.log.push(format!("bus master {on}"));
        self.alive()
    }
    fn reset(&self) -> Result<()> {
        self.alive()?;
        self.log.push("reset".into());
        if self.reset_fails.load(Ordering::SeqCst) {
            return Err(Error::ResetFailed { address: self.address, why: "it stays silent".into() });
        }
        *self.space.lock().unwrap() = self.pristine.lock().unwrap().clone();
        Ok(())
    }
    fn removal(&self) -> BorrowedFd<'_> {
        self.removal.as_fd()
    }
}

/// The guest's address space; refuses what no machine may do.
#[derive(Default)]
pub(super) struct FakeMapper {
    pub(super) log: Log,
    pub(super) mapped: Mutex<BTreeMap<u64, Arc<dyn MappedBar>>>,
    /// Refuses everything.
    pub(super) full: AtomicBool,
}

impl FakeMapper {
    pub(super) fn ranges(&self) -> Vec<(u64, u64)> {
        self.mapped.lock().unwrap().iter().map(|(ipa, bar)| (*ipa, bar.len())).collect()
    }
}

impl GuestMapper for FakeMapper {
    fn map(&self, ipa: u64, bar: Arc<dyn MappedBar>) -> std::result::Result<(), WiringError> {
        if self.full.load(Ordering::SeqCst) {
            return Err("no slots are left".into());
        }
        assert!(ipa.is_multiple_of(0x4000));
        let end = ipa + bar.len();
        let inside = |range: &std::ops::Range<u64>| range.start <= ipa && end <= range.end;
        assert!(inside(&WINDOWS.mmio32) || inside(&WINDOWS.mmio64), "{ipa:#x} is outside the windows");
        assert!(self.ranges().iter().all(|(at, len)| end <= *at || at + len <= ipa), "overlap at {ipa:#x}");
        self.log.push(format!("map {ipa:#x}+{:#x}", bar.len()));
        self.mapped.lock().unwrap().insert(ipa, bar);
        Ok(())
    }
    fn unmap(&self, ipa: u64, len: u64) -> std::result::Result<(), WiringError> {
        let bar = self.mapped.lock().unwrap().remove(&ipa).expect("only what is mapped is unmapped");
        assert_eq!(bar.len(), len);
        self.log.push(format!("unmap {ipa:#x}+{len:#x}"));
        Ok(())
    }
}

#[derive(Default)]
pub(super) struct Sent(pub(super) Mutex<Vec<MsiMessage>>);

impl Sent {
    pub(super) fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MsiSink for Sent {
    fn send(&self, message: MsiMessage) {
        self.0.lock().unwrap().push(message);
    }
}

/// Binds events as KVM's irqfd does: what an event holds when it is bound is delivered and stays in it.
#[derive(Default)]
pub(super) struct FakeBinder {
    /// The device signals while it is being bound.
    pub(super) signal_at_bind: AtomicBool,
    bound: Mutex<Vec<Bound>>,
    delivered: Mutex<Vec<MsiMessage>>,
}

struct Bound {
    message: MsiMessage,
    event: i32,
    fd: std::fs::File,
}

pub(super) const DOORBELL: u64 = 0x0802_0040;

impl FakeBinder {
    pub(super) fn bound(&self) -> Vec<MsiMessage> {
        self.bound.lock().unwrap().iter().map(|b| b.message).collect()
    }

    /// Consumes signals of what is bound, which the kernel does at once, and returns what the guest got.
    pub(super) fn deliver(&self) -> Vec<MsiMessage> {
        use std::io::Read;
        let mut delivered = self.delivered.lock().unwrap();
        for bound in self.bound.lock().unwrap().iter_mut() {
            if bound.fd.read(&mut [0; 8]).is_ok() {
                delivered.push(bound.message);
            }
        }
        std::mem::take(&mut delivered)
    }
}

impl VectorBinder for FakeBinder {
    fn bind(&self, message: MsiMessage, event: &Event) -> std::result::Result<(), WiringError> {
        if message.address != DOORBELL {
            return Err(format!("{message:x?} is no interrupt of the guest").into());
        }
        let mut bound = self.bound.lock().unwrap();
        let number = event.as_fd().as_raw_fd();
        assert!(bound.iter().all(|b| b.event != number), "bound twice");
        if self.signal_at_bind.load(Ordering::SeqCst) {
            event.signal();
        }
        if poll_readable(&[event.as_fd()], Some(std::time::Duration::ZERO)).unwrap()[0] {
            self.delivered.lock().unwrap().push(message);
        }
        let fd = event.as_fd().try_clone_to_owned().unwrap().into();
        bound.push(Bound { message, event: number, fd });
        Ok(())
    }
    fn unbind(&self, message: MsiMessage, event: &Event) {
        let already = self.deliver();
        self.delivered.lock().unwrap().extend(already);
        let mut bound = self.bound.lock().unwrap();
        let number = event.as_fd().as_raw_fd();
        let at = bound.iter().position(|b| b.event == number && b.message == message);
        bound.remove(at.expect("only what is bound is unbound"));
    }
}

#[derive(Default)]
pub(super) struct Line(pub(super) AtomicBool);

impl IrqLine for Line {
    fn set(&self, asserted: bool) {
        self.0.store(asserted, Ordering::SeqCst);
    }
}

pub(super) const ECAM: u64 = 0x40_0000_0000;
pub(super) const WINDOWS: Windows = Windows {
    mmio32: 0x2000_0000..0x4000_0000,
    mmio64: 0x80_0000_0000..0x90_0000_0000,
    io: 0x0f00_0000..0x0f10_0000,
};

/// A machine with one function behind a root port.
pub(super) struct Rig {
    pub(super) log: Log,
    pub(super) host: Arc<FakeHost>,
    pub(super) mapper: Arc<FakeMapper>,
    pub(super) sent: Arc<Sent>,
    pub(super) line: Arc<Line>,
    pub(super) bus: Arc<MmioBus>,
    pub(super) root: Arc<RootComplex>,
    pub(super) function: Arc<Function>,
}

impl Rig {
    pub(super) fn new() -> Self {
        let log = Log::default();
        Self::with(FakeHost::endpoint(&log), None)
    }

    pub(super) fn with(host: FakeHost, vectors: Option<Arc<dyn VectorBinder>>) -> Self {
        let (log, host) = (host.log.clone(), Arc::new(host));
        let mapper = Arc::new(FakeMapper { log: log.clone(), ..Default::default() });
        let (sent, line) = (Arc::new(Sent::default()), Arc::new(Line::default()));
        let intx = Some(IntxWiring { line: line.clone(), kernel: None });
        let wiring = Wiring { mapper: mapper.clone(), msi: sent.clone(), vectors, intx };
        let function = Arc::new(Function::new(host.clone(), wiring).unwrap());
        let bus = Arc::new(MmioBus::new());
        let root = RootComplex::new(&bus, WINDOWS);
        bus.insert(ECAM, Ecam::len(4), Arc::new(Ecam::new(root.clone()))).unwrap();
        root.add_port(1, Arc::new(RootPort::new(1))).unwrap();
        root.add_behind(1, 0, function.clone()).unwrap();
        let rig = Self { log, host, mapper, sent, line, bus, root, function };
        rig.set_up_port();
        rig.log.take();
        rig
    }

    /// What a function needs of this rig.
    pub(super) fn wiring(&self) -> Wiring {
        self.function.wiring.clone()
    }

    /// Bus 1 behind the port, both memory windows as wide as the machine's, and I/O ports 0x1000 to 0xffff.
    pub(super) fn set_up_port(&self) {
        let port = ECAM + (1 << 15);
        for (offset, value) in [
            (0x18, 0x0001_0100),
            (0x1c, 0xf010),
            (0x20, 0x3ff0_2000),
            (0x24, 0xfff1_0001),
            (0x28, 0x80),
            (0x2c, 0x8f),
            (4, 7),
        ] {
            self.bus.write(port + offset, Width::B4, value);
        }
    }

    pub(super) fn read(&self, offset: u64, width: Width) -> u64 {
        self.bus.read(ECAM + (1 << 20) + offset, width)
    }
    pub(super) fn write(&self, offset: u64, width: Width, value: u64) {
        self.bus.write(ECAM + (1 << 20) + offset, width, value);
    }
    pub(super) fn dword(&self, offset: u64) -> u32 {
        self.read(offset, Width::B4) as u32
    }
    pub(super) fn set(&self, offset: u64, value: u32) {
        self.write(offset, Width::B4, value.into());
    }

    /// BAR0 at 0x2000_0000, BAR1 at 0x2001_0000, BAR2 at 0x80_0000_0000, decoding and bus master on.
    pub(super) fn place(&self) {
        self.set(0x10, 0x2000_0000);
        self.set(0x14, 0x2001_0000);
        self.set(0x18, 0);
        self.set(0x1c, 0x80);
        self.write(4, Width::B2, 6);
    }
}
