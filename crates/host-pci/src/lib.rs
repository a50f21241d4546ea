//! A PCI function that belongs to the host, and the DMA domain it works in, without saying who hands them over.
//!
//! On Linux that is VFIO, on a Mac it will be a DriverKit extension, in tests a simulated device. The rules are the Mac's:
//! the caller never chooses a bus address, nothing is unmapped that the device may still write, BARs are never executable.

mod address;
mod capabilities;
pub mod conformance;
mod error;
mod fingerprint;
pub mod host;
mod io_ports;
mod mac;
mod policy;
pub mod simulated;
#[cfg(target_os = "linux")]
pub mod vfio;

pub use address::{AddressError, PciAddress, Selection};
pub use error::{Error, Result};
pub use io_ports::IoPorts;
pub use outboard_dart::Release;
pub use policy::{DmaPolicy, PolicyError};

use outboard_bus::Width;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// Unit of mappings, bytes: a Mac's page, on every back end.
pub const GRANULE: u64 = 16 << 10;

/// What a quarantined function's `driver_override` in sysfs says: no driver takes it, Outboard refuses it. It is gone when the device is
/// unplugged or the host restarted, which is when the device has got a chance to recover; `release` takes it back, too.
pub const QUARANTINED: &str = "outboard-quarantined";

/// Who a function is, from its config space; read once, when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionIdentity {
    /// Where it is on the host.
    pub address: PciAddress,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class, subclass and programming interface: the lower 24 bits.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
}

/// What a base address register gives access to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostBarKind {
    /// Memory, 32-bit address.
    Memory32 {
        /// Reads have no side effects, writes may be merged.
        prefetchable: bool,
    },
    /// Memory, 64-bit address; takes two registers.
    Memory64 {
        /// Reads have no side effects, writes may be merged.
        prefetchable: bool,
    },
    /// I/O ports; never mapped.
    Io,
}

/// A base address register of the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostBar {
    /// What it is.
    pub kind: HostBarKind,
    /// Bytes, a power of two.
    pub len: u64,
}

/// How the function interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InterruptKind {
    /// Level-triggered pin, one vector. Masked by the back end when it fires, until [`HostFunction::unmask_intx`].
    Intx,
    /// MSI, 1 to 32 vectors.
    Msi,
    /// MSI-X, 1 to 2,048 vectors.
    MsiX,
}

/// Vectors that the function has of each kind; 0 where it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptCounts {
    /// 0 or 1.
    pub intx: u16,
    /// 0 to 32.
    pub msi: u16,
    /// 0 to 2,048.
    pub msix: u16,
}

impl InterruptCounts {
    /// Refuses a count of 0 or beyond what there is.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))]
    fn check(self, kind: InterruptKind, count: u16) -> Result<()> {
        let most = match kind {
            InterruptKind::Intx => self.intx,
            InterruptKind::Msi => self.msi,
            InterruptKind::MsiX => self.msix,
        };
        if count == 0 || count > most {
            return Err(Error::OutOfRange {
                what: format!("{count} vectors of {kind:?}; the function has {most};"),
            });
        }
        Ok(())
    }
}

/// Takes the interrupts of a function. Called from any thread of the back end, never blocks: above all not on a lock that somebody holds
/// while calling the function, as turning interrupts off waits for calls under way here.
pub trait InterruptSink: Send + Sync {
    /// Vector `vector` fired. An interrupt of a vector that the guest masks is latched here, not lost.
    fn raise(&self, vector: u16);

    /// An eventfd that carries `vector` to the guest past this process, if there is one: a back end whose kernel can signal it
    /// (VFIO) does that instead of calling [`InterruptSink::raise`].
    fn event(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        let _ = vector;
        None
    }
}

/// A BAR, or a part of one, in this process's address space. Read and write, never execute. Gone when dropped: the holder takes it out
/// of the guest first.
pub trait MappedBar: Send + Sync {
    /// First byte. Device memory: only volatile accesses of the register's width.
    fn host(&self) -> NonNull<u8>;
    /// Bytes, a multiple of 16 KiB.
    fn len(&self) -> u64;
    /// A mapping is never empty.
    fn is_empty(&self) -> bool {
        false
    }
}

