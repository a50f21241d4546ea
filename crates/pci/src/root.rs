use crate::{
    BarRange, ConfigAccess, ConfigSpace, Decoded, Identity, PciFunction, REGION_COUNT, RootPort, Space,
};
use outboard_bus::{AccessError, MmioBus, MmioDevice, Width, warn_limited};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// Where BARs may stand, in guest-physical addresses: the windows that the FDT's `ranges` of the host bridge name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub mmio32: Range<u64>,
    /// Anywhere.
    pub mmio64: Range<u64>,
    /// Where I/O ports from 0 on are seen.
    pub io: Range<u64>,
}

impl Windows {
    /// Guest-physical address of `range`, if all of it is in a window.
    fn place(&self, range: &BarRange) -> Option<u64> {
        let address = match range.space {
            Space::Memory => range.address,
            Space::Io => self.io.start.checked_add(range.address)?,
        };
        let end = address.checked_add(range.len)?;
        let windows: &[&Range<u64>] = match range.space {
            Space::Memory => &[&self.mmio32, &self.mmio64],
            Space::Io => &[&self.io],
        };
        windows.iter().any(|w| w.start <= address && end <= w.end).then_some(address)
    }
}

/// Where a BAR stands on the MMIO bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Guest-physical address.
    address: u64,
    /// Bytes.
    len: u64,
}

/// The places of a function's BARs, by index as in [`Decoded`].
type Places = [Option<Place>; REGION_COUNT];

/// A function that cannot be put where it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Device numbers go from 0 to 31, function numbers from 0 to 7.
    #[error("there is no PCI address {device:#x}.{function}")]
    NoSuchAddress {
        /// Device number asked for.
        device: u8,
        /// Function number asked for.
        function: u8,
    },
    /// Another function is there.
    #[error("PCI address {device:#x}.{function} is taken by {other}")]
    Taken {
        /// Device number asked for.
        device: u8,
        /// Function number asked for.
        function: u8,
        /// Who is there.
        other: String,
    },
    /// There is no root port with this device number.
    #[error("PCI device {device:#x} is not a root port")]
    NotAPort {
        /// Device number asked for.
        device: u8,
    },
}

/// Which bus a function is on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bus {
    Root,
    /// Behind the root port with this devfn on bus 0.
    Behind(u8),
}

struct Node {
    bus: Bus,
    devfn: u8,
    function: Arc<dyn PciFunction>,
    /// The same object if it is a root port.
    port: Option<Arc<RootPort>>,
    mapped: Places,
    /// What could not be mapped for want of room, so that it is logged once.
    refused: Places,
}

/// The root complex: bus 0 with a host bridge at 00.0, and one bus behind each root port.
///
/// Lock order: `topology` is held while functions are called for config accesses, `decoded`, `bar_mapped` and `reset`,
/// and while BARs are put on the MMIO bus; nothing that is called under it may take it. BAR accesses do not take it.
pub struct RootComplex {
    // Weak: the bus owns the ECAM, which owns this.
    bus: Weak<MmioBus>,
    windows: Windows,
    topology: Mutex<Vec<Node>>,
}

/// QEMU's identity for a generic PCIe host bridge (its docs/specs/pci-ids).
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

impl RootComplex {
    /// A root complex with nothing but its host bridge, whose functions' BARs appear on `bus` within `windows`.
    pub fn new(bus: &Arc<MmioBus>, windows: Windows) -> Arc<Self> {
        let bridge = Arc::new(HostBridge(Mutex::new(ConfigSpace::endpoint(HOST_BRIDGE))));
        let topology = Mutex::new(vec![Node::new(Bus::Root, 0, bridge)]);
        Arc::new(Self { bus: Arc::downgrade(bus), windows, topology })
    }

    /// Puts `function` on bus 0.
    ///
    /// # Errors
    /// [`AddError`] for an address that does not exist or is taken.
    pub fn add(&self, device: u8, function: u8, endpoint: Arc<dyn PciFunction>) -> Result<(), AddError> {
        self.add_node(Bus::Root, device, function, endpoint, None)
    }

    /// Puts a root port with an empty slot on bus 0.
    ///
    /// # Errors
    /// As [`RootComplex::add`].
    pub fn add_port(&self, device: u8, port: Arc<RootPort>) -> Result<(), AddError> {
        self.add_node(Bus::Root, device, 0, Arc::clone(&port) as Arc<dyn PciFunction>, Some(port))
    }

    /// Puts `endpoint` into the slot of the root port with device number `port`.
    ///
    /// # Errors
    /// As [`RootComplex::add`]; [`AddError::NotAPort`].
    pub fn add_behind(&self, port: u8, function: u8, endpoint: Arc<dyn PciFunction>) -> Result<(), AddError> {
        let devfn = devfn(port, 0)?;
        let root_port = find(&self.lock(), Bus::Root, devfn).and_then(|node| node.port.clone());
        let root_port = root_port.ok_or(AddError::NotAPort { device: port })?;
        self.add_node(Bus::Behind(devfn), 0, function, endpoint, None)?;
        root_port.set_present(true);
        Ok(())
    }

