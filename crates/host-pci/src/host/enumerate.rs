//! What PCI functions the host has.

use super::{Host, Refusal, VFIO_DRIVER, entries, link_name, text};
use crate::{IoPorts, PciAddress, QUARANTINED, Selection};
use std::path::Path;

/// Base class of host bridges, root ports and the like (PCI Code and ID Assignment, 1.7).
const BRIDGE: u32 = 0x06;

/// A PCI function of the host as sysfs describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub address: PciAddress,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Vendor ID of the card's maker.
    pub subsystem_vendor: u16,
    /// The maker's ID of the card.
    pub subsystem_device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// Its base address registers that the host uses.
    pub bars: Vec<BarInfo>,
    /// What a guest can have of its I/O ports.
    pub io_ports: IoPorts,
    /// What `driver_override` says.
    pub driver_override: Option<String>,
    /// It is a bridge, by its class or because its config header is not that of an endpoint.
    pub bridge: bool,
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// 0 to 5.
    pub index: usize,
    /// What it gives access to.
    pub space: BarSpace,
    /// Bytes.
    pub len: u64,
}

/// What a base address register gives access to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarSpace {
    /// I/O ports.
    Io,
    /// Memory.
    Memory {
        /// With a 64-bit address.
        wide: bool,
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl Function {
    /// Whether vfio-pci has it.
    pub fn bound(&self) -> bool {
        self.driver.as_deref() == Some(VFIO_DRIVER)
    }

    /// Whether it failed a reset and was not released since.
    pub fn quarantined(&self) -> bool {
        self.driver_override.as_deref() == Some(QUARANTINED)
    }
}

impl Host {
    /// All functions, by address.
    ///
    /// # Errors
    /// [`Refusal::Sysfs`] when the list cannot be read.
    pub fn functions(&self) -> Result<Vec<Function>, Refusal> {
        let folder = self.path("sys/bus/pci/devices");
        // A host without PCI has no such folder; one whose folder cannot be read is another matter.
        match std::fs::read_dir(&folder) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(Refusal::Sysfs { path: folder, source });
            }
            _ => {}
        }
        let addresses = entries(&folder).into_iter().filter_map(|name| name.parse().ok());
        let mut functions: Vec<Function> = addresses.map(|address| self.function(address)).collect();
        functions.sort_by_key(|f| f.address);
        Ok(functions)
    }

    /// The functions that `selection` means.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] when there is none, [`Refusal::Sysfs`].
    pub fn select(&self, selection: Selection) -> Result<Vec<Function>, Refusal> {
        let mut functions = self.functions()?;
        functions.retain(|f| selection.contains(f.address));
        if functions.is_empty() { Err(Refusal::Unknown(selection)) } else { Ok(functions) }
    }

    /// What stands against giving `function` to a guest once it is bound to vfio-pci, most fundamental first. `with` are those
    /// that would be given along with it.
    pub fn obstacles(&self, function: &Function, with: &[Function]) -> Vec<Refusal> {
        if function.bridge {
            return vec![Refusal::Bridge(function.address)];
        }
        let mut found = vec![];
        if function.group.is_none() && !self.group_is_yet_to_come(function) {
            found.push(Refusal::NoIommu(function.address));
        }
        if function.quarantined() {
            found.push(Refusal::Quarantined(function.address));
        }
        found.extend(self.uses(function));
        found.extend(self.sharers(function, with));
        found
    }

    /// On some hosts (arm64 with a device tree) a function gets its group with its first driver.
    fn group_is_yet_to_come(&self, function: &Function) -> bool {
        function.driver.is_none() && !entries(&self.path("sys/kernel/iommu_groups")).is_empty()
    }

    /// The refusal for a group that holds foreign devices which a driver of the host has.
    pub(super) fn sharers(&self, function: &Function, with: &[Function]) -> Option<Refusal> {
        let group = function.group?;
        let folder = self.path(&format!("sys/kernel/iommu_groups/{group}/devices"));
        let members = entries(&folder).into_iter().filter_map(|n| n.parse().ok()).map(|a| self.function(a));
        let foreign = |f: &Function| !f.bridge && !f.bound() && with.iter().all(|w| w.address != f.address);
        let others: Vec<String> = members
            .filter(foreign)
            .filter_map(|f| Some(format!("{} (driver {})", f.address, f.driver?)))
            .collect();
        let others = others.join(", ");
        (!others.is_empty()).then_some(Refusal::GroupShared { address: function.address, group, others })
    }

    pub(super) fn function(&self, address: PciAddress) -> Function {
        let folder = self.function_path(address);
        let number = |name: &str| hex(&text(&folder.join(name)));
        let class = number("class") as u32;
        let bars = bars(&text(&folder.join("resource")));
        let header = header(&folder).unwrap_or([0; size_of::<Header>()]);
        let bridge = class >> 16 == BRIDGE || has_bridge_header(&header);
        let assigned = |index| bars.iter().any(|bar| bar.index == index && bar.space == BarSpace::Io);
        let told = |name: &str| Some(text(&folder.join(name))).filter(|t| !t.is_empty() && t != "(null)");
        Function {
            address,
            vendor: number("vendor") as u16,
            device: number("device") as u16,
            subsystem_vendor: number("subsystem_vendor") as u16,
            subsystem_device: number("subsystem_device") as u16,
            class,
            revision: number("revision") as u8,
            driver: link_name(&folder.join("driver")),
            group: link_name(&folder.join("iommu_group")).and_then(|name| name.parse().ok()),
            // A bridge has other registers there.
            io_ports: if bridge { IoPorts::None } else { IoPorts::of(bar_registers(&header), assigned) },
            bars,
            driver_override: told("driver_override"),
            bridge,
        }
    }
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or(0)
}

