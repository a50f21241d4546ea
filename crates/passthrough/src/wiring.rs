//! What the machine gives a passed-through function: places in the guest, and ways for interrupts into it.

use outboard_bus::{Event, IrqLine, MsiMessage, MsiSink};
use outboard_host_pci::MappedBar;
use std::sync::Arc;

/// Why the machine could not do what it was asked, in its own words.
pub type WiringError = Box<dyn std::error::Error + Send + Sync>;

/// Shows a device's memory to the guest, as `Device` memory: read and write, never execute.
///
/// Called while the root complex holds its topology lock: it must not call back into it.
pub trait GuestMapper: Send + Sync {
    /// Shows `bar` to the guest at `ipa`. The root complex has put the BAR there, so it lies within the machine's PCI windows; `ipa` and
    /// the length are multiples of 16 KiB. The mapping must take precedence over the MMIO bus, where the whole BAR stands for what is
    /// not mapped. The mapper keeps `bar` until [`GuestMapper::unmap`].
    ///
    /// # Errors
    /// The machine's reason. Nothing is mapped then, and the guest reaches the BAR by trapped accesses.
    fn map(&self, ipa: u64, bar: Arc<dyn MappedBar>) -> Result<(), WiringError>;

    /// Takes away what [`GuestMapper::map`] showed at `ipa`, whole. When it returns no vCPU reaches it any more.
    ///
    /// # Errors
    /// The machine's reason; the guest may still reach the memory then, which is kept.
    fn unmap(&self, ipa: u64, len: u64) -> Result<(), WiringError>;
}

/// Lets a kernel carry message-signalled interrupts from the device to the guest (an eventfd bound to an interrupt of the guest).
pub trait VectorBinder: Send + Sync {
    /// From now on every signal of `event` is `message` to the guest, without this process, which consumes it. What `event` holds at
    /// this moment is delivered too and may stay in it: the caller takes it back afterwards. (So does KVM's irqfd.)
    ///
    /// # Errors
    /// The machine's reason, such as a message that names no interrupt of the guest.
    fn bind(&self, message: MsiMessage, event: &Event) -> Result<(), WiringError>;

    /// Undoes [`VectorBinder::bind`] with the same arguments: when it returns, signals stay in `event`.
    fn unbind(&self, message: MsiMessage, event: &Event);
}

/// Lets a kernel drive the guest's level-triggered line (KVM's irqfd with a resample fd).
pub trait LevelBinder: Send + Sync {
    /// From now on a signal of `trigger` asserts the line until the guest's end of interrupt, which releases it and signals `resample`.
    ///
    /// # Errors
    /// The machine's reason; interrupts go through this process then.
    fn bind(&self, trigger: &Event, resample: &Event) -> Result<(), WiringError>;

    /// Undoes [`LevelBinder::bind`] with the same arguments.
    fn unbind(&self, trigger: &Event, resample: &Event);
}

/// The guest's interrupt line of the function's pin.
#[derive(Clone)]
pub struct IntxWiring {
    /// This function's say about the line. Lines are shared: the machine asserts it while any of its drivers does. While it asserts the line
    /// a function says so again now and then.
    pub line: Arc<dyn IrqLine>,
    /// A way past this process, where there is one.
    pub kernel: Option<Arc<dyn LevelBinder>>,
}

/// Everything a function needs from the machine.
#[derive(Clone)]
pub struct Wiring {
    /// Where BARs are shown to the guest.
    pub mapper: Arc<dyn GuestMapper>,
    /// Takes messages that go through this process.
    pub msi: Arc<dyn MsiSink>,
    /// Carries messages past this process; `None` sends all of them through it.
    pub vectors: Option<Arc<dyn VectorBinder>>,
    /// The pin's line; without one the function shows no pin.
    pub intx: Option<IntxWiring>,
}
