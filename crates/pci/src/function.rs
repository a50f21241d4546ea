use crate::ConfigAccess;
use outboard_bus::{AccessError, Width};

/// Base address registers of a type-0 function.
pub const BAR_COUNT: usize = 6;

/// An address space of PCI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Memory: an address on the bus is the guest-physical one.
    Memory,
    /// I/O ports, which the host bridge shows in a window of guest-physical addresses.
    Io,
}

/// What a BAR covers while its decoding is on, as the guest programmed it: nobody has checked the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// What `address` is an address of.
    pub space: Space,
    /// First address on the bus.
    pub address: u64,
    /// Bytes, a power of two.
    pub len: u64,
}

impl BarRange {
    /// `len` bytes of memory at `address`.
    pub const fn memory(address: u64, len: u64) -> Self {
        Self { space: Space::Memory, address, len }
    }

    /// `len` I/O ports from `address` on.
    pub const fn io(address: u64, len: u64) -> Self {
        Self { space: Space::Io, address, len }
    }
}

/// Index of the expansion ROM among what a function decodes, after its BARs.
pub const ROM_BAR: usize = BAR_COUNT;
/// BARs and the expansion ROM.
pub const REGION_COUNT: usize = BAR_COUNT + 1;

/// The BARs that a function decodes at the moment, by index; a 64-bit BAR stands at its lower index, the expansion ROM
/// at [`ROM_BAR`].
pub type Decoded = [Option<BarRange>; REGION_COUNT];

/// One function on a PCI bus: emulated, passed through or simulated.
///
/// Called from any vCPU thread, several at once. The root complex serialises config accesses, `decoded`, `bar_mapped`
/// and `reset` among themselves (it holds its topology lock, so none of them may call back into it); BAR accesses come
/// at any time, also a last one that was on its way while the BAR was unmapped.
pub trait PciFunction: Send + Sync {
    /// Name for logs, such as `blk0`.
    fn name(&self) -> &str;

    /// The dword at `access.offset()`; only the enabled bytes are used, and only their side effects may happen.
    fn config_read(&self, access: ConfigAccess) -> u32;

    /// Writes the enabled bytes of `value` (in their place within the dword).
    fn config_write(&self, access: ConfigAccess, value: u32);

    /// Which BARs answer now, and where. Asked after every config write and reset; the root complex acts on differences.
    fn decoded(&self) -> Decoded;

    /// BAR `bar` is from now on reached at guest-physical `address`, or nowhere. Called only when that changes, and with
    /// `None` before the old place is given up. A BAR that decodes outside the machine's windows stays `None`.
    fn bar_mapped(&self, bar: usize, address: Option<u64>) {
        let _ = (bar, address);
    }

    /// A guest load from BAR `bar`; `offset + width` lies within it.
    ///
    /// # Errors
    /// [`AccessError`]; the guest then reads all-ones.
    fn bar_read(&self, bar: usize, offset: u64, width: Width) -> Result<u64, AccessError>;

    /// A guest store to BAR `bar`; `offset + width` lies within it.
    ///
    /// # Errors
    /// [`AccessError`]; the write is then dropped.
    fn bar_write(&self, bar: usize, offset: u64, width: Width, value: u64) -> Result<(), AccessError>;

    /// Back to the state after power-on: BARs and COMMAND cleared, interrupts masked, all work stopped.
    fn reset(&self);
}