    /// Takes everything out of the slot of the root port with device number `port`, its BARs first, and shows the slot as empty. Returns
    /// the functions that were there.
    ///
    /// # Errors
    /// [`AddError::NoSuchAddress`], [`AddError::NotAPort`].
    pub fn remove_behind(&self, port: u8) -> Result<Vec<Arc<dyn PciFunction>>, AddError> {
        let devfn = devfn(port, 0)?;
        let mut topology = self.lock();
        let root_port = find(&topology, Bus::Root, devfn).and_then(|node| node.port.clone());
        let root_port = root_port.ok_or(AddError::NotAPort { device: port })?;
        let bus = self.bus.upgrade();
        let mut removed = Vec::new();
        topology.retain_mut(|node| {
            let stays = node.bus != Bus::Behind(devfn);
            if !stays {
                node.unmap_all(bus.as_deref());
                removed.push(Arc::clone(&node.function));
            }
            stays
        });
        self.follow_bars(&mut topology);
        drop(topology);
        root_port.set_present(false);
        Ok(removed)
    }

    fn add_node(
        &self,
        bus: Bus,
        device: u8,
        function: u8,
        endpoint: Arc<dyn PciFunction>,
        port: Option<Arc<RootPort>>,
    ) -> Result<(), AddError> {
        let devfn = devfn(device, function)?;
        let mut topology = self.lock();
        if let Some(node) = find(&topology, bus, devfn) {
            return Err(AddError::Taken { device, function, other: node.function.name().to_owned() });
        }
        topology.push(Node { port, ..Node::new(bus, devfn, endpoint) });
        Ok(())
    }

    /// Resets every function, as power-on does; no BAR is mapped then.
    pub fn reset(&self) {
        let mut topology = self.lock();
        for node in topology.iter() {
            node.function.reset();
        }
        self.follow_bars(&mut topology);
    }

    /// A guest's config read of `bus`, `devfn`: the enabled bytes in their place, all-ones where nothing is.
    pub fn config_read(&self, bus: u8, devfn: u8, access: ConfigAccess) -> u32 {
        let topology = self.lock();
        let Some(node) = route(&topology, bus, devfn) else { return u32::MAX };
        let value = node.function.config_read(access);
        // A slot with several functions says so in function 0's header type (PCIe 7.5.1.1.9).
        let siblings =
            || topology.iter().any(|n| n.bus == node.bus && n.devfn != devfn && n.devfn >> 3 == devfn >> 3);
        if access.offset() == 0x0c && devfn.is_multiple_of(8) && siblings() { value | 1 << 23 } else { value }
    }

    /// A guest's config write; dropped where nothing is.
    pub fn config_write(&self, bus: u8, devfn: u8, access: ConfigAccess, value: u32) {
        let mut topology = self.lock();
        let Some(node) = route(&topology, bus, devfn) else { return };
        let held_before = node.port.as_ref().is_some_and(|port| port.holds_slot_in_reset());
        node.function.config_write(access, value);
        if !held_before && node.port.as_ref().is_some_and(|port| port.holds_slot_in_reset()) {
            let behind = Bus::Behind(node.devfn);
            topology.iter().filter(|n| n.bus == behind).for_each(|n| n.function.reset());
        }
        self.follow_bars(&mut topology);
    }

    /// Makes the MMIO bus show the BARs as the functions decode them now: first everything that is no longer where it
    /// was goes, then what is not there yet comes. Where two claim a place, the one that was there first keeps it.
    fn follow_bars(&self, topology: &mut [Node]) {
        let Some(bus) = self.bus.upgrade() else { return };
        let targets: Vec<Places> = topology.iter().map(|node| self.target(topology, node)).collect();
        for (node, target) in topology.iter_mut().zip(&targets) {
            for (bar, target) in target.iter().enumerate() {
                if let Some(old) = node.mapped[bar].filter(|old| *target != Some(*old)) {
                    node.function.bar_mapped(bar, None);
                    bus.remove(old.address);
                    node.mapped[bar] = None;
                }
            }
        }
        for (node, target) in topology.iter_mut().zip(&targets) {
            for (bar, target) in target.iter().enumerate() {
                match target {
                    Some(place) if node.mapped[bar].is_none() => node.map(&bus, bar, *place),
                    Some(_) => {}
                    None => node.refused[bar] = None,
                }
            }
        }
    }