/// Lines of first address, last address and flags (linux/ioport.h), in hexadecimal; the first six are the BARs.
fn bars(resource: &str) -> Vec<BarInfo> {
    const IO: u64 = 0x100;
    const PREFETCHABLE: u64 = 0x2000;
    const WIDE: u64 = 0x10_0000;
    /// It has no address.
    const UNSET: u64 = 0x2000_0000;
    let bar = |(index, line): (usize, &str)| {
        let mut numbers = line.split_whitespace().map(hex);
        let (first, last, flags) = (numbers.next()?, numbers.next()?, numbers.next()?);
        let space = if flags & IO != 0 {
            BarSpace::Io
        } else {
            BarSpace::Memory { wide: flags & WIDE != 0, prefetchable: flags & PREFETCHABLE != 0 }
        };
        (last > first && flags & UNSET == 0).then(|| BarInfo {
            index,
            space,
            len: (last - first).saturating_add(1),
        })
    };
    resource.lines().take(6).enumerate().filter_map(bar).collect()
}

/// The header in config space, as far as everybody may read it.
type Header = [u8; 0x40];

fn header(folder: &Path) -> Option<Header> {
    use std::io::Read;
    let mut header = [0; size_of::<Header>()];
    std::fs::File::open(folder.join("config")).and_then(|mut f| f.read_exact(&mut header)).ok()?;
    Some(header)
}

/// Base address registers of an endpoint; all-ones, from a device that does not answer, is none.
fn bar_registers(header: &Header) -> [u32; 6] {
    let register = |index: usize| {
        let at = 0x10 + 4 * index;
        let value = u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if value == u32::MAX { 0 } else { value }
    };
    std::array::from_fn(register)
}

/// Header type at 0x0e of config space (PCIe 7.5.1.1.9): 0 is an endpoint's.
fn has_bridge_header(header: &Header) -> bool {
    // 0xff: it does not answer, which is something else.
    !matches!(header[0x0e] & 0x7f, 0 | 0x7f)
}
