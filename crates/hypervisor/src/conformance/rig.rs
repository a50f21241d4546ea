//! What every case works with: a small VM, a vCPU on the case's own thread or a crew of them on theirs, and the
//! watchdog that turns a hang into a named failure.

#![allow(unsafe_code)] // UNSAFETY: host memory that a guest shares.

use crate::{
    Capabilities, Exit, GRANULE, GicConfig, Hypervisor, InterruptController, Kick, MemoryKind, Register,
    Vcpu, VcpuOptions, Vm, VmOptions,
};
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Guest-physical address of the test VM's memory.
pub const RAM: u64 = 0x4000_0000;
/// Its size in bytes.
pub const RAM_SIZE: u64 = 64 * GRANULE;
/// Where the program of a case starts.
pub const CODE: u64 = RAM;
/// Where its exception vectors are (2 KiB aligned).
pub const VECTORS: u64 = RAM + 0x8000;
/// Nothing is ever mapped here: accesses make exits.
pub const MMIO: u64 = 0x1000_0000;
/// A store here reports a value to the host; there is room for one report per vCPU.
pub const REPORT: u64 = 0x0900_0000;
/// The guest's synchronous exception handler stores ESR, ELR and FAR here.
pub const FAULT: u64 = 0x0901_0000;
/// The guest's IRQ handler stores the INTID here.
pub const IRQ: u64 = 0x0902_0000;
/// First of the frame's MSIs; below it are wired SPIs.
pub const FIRST_MSI: u32 = 96;

/// Address width of the test VMs.
const IPA_BITS: u8 = 36;

/// Where the test VMs have their interrupt controller.
pub fn gic_config() -> GicConfig {
    GicConfig {
        distributor: 0x0800_0000,
        redistributors: 0x080a_0000,
        msi_frame: 0x0802_0000,
        msi_intids: FIRST_MSI..160,
        intid_limit: 160,
    }
}

/// Why a case did not pass.
#[derive(Debug)]
pub enum Stop {
    /// The back end did something else than the case expects.
    Failed(String),
    /// The back end cannot be tested for this, by its own account.
    Skipped(String),
}

impl Stop {
    /// Says at which step it came.
    fn while_waiting_for(self, what: &dyn fmt::Display) -> Self {
        match self {
            Self::Failed(why) => Self::Failed(format!("{what}: {why}")),
            skipped => skipped,
        }
    }
}

