//! What a hypervisor must offer to Outboard, without saying which one it is.
//!
//! The phases are those that Apple's Hypervisor.framework forces on its users, and every back end keeps to them:
//!
//! 1. [`Hypervisor::capabilities`]: ask what is there.
//! 2. [`Hypervisor::create_vm`]: one VM, with everything that must be known before the first vCPU.
//! 3. [`Vm::map`]: guest memory, in units of [`GRANULE`]; also later, while vCPUs run.
//! 4. [`Vm::create_interrupt_controller`]: once, before any vCPU.
//! 5. [`Vm::bind_vcpu`]: each vCPU on the thread that will run it, for good.
//! 6. [`Vcpu::run`]: until an [`Exit`] that the machine must handle.
//!
//! A request that a back end does not know is refused with [`Error::Unsupported`], never ignored.

pub mod backend;
pub mod conformance;
mod error;
mod exit;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
pub mod kvm;

pub use error::{Error, Result};
pub use exit::Exit;

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// Unit of guest mappings in bytes, on every back end: a Mac's stage-2 page (Apple `hv_vm_map`: address, IPA and size
/// are multiples of the page size, 16 KiB). KVM would take less; the Mac's rule is enforced there too.
pub const GRANULE: u64 = 16 * 1024;

/// What guest memory is for; decides what the guest may do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryKind {
    /// Ordinary memory: read, write, execute.
    Ram,
    /// A device's memory (a BAR): read and write. There is no way to ask for execute: on a Mac an executable mapping
    /// of device memory panics the host.
    Device,
}

/// What a back end can do. Everything is the hypervisor's own answer, not a guess.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Most vCPUs a VM can have.
    pub max_vcpus: u32,
    /// Largest width of a guest-physical address in bits.
    pub max_ipa_bits: u8,
    /// Whether [`VcpuOptions::tso`] can be granted.
    pub tso: bool,
    /// Whether [`Vm::bind_doorbell`] and [`InterruptController::bind_interrupt`] work: the kernel then carries
    /// doorbells and interrupts past this process.
    pub kernel_events: bool,
    /// Whether an instruction fetch from [`MemoryKind::Device`] memory that this process allocated faults in the guest.
    pub enforces_device_no_execute: bool,
}

/// How a vCPU thread competes for a CPU of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ThreadPriority {
    /// As any other thread.
    #[default]
    Normal,
    /// Ahead of ordinary threads (Linux: the lowest real-time round-robin priority; macOS: user-interactive QoS).
    High,
}

/// What every vCPU of a VM gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuOptions {
    /// Total-store-order memory model, for x86 emulation in the guest (Apple silicon: ACTLR_EL1.EnTSO).
    pub tso: bool,
    /// Scheduling of the vCPU threads.
    pub priority: ThreadPriority,
}

/// Everything a hypervisor must know before the first vCPU exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmOptions {
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// Width of a guest-physical address in bits, at most [`Capabilities::max_ipa_bits`].
    pub ipa_bits: u8,
    /// For every vCPU.
    pub vcpu: VcpuOptions,
}

/// Where the GICv3 and its v2m frame stand in the guest's address space, and how interrupt numbers are divided.
/// (Arm IHI 0069, GICv3; Arm DEN 0029, Base System Architecture, GICv2m.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GicConfig {
    /// Base of the distributor, 64 KiB aligned, [`GICD_SIZE`] bytes.
    pub distributor: u64,
    /// Base of the redistributors, 64 KiB aligned, [`GICR_STRIDE`] bytes for each vCPU, in vCPU order.
    pub redistributors: u64,
    /// Base of the v2m frame, 64 KiB aligned, [`MSI_FRAME_SIZE`] bytes.
    pub msi_frame: u64,
    /// INTIDs that the frame raises, within the SPIs (32 to 1019). Edge-triggered.
    pub msi_intids: Range<u32>,
    /// One past the last SPI in use: a multiple of 32, 64 to 1024 (GICD_TYPER.ITLinesNumber counts in 32s).
    pub intid_limit: u32,
}

/// Bytes of the GICv3 distributor's frame.
pub const GICD_SIZE: u64 = 0x1_0000;
/// Bytes of one vCPU's redistributor: its RD and SGI frames.
pub const GICR_STRIDE: u64 = 0x2_0000;
/// Bytes of the v2m MSI frame as the guest sees it.
pub const MSI_FRAME_SIZE: u64 = 0x1_0000;
/// Offset of GICM_SETSPI_NSR in the frame: where a device writes its message.
pub const MSI_DOORBELL: u64 = 0x40;
/// INTID of the EL1 virtual timer's private interrupt, the same on every back end.
pub const VIRTUAL_TIMER_INTID: u32 = 27;