/// One PCI function of the host, open for this process alone.
///
/// Dropping it gives it back: interrupts off, bus master off, reset, in this order.
pub trait HostFunction: Send + Sync {
    /// Who it is.
    fn identity(&self) -> FunctionIdentity;

    /// Reads 1, 2 or 4 bytes of config space at `offset` (aligned to the width, below 4096) from the hardware.
    ///
    /// # Errors
    /// [`Error::Gone`] when the device is no longer there, [`Error::Host`]; never all-ones instead of an error.
    fn config_read(&self, offset: u16, width: Width) -> Result<u32>;

    /// Writes 1, 2 or 4 bytes of config space to the hardware. The caller has filtered what a guest may write.
    ///
    /// # Errors
    /// As [`HostFunction::config_read`].
    fn config_write(&self, offset: u16, width: Width, value: u32) -> Result<()>;

    /// Bytes of config space: 256, or 4096 for a PCIe function.
    fn config_len(&self) -> u16;

    /// The base address registers that can be reached, by index; a 64-bit BAR stands at its lower one.
    fn bars(&self) -> [Option<HostBar>; 6];

    /// What of the function's I/O ports is among [`HostFunction::bars`].
    fn io_ports(&self) -> IoPorts;

    /// The expansion ROM's contents, if it has one.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Host`].
    fn rom(&self) -> Result<Option<Vec<u8>>>;

    /// Maps `len` bytes at `offset` of BAR `bar` into this process; both multiples of 16 KiB, within the BAR.
    ///
    /// # Errors
    /// [`Error::Unaligned`], [`Error::NotMappable`] where the host cannot map that part (its page holds the MSI-X table, it is
    /// smaller than a page), [`Error::Gone`], [`Error::Host`].
    fn map_bar(&self, bar: usize, offset: u64, len: u64) -> Result<Arc<dyn MappedBar>>;

    /// Reads a BAR's register by a call to the back end: slow, for what cannot be mapped. I/O ports take 1, 2 and 4 bytes.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Gone`], [`Error::Host`].
    fn bar_read(&self, bar: usize, offset: u64, width: Width) -> Result<u64>;

    /// Writes a BAR's register by a call to the back end.
    ///
    /// # Errors
    /// As [`HostFunction::bar_read`].
    fn bar_write(&self, bar: usize, offset: u64, width: Width, value: u64) -> Result<()>;

    /// Vectors of each kind.
    fn interrupts(&self) -> InterruptCounts;

    /// Lets vectors 0 to `count` - 1 of `kind` fire into `sink`; whatever was enabled before is off. Not to be called from the sink.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a count of 0 or beyond [`HostFunction::interrupts`], [`Error::Gone`], [`Error::Host`].
    fn enable_interrupts(&self, kind: InterruptKind, count: u16, sink: Arc<dyn InterruptSink>) -> Result<()>;

    /// No interrupt fires after this returns. Not to be called from the sink.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Host`].
    fn disable_interrupts(&self) -> Result<()>;

    /// The guest has handled the pin's interrupt: let it fire again.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Host`].
    fn unmask_intx(&self) -> Result<()>;