impl From<crate::Error> for Stop {
    fn from(error: crate::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Result of a case and of its steps.
pub type Outcome<T = ()> = Result<T, Stop>;

/// A failure in words.
pub fn fail<T>(what: impl fmt::Display) -> Outcome<T> {
    Err(Stop::Failed(what.to_string()))
}

/// Fails unless `got` is `want`; `what` says which value it is.
pub fn expect<T: PartialEq + fmt::Debug>(what: impl fmt::Display, got: T, want: T) -> Outcome {
    if got == want { Ok(()) } else { fail(format!("{what}: {got:x?}, expected {want:x?}")) }
}

/// The exception class of an ESR_EL1: bits 31:26 (Arm DDI 0487, D19.2.37). KVM of Linux 6.1 extends the sign of the syndromes it injects into
/// the reserved bits above (seen in the lab).
pub const fn exception_class(esr: u64) -> u64 {
    esr >> 26 & 0x3f
}

/// Fails unless `result` is an error that `matches` accepts.
pub fn expect_refusal<T>(
    what: impl fmt::Display,
    result: crate::Result<T>,
    matches: impl Fn(&crate::Error) -> bool,
) -> Outcome {
    match result {
        Ok(_) => fail(format!("{what} was accepted")),
        Err(error) if matches(&error) => Ok(()),
        Err(error) => fail(format!("{what} was refused with another error: {error:?}")),
    }
}

/// The back end under test and the watchdog's view of the running case.
pub struct Context {
    /// The back end.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// What it says it can do.
    pub capabilities: Capabilities,
    hung: AtomicBool,
    kickers: Mutex<Vec<Arc<dyn Kick>>>,
}

impl Context {
    /// A context for one case.
    pub fn new(hypervisor: Arc<dyn Hypervisor>, capabilities: Capabilities) -> Self {
        Self { hypervisor, capabilities, hung: AtomicBool::new(false), kickers: Mutex::default() }
    }

    /// Whether the watchdog has given the case up.
    pub fn hung(&self) -> bool {
        self.hung.load(Ordering::SeqCst)
    }

    /// Lets the watchdog interrupt a vCPU.
    pub fn watch(&self, kicker: Arc<dyn Kick>) {
        self.kickers().push(kicker);
    }

    /// The watchdog: gives the case up and interrupts everything it runs.
    pub fn give_up(&self) {
        self.hung.store(true, Ordering::SeqCst);
        self.kickers().iter().for_each(|k| k.kick());
    }

    fn kickers(&self) -> std::sync::MutexGuard<'_, Vec<Arc<dyn Kick>>> {
        self.kickers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The options of a plain VM.
    pub fn options(&self, vcpus: u32) -> VmOptions {
        let ipa_bits = IPA_BITS.min(self.capabilities.max_ipa_bits);
        VmOptions { vcpus, ipa_bits, vcpu: VcpuOptions::default() }
    }
}

/// Page-aligned memory of this process that a guest can get.
pub struct HostMemory {
    start: NonNull<u8>,
    len: usize,
    raw: *mut libc::c_void,
    raw_len: usize,
}

// SAFETY: plain memory, touched only through atomics.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// `len` bytes of zeros, aligned to [`GRANULE`].
    pub fn new(len: u64) -> Outcome<Self> {
        let (len, raw_len) = (len as usize, (len + GRANULE) as usize);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
        // SAFETY: a new mapping where the kernel likes.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), raw_len, protection, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            return fail(format!("mmap of {raw_len} bytes: {}", std::io::Error::last_os_error()));
        }
        let aligned = raw.map_addr(|a| a.next_multiple_of(GRANULE as usize)).cast();
        Ok(Self { start: NonNull::new(aligned).expect("mmap never gives page 0"), len, raw, raw_len })
    }

    /// Its first byte.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// The 8 bytes at `offset`.
    pub fn cell(&self, offset: u64) -> &AtomicU64 {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: in bounds, aligned, alive as long as `self`; the guest may change it, which atomics allow.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// Copies a program to `offset`. No guest may run meanwhile.
    pub fn write(&self, offset: u64, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        for (n, chunk) in bytes.chunks(8).enumerate() {
            let mut cell = [0; 8];
            cell[..chunk.len()].copy_from_slice(chunk);
            self.cell(offset + 8 * n as u64).store(u64::from_le_bytes(cell), Ordering::Relaxed);
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; the VM that had it is gone by the order of fields and of teardown.
        unsafe { libc::munmap(self.raw, self.raw_len) };
    }
}

/// A VM with some memory and its interrupt controller. Field order is the order of teardown.
pub struct Bench<'a> {
    /// The interrupt controller.
    pub gic: Arc<dyn InterruptController>,
    /// The VM.
    pub vm: Arc<dyn Vm>,
    /// Its memory, at [`RAM`].
    pub ram: HostMemory,
    /// The case's context.
    pub context: &'a Context,
}

impl<'a> Bench<'a> {
    /// A VM with `vcpus` and plain options.
    pub fn new(context: &'a Context, vcpus: u32) -> Outcome<Self> {
        Self::with(context, &context.options(vcpus))
    }

    /// A VM with `options`.
    pub fn with(context: &'a Context, options: &VmOptions) -> Outcome<Self> {
        let ram = HostMemory::new(RAM_SIZE)?;
        let vm = context.hypervisor.create_vm(options)?;
        // SAFETY: `ram` is dropped after `vm`.
        unsafe { vm.map(RAM, ram.start(), RAM_SIZE, MemoryKind::Ram)? };
        let gic = vm.create_interrupt_controller(&gic_config())?;
        Ok(Self { gic, vm, ram, context })
    }