/// The MPIDR affinity of vCPU `index`: Aff0 counts to 16, since a GICv3 SGI's target list names 16 CPUs, then Aff1.
/// The FDT's `reg` of a CPU is this value.
pub const fn mpidr(index: u32) -> u64 {
    (index % 16) as u64 | (((index / 16) as u64) << 8)
}

/// This host's own hypervisor.
///
/// # Errors
/// [`Error::Unavailable`], saying why there is none and what to do.
pub fn native() -> Result<Arc<dyn Hypervisor>> {
    #[cfg(all(target_os = "linux", target_arch = "aarch64"))]
    return kvm::Kvm::open();
    #[cfg(not(all(target_os = "linux", target_arch = "aarch64")))]
    Err(Error::Unavailable {
        why: format!(
            "no virtual machine can run on {} {}: it needs an arm64 Linux host with KVM (or, later, a Mac with Apple silicon)",
            std::env::consts::ARCH,
            std::env::consts::OS
        ),
        next: "to try it on this machine, run `cargo xtask lab`, which emulates such a host",
    })
}

/// Phase 1 and 2. One per process and kind.
pub trait Hypervisor: Send + Sync {
    /// Short name for logs and reports, such as `kvm`.
    fn name(&self) -> &'static str;

    /// What this host's hypervisor offers.
    ///
    /// # Errors
    /// [`Error::Host`] if it cannot be asked.
    fn capabilities(&self) -> Result<Capabilities>;

    /// Creates a VM with nothing in it. A process has one VM at a time (a Mac's rule).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for options beyond [`Hypervisor::capabilities`], [`Error::Host`] otherwise.
    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>>;
}

/// Phases 3 to 5: a VM. Every method may be called from any thread but [`Vm::bind_vcpu`].
///
/// Order of teardown: every [`Vcpu`] dropped on its thread, then memory unmapped, then the last reference to the VM
/// dropped, then host memory freed.
pub trait Vm: Send + Sync {
    /// Maps `len` bytes of host memory at guest-physical `ipa`. All three must be multiples of [`GRANULE`].
    ///
    /// # Errors
    /// [`Error::Unaligned`], [`Error::Overlap`], [`Error::BeyondAddressLimit`], [`Error::Host`]. Nothing is mapped then.
    ///
    /// # Safety
    /// `host..host + len` must stay mapped in this process, for reading and writing, until it is unmapped here or the
    /// VM is gone. The guest (and its devices) may change it at any time: no Rust reference into it may exist.
    #[allow(unsafe_code)] // UNSAFETY: the caller promises the memory's lifetime, which no type here can hold.
    unsafe fn map(&self, ipa: u64, host: NonNull<u8>, len: u64, kind: MemoryKind) -> Result<()>;

    /// Takes away a mapping, whole, as [`Vm::map`] made it (a Mac kills a process that unmaps a hole). When it returns,
    /// no vCPU can reach the memory any more.
    ///
    /// # Errors
    /// [`Error::NotMapped`] if exactly this range was not mapped by one call; [`Error::Host`].
    fn unmap(&self, ipa: u64, len: u64) -> Result<()>;

    /// Creates the GICv3 with its v2m frame. Once, before the first vCPU.
    ///
    /// # Errors
    /// [`Error::WrongPhase`], [`Error::Unsupported`] for a layout the back end cannot have, [`Error::Host`].
    fn create_interrupt_controller(&self, config: &GicConfig) -> Result<Arc<dyn InterruptController>>;

    /// Makes vCPU `index` on the calling thread, which alone may use it. vCPU 0 waits for [`Vcpu::set_boot_state`];
    /// the others are off until the guest's PSCI CPU_ON, and [`Vcpu::run`] blocks meanwhile.
    ///
    /// # Errors
    /// [`Error::WrongPhase`] before the interrupt controller or twice for one index, [`Error::Host`].
    fn bind_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>>;