    /// Where BARs of `node` should be on the MMIO bus.
    fn target(&self, topology: &[Node], node: &Node) -> Places {
        let port = match node.bus {
            Bus::Root => None,
            Bus::Behind(devfn) => find(topology, Bus::Root, devfn).and_then(|n| n.port.as_deref()),
        };
        node.function.decoded().map(|bar| {
            let range = bar.filter(|range| port.is_none_or(|port| port.link_up() && port.forwards(range)))?;
            Some(Place { address: self.windows.place(&range)?, len: range.len })
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Node>> {
        self.topology.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Node {
    fn new(bus: Bus, devfn: u8, function: Arc<dyn PciFunction>) -> Self {
        Self { bus, devfn, function, port: None, mapped: Default::default(), refused: Default::default() }
    }

    fn unmap_all(&mut self, bus: Option<&MmioBus>) {
        for (bar, mapped) in self.mapped.iter_mut().enumerate() {
            if let Some(old) = mapped.take() {
                self.function.bar_mapped(bar, None);
                bus.iter().for_each(|bus| {
                    bus.remove(old.address);
                });
            }
        }
    }

    fn map(&mut self, bus: &MmioBus, bar: usize, place: Place) {
        let name = format!("{} bar{bar}", self.function.name());
        let device = Arc::new(BarDevice { name, function: Arc::clone(&self.function), bar });
        match bus.insert(place.address, place.len, device) {
            Ok(()) => {
                self.mapped[bar] = Some(place);
                self.refused[bar] = None;
                self.function.bar_mapped(bar, Some(place.address));
            }
            Err(error) if self.refused[bar] != Some(place) => {
                self.refused[bar] = Some(place);
                warn_limited!(
                    "{} bar{bar} stays unmapped until the guest moves one of the two: {error}",
                    self.function.name()
                );
            }
            Err(_) => {}
        }
    }
}

fn devfn(device: u8, function: u8) -> Result<u8, AddError> {
    if device < 32 && function < 8 {
        Ok(device << 3 | function)
    } else {
        Err(AddError::NoSuchAddress { device, function })
    }
}

fn find(topology: &[Node], bus: Bus, devfn: u8) -> Option<&Node> {
    topology.iter().find(|node| node.bus == bus && node.devfn == devfn)
}

/// The function that a config access reaches. Bus numbers behind ports are the guest's choice: where two ports claim
/// one, the first has it; nothing is deeper than one port.
fn route(topology: &[Node], bus: u8, devfn: u8) -> Option<&Node> {
    if bus == 0 {
        return find(topology, Bus::Root, devfn);
    }
    let port = topology.iter().find(|n| n.port.as_ref().is_some_and(|port| port.secondary_bus() == bus))?;
    // Without a link there is no answer.
    find(topology, Bus::Behind(port.devfn), devfn)
        .filter(|_| port.port.as_ref().is_some_and(|port| port.link_up()))
}

/// The enhanced configuration access mechanism (PCIe 7.2.2): 1 MiB of config space for each bus.
pub struct Ecam(Arc<RootComplex>);

impl Ecam {
    /// The ECAM of `root`; put it on the MMIO bus with [`Ecam::len`] bytes.
    pub fn new(root: Arc<RootComplex>) -> Self {
        Self(root)
    }

    /// Bytes of an ECAM for `buses` buses (1 to 256).
    pub const fn len(buses: u16) -> u64 {
        (buses as u64) << 20
    }
}

/// Bus, devfn and the access within the function, for an offset into the ECAM.
fn decode(offset: u64, width: Width) -> Result<(u8, u8, ConfigAccess), AccessError> {
    let bus = u8::try_from(offset >> 20).map_err(|_| AccessError::NoRegister)?;
    let access = ConfigAccess::new((offset & 0xfff) as u16, width).ok_or(AccessError::BadWidth)?;
    Ok((bus, (offset >> 12) as u8, access))
}

impl MmioDevice for Ecam {
    fn name(&self) -> &str {
        "pci ecam"
    }

    fn read(&self, offset: u64, width: Width) -> Result<u64, AccessError> {
        let (bus, devfn, access) = decode(offset, width)?;
        Ok(u64::from(self.0.config_read(bus, devfn, access) >> access.shift()))
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        let (bus, devfn, access) = decode(offset, width)?;
        self.0.config_write(bus, devfn, access, (value as u32) << access.shift());
        Ok(())
    }
}

/// A mapped BAR as the MMIO bus sees it.
struct BarDevice {
    name: String,
    function: Arc<dyn PciFunction>,
    bar: usize,
}

impl MmioDevice for BarDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn read(&self, offset: u64, width: Width) -> Result<u64, AccessError> {
        self.function.bar_read(self.bar, offset, width)
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        self.function.bar_write(self.bar, offset, width, value)
    }
}

struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl PciFunction for HostBridge {
    fn name(&self) -> &str {
        "host bridge"
    }

    fn config_read(&self, access: ConfigAccess) -> u32 {
        self.lock().read(access)
    }

    fn config_write(&self, access: ConfigAccess, value: u32) {
        self.lock().write(access, value);
    }

    fn decoded(&self) -> Decoded {
        Decoded::default()
    }

    fn bar_read(&self, _: usize, _: u64, _: Width) -> Result<u64, AccessError> {
        Err(AccessError::NoRegister)
    }

    fn bar_write(&self, _: usize, _: u64, _: Width, _: u64) -> Result<(), AccessError> {
        Err(AccessError::NoRegister)
    }

    fn reset(&self) {
        self.lock().reset();
    }
}

#[cfg(test)]
mod tests;