    /// Lets the function start DMA (`true`), or stops it: when this returns, none is pending (PCIe 7.5.3.5, Transactions Pending).
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Busy`] when transactions do not end in time, [`Error::Host`].
    fn set_bus_master(&self, on: bool) -> Result<()>;

    /// Resets the function and waits until it answers again; config space is afterwards as it was when it was opened: interrupts
    /// and bus master are off. A function that cannot be reset alone takes the others of its slot with it.
    ///
    /// # Errors
    /// [`Error::ResetFailed`] when it does not come back or comes back different: it is not used any more then, and every later
    /// call says so. [`Error::NoReset`], [`Error::Gone`], [`Error::Host`].
    fn reset(&self) -> Result<()>;

    /// Becomes readable, and stays so, once the device has vanished (cable pulled), has failed (an uncorrectable error on its
    /// link) or the host wants it back: it is to be taken from the guest and dropped.
    fn removal(&self) -> BorrowedFd<'_>;
}

/// What a [`DmaDomain`] can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaLimits {
    /// Bytes mapped at a time.
    pub bytes: u64,
    /// Mappings at a time.
    pub entries: u32,
    /// Addresses and lengths are multiples of this: 16 KiB.
    pub granule: u64,
    /// Width of the bus addresses that come back.
    pub address_bits: u8,
}

/// What a [`DmaDomain`] holds now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DmaUsage {
    /// Bytes mapped.
    pub bytes: u64,
    /// Mappings.
    pub entries: u32,
    /// How many times something was done that would have panicked a Mac, each a bug of ours; counted by a domain that plays one.
    pub mistakes: u64,
    /// The first of them.
    pub first_mistake: Option<String>,
}

/// An address as the device sees memory (an IOVA).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BusAddress(pub u64);

/// Where the functions of one device find memory. Functions that share a domain see the same mappings.
///
/// Dropping it unmaps everything, after every function in it has its bus master off.
pub trait DmaDomain: Send + Sync {
    /// What it can hold.
    fn limits(&self) -> DmaLimits;

    /// Lets the device read and write `len` bytes of host memory, which the guest knows as `guest`. Where the device finds them is
    /// the domain's choice: an identity domain answers `guest`, a Mac's whatever is free.
    ///
    /// # Errors
    /// [`Error::Unaligned`], [`Error::OutOfBytes`], [`Error::OutOfEntries`], [`Error::Fragmented`], [`Error::Returning`], [`Error::Host`]. Nothing
    /// is mapped then. Limits are kept by own accounting: no host is ever asked for more than it has.
    ///
    /// # Safety
    /// `host..host + len` must stay mapped in this process until it is unmapped here and the device can no longer write to it. The
    /// device may change the memory at any time meanwhile.
    #[allow(unsafe_code)] // UNSAFETY: the caller promises the memory's lifetime, which no type here can hold.
    unsafe fn map(&self, host: NonNull<u8>, len: u64, guest: u64) -> Result<BusAddress>;

    /// Takes away a mapping, whole, as [`DmaDomain::map`] made it. When it returns the device no longer reaches the memory. The caller has seen to
    /// it that the device does not use it any more, or has the guest's word for that (`release`): a Mac may panic otherwise.
    ///
    /// # Errors
    /// [`Error::NotMapped`], [`Error::Host`]; on the latter the memory must be kept.
    fn unmap(&self, address: BusAddress, len: u64, release: Release) -> Result<()>;

    /// What it holds.
    fn usage(&self) -> DmaUsage;
}

/// Refuses what is no multiple of [`GRANULE`].
fn check_granule(values: &[(&str, u64)]) -> Result<()> {
    match values.iter().find(|(_, v)| !v.is_multiple_of(GRANULE)) {
        Some((what, value)) => Err(Error::Unaligned { what: format!("{what} {value:#x}") }),
        None => Ok(()),
    }
}

/// Checks a range of a BAR that is to be mapped, by the rules that hold on every host.
fn check_mappable(
    bar: usize,
    bar_len: Option<u64>,
    offset: u64,
    len: u64,
    msix: &[Range<u64>],
) -> Result<()> {
    check_granule(&[("offset", offset), ("length", len)])?;
    let refused = |why| Err(Error::NotMappable { bar, offset, len, why });
    let Some(bar_len) = bar_len else { return refused("the function has no such memory BAR") };
    if bar_len < GRANULE {
        return refused("the BAR is smaller than a page of 16 KiB");
    }
    let Some(end) = offset.checked_add(len).filter(|end| len > 0 && *end <= bar_len) else {
        return Err(Error::OutOfRange { what: format!("{offset:#x}+{len:#x} of BAR {bar}") });
    };
    if msix.iter().any(|kept| offset < kept.end && kept.start < end) {
        return refused("it shares a page of 16 KiB with the MSI-X table or pending bits");
    }
    Ok(())
}