    /// Lets the kernel signal `event` (an [eventfd(2)]) when the guest stores `value` (any value if `None`), `width`
    /// bytes (2 or 4) wide, at `ipa`; the store then makes no exit.
    ///
    /// [eventfd(2)]: https://man7.org/linux/man-pages/man2/eventfd.2.html
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless [`Capabilities::kernel_events`]; [`Error::Host`].
    fn bind_doorbell(&self, ipa: u64, width: u8, value: Option<u32>, event: BorrowedFd<'_>) -> Result<()>;

    /// Undoes [`Vm::bind_doorbell`] with the same arguments.
    ///
    /// # Errors
    /// As [`Vm::bind_doorbell`]; [`Error::NotMapped`] if it was not bound.
    fn unbind_doorbell(&self, ipa: u64, width: u8, value: Option<u32>, event: BorrowedFd<'_>) -> Result<()>;
}

/// The guest's GICv3, from any thread, without blocking.
pub trait InterruptController: Send + Sync {
    /// Drives SPI `intid` (32 to 1019). A level-triggered line follows `level`; an edge-triggered one becomes pending at
    /// `true` and ignores `false`. The trigger is what the guest configured, so it must match the FDT.
    ///
    /// # Errors
    /// [`Error::NoSuchInterrupt`] outside the SPIs or inside [`GicConfig::msi_intids`]; [`Error::Host`].
    fn set_spi(&self, intid: u32, level: bool) -> Result<()>;

    /// Delivers a message-signalled interrupt: `data` written to `address`, which must be the frame's doorbell.
    ///
    /// # Errors
    /// [`Error::NoSuchInterrupt`] for another address or an INTID that the frame does not have; [`Error::Host`].
    fn send_msi(&self, address: u64, data: u32) -> Result<()>;

    /// Lets the kernel raise `intid` (edge) whenever `event` is signalled, without this process taking part.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless [`Capabilities::kernel_events`]; [`Error::NoSuchInterrupt`]; [`Error::Host`].
    fn bind_interrupt(&self, intid: u32, event: BorrowedFd<'_>) -> Result<()>;

    /// Lets the kernel drive level-triggered SPI `intid`: a signal of `trigger` asserts it until the guest's end of interrupt, which
    /// releases it and signals `resample`. Several may share one line.
    ///
    /// # Errors
    /// As [`InterruptController::bind_interrupt`].
    fn bind_level_interrupt(
        &self,
        intid: u32,
        trigger: BorrowedFd<'_>,
        resample: BorrowedFd<'_>,
    ) -> Result<()>;

    /// Undoes [`InterruptController::bind_interrupt`] or, with its trigger, [`InterruptController::bind_level_interrupt`].
    ///
    /// # Errors
    /// As [`InterruptController::bind_interrupt`].
    fn unbind_interrupt(&self, intid: u32, event: BorrowedFd<'_>) -> Result<()>;
}

/// A register of a vCPU that the machine or a test may look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Register {
    /// General-purpose X0 to X30.
    X(u8),
    /// Program counter.
    Pc,
    /// Saved program state of the current exception level (PSTATE).
    Cpsr,
}

/// Phase 6: a vCPU, bound to the thread that made it. Not `Send`: each implementation says so with its own marker.
pub trait Vcpu {
    /// A handle with which other threads interrupt [`Vcpu::run`].
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Sets what the arm64 boot protocol wants on the boot CPU (Linux Documentation/arch/arm64/booting.rst): `pc` the entry point, `x0` the
    /// FDT's address, X1 to X3 zero, EL1h with D, A, I and F masked, MMU off.
    ///
    /// # Errors
    /// [`Error::Host`].
    fn set_boot_state(&mut self, pc: u64, x0: u64) -> Result<()>;

    /// Runs the guest until something needs the machine. Interrupts, timer, WFI, PSCI CPU_ON, CPU_OFF and AFFINITY_INFO
    /// and the v2m frame are the back end's own business and make no exit.
    ///
    /// # Errors
    /// [`Error::Host`]; the vCPU cannot go on then.
    fn run(&mut self) -> Result<Exit>;

    /// Answers the last [`Exit::MmioRead`]: must be called before the next [`Vcpu::run`]. The back end cuts `value` to
    /// the width, extends its sign if the instruction asks for it and drops it if the target is XZR.
    fn complete_read(&mut self, value: u64);

    /// Makes the guest take a synchronous external data abort at its current instruction, as a bus error would.
    ///
    /// # Errors
    /// [`Error::Host`].
    fn inject_data_abort(&mut self) -> Result<()>;

    /// Reads a register, between runs.
    ///
    /// # Errors
    /// [`Error::Host`].
    fn register(&self, register: Register) -> Result<u64>;

    /// Writes a register, between runs.
    ///
    /// # Errors
    /// [`Error::Host`].
    fn set_register(&mut self, register: Register, value: u64) -> Result<()>;
}

/// Interrupts a running vCPU from any thread.
pub trait Kick: Send + Sync {
    /// The current or, if it is not running, the next [`Vcpu::run`] returns [`Exit::Kicked`]. Kicks merge; none gets
    /// lost, at whatever moment it comes. After the vCPU is gone it does nothing.
    fn kick(&self);
}