    /// Puts a program, or its vectors, into memory.
    pub fn load(&self, program: super::asm::Asm) {
        let (base, words) = program.finish();
        self.ram.write(base - RAM, &words);
    }

    /// vCPU 0 on this thread, about to start at [`CODE`].
    pub fn boot_cpu(&self) -> Outcome<Cpu<'a>> {
        let mut cpu = self.cpu(0)?;
        cpu.vcpu.set_boot_state(CODE, 0)?;
        Ok(cpu)
    }

    /// A vCPU on this thread.
    pub fn cpu(&self, index: u32) -> Outcome<Cpu<'a>> {
        let vcpu = self.vm.bind_vcpu(index)?;
        self.context.watch(vcpu.kicker());
        Ok(Cpu { vcpu, context: self.context })
    }
}

/// A vCPU on the case's thread.
pub struct Cpu<'a> {
    /// The vCPU.
    pub vcpu: Box<dyn Vcpu>,
    context: &'a Context,
}

impl Cpu<'_> {
    /// Runs to the next exit; fails when the watchdog has given up.
    pub fn run(&mut self) -> Outcome<Exit> {
        let exit = self.vcpu.run()?;
        if exit == Exit::Kicked && self.context.hung() {
            return fail(hung_at(&*self.vcpu));
        }
        Ok(exit)
    }

    /// Runs to the next exit, which must be a store of `width` bytes at `ipa`, and gives the value.
    pub fn store_at(&mut self, ipa: u64, width: u8) -> Outcome<u64> {
        match self.run()? {
            Exit::MmioWrite { ipa: at, width: wide, value } if (at, wide) == (ipa, width) => Ok(value),
            Exit::MmioWrite { ipa: FAULT, value, .. } => fail(self.fault(value)?),
            other => fail(format!("exit {other:x?}, expected a store of {width} bytes at {ipa:#x}")),
        }
    }

    /// Runs to the next report.
    pub fn report(&mut self) -> Outcome<u64> {
        self.store_at(REPORT, 8)
    }

    /// Runs to the next report, which must be `want`.
    pub fn expect_report(&mut self, what: impl fmt::Display, want: u64) -> Outcome {
        let got = self.report().map_err(|stop| stop.while_waiting_for(&what))?;
        expect(what, got, want)
    }

    /// Runs until the guest's IRQ handler reports an interrupt, which must be `intid`.
    pub fn expect_irq(&mut self, what: impl fmt::Display, intid: u32) -> Outcome {
        let got = self.store_at(IRQ, 8).map_err(|stop| stop.while_waiting_for(&what))?;
        expect(format!("{what}: interrupt"), got, intid.into())
    }

    /// Runs until the guest's exception handler reports: ESR, ELR and FAR.
    pub fn exception(&mut self) -> Outcome<(u64, u64, u64)> {
        let first = self.run()?;
        let Exit::MmioWrite { ipa: FAULT, value: esr, .. } = first else {
            return fail(format!("exit {first:x?}, expected the guest's exception handler"));
        };
        Ok((esr, self.store_at(FAULT + 8, 8)?, self.store_at(FAULT + 16, 8)?))
    }

    fn fault(&mut self, esr: u64) -> Outcome<String> {
        let (elr, far) = (self.store_at(FAULT + 8, 8)?, self.store_at(FAULT + 16, 8)?);
        Ok(format!("the guest took an exception: ESR {esr:#x}, ELR {elr:#x}, FAR {far:#x}"))
    }

    /// Register X`n`.
    pub fn x(&self, n: u8) -> Outcome<u64> {
        Ok(self.vcpu.register(Register::X(n))?)
    }
}

/// The watchdog's finding.
pub fn hung_at(vcpu: &dyn Vcpu) -> String {
    match vcpu.register(Register::Pc) {
        Ok(pc) => format!("hung: the guest made no progress, PC {pc:#x}"),
        Err(error) => format!("hung: the guest made no progress ({error})"),
    }
}
