//! A KVM vCPU on its thread.

#![allow(unsafe_code)] // UNSAFETY: fields of `kvm_run`, a structure with a union shared with the kernel.

use super::kick::Binding;
use super::signed::LastFetch;
use super::vm::VmShared;
use super::{failed, gic, regs, unsupported};
use crate::backend::MsiFrame;
use crate::{Error, Exit, Kick, Register, Result, Vcpu, mpidr};
use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_EXIT_ARM_NISV, KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_vcpu_events, kvm_vcpu_init,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

/// PSTATE of the boot protocol: EL1h with D, A, I and F masked (Arm DDI 0487, C5.2.19 SPSR_EL1).
const BOOT_PSTATE: u64 = 0x3c5;

/// Register 31 of a load: none.
const XZR: u8 = 31;

/// Makes vCPU `index` in its reset state: vCPU 0 on, the others off until PSCI CPU_ON. No optional CPU feature (SVE,
/// PMU, pointer authentication) is asked for: guests see what every back end can give.
pub fn create(vm: &VmFd, index: u32) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(index.into()).map_err(failed(format!("KVM_CREATE_VCPU {index}")))?;
    let mut init = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init).map_err(failed("KVM_ARM_PREFERRED_TARGET"))?;
    init.features = [0; 7];
    init.features[0] = 1 << KVM_ARM_VCPU_PSCI_0_2;
    if index != 0 {
        init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    vcpu.vcpu_init(&init).map_err(failed(format!("KVM_ARM_VCPU_INIT {index}")))?;
    let affinity = regs::get(&vcpu, regs::MPIDR_EL1)? & regs::MPIDR_AFFINITY;
    if affinity != mpidr(index) {
        return Err(unsupported(format!(
            "affinity {:#x} for vCPU {index}: it has {affinity:#x}",
            mpidr(index)
        )));
    }
    Ok(vcpu)
}

/// What the last exit left to do at the next KVM_RUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    /// Nothing.
    Nothing,
    /// The guest waits for a value of this many bytes.
    Answer(usize),
    /// KVM finishes the access when it is called again.
    Completion,
}

/// An exit, copied out of `kvm_run`.
enum Raw {
    Read(u64, usize),
    Write(u64, usize, u64),
    Event(u32),
    Undecoded,
    Interrupted,
    Failed(String),
}

/// The trait's view of a vCPU. Field order is drop order: no kick may reach `fd`'s mapping once it goes, and the VM
/// outlives its vCPU.
pub struct KvmVcpu {
    binding: Binding,
    fd: VcpuFd,
    index: u32,
    frame: MsiFrame,
    pending: Pending,
    /// A register that KVM will leave wrong when it finishes the last access, and its right value.
    correction: Option<(u8, u64)>,
    last_fetch: LastFetch,
    vm: Arc<VmShared>,
    /// Bound to its thread: neither `Send` nor `Sync`.
    _thread: PhantomData<*mut ()>,
}

impl KvmVcpu {
    /// Takes vCPU `index` out of `slot` for the calling thread; leaves it there on failure.
    pub fn bind(slot: &mut Option<VcpuFd>, index: u32, frame: MsiFrame, vm: Arc<VmShared>) -> Result<Self> {
        let mut fd = slot.take().expect("the caller looked");
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        // SAFETY: the mapping lives as long as `fd`, which this vCPU drops after the binding.
        match unsafe { Binding::new(immediate_exit) } {
            Ok(binding) => {
                let (pending, correction, last_fetch) = (Pending::Nothing, None, LastFetch::default());
                Ok(Self {
                    binding,
                    fd,
                    index,
                    frame,
                    pending,
                    correction,
                    last_fetch,
                    vm,
                    _thread: PhantomData,
                })
            }
            Err(error) => {
                *slot = Some(fd);
                Err(error)
            }
        }
    }

    /// Has KVM do what it puts off to a vCPU's first run, without entering the guest. The caller sees to it that the VM's vCPUs do this one
    /// after the other: Linux 6.1 marks the interrupt controller as ready before its distributor is there (`kvm_vgic_map_resources`), so that a
    /// vCPU whose first run comes at that moment enters the guest, and the guest's accesses to the distributor come out as exits.
    pub fn prepare(&mut self) -> Result<()> {
        self.binding.set_immediate_exit(true);
        match self.enter()? {
            Raw::Interrupted => Ok(()),
            _ => self.fail("the guest ran, although its vCPU was only to be prepared".into()),
        }
    }

    /// One KVM_RUN.
    fn enter(&mut self) -> Result<Raw> {
        let exit = match self.fd.run() {
            Ok(VcpuExit::MmioRead(ipa, data)) => Raw::Read(ipa, data.len()),
            Ok(VcpuExit::MmioWrite(ipa, data)) => {
                let mut bytes = [0; 8];
                bytes[..data.len()].copy_from_slice(data);
                Raw::Write(ipa, data.len(), u64::from_le_bytes(bytes))
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => Raw::Event(kind),
            Ok(VcpuExit::Unsupported(KVM_EXIT_ARM_NISV)) => Raw::Undecoded,
            Ok(VcpuExit::Intr) => Raw::Interrupted,
            Ok(VcpuExit::FailEntry(reason, cpu)) => Raw::Failed(format!(
                "the hardware refused to enter the guest on CPU {cpu}, reason {reason:#x}"
            )),
            Ok(VcpuExit::InternalError) => Raw::Failed("internal error".into()),
            Ok(other) => Raw::Failed(format!("unexpected exit {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Raw::Interrupted,
            Err(error) => return Err(failed(format!("KVM_RUN of vCPU {}", self.index))(error)),
        };
        Ok(exit)
    }

    fn fail<T>(&self, why: String) -> Result<T> {
        Err(Error::Host { call: format!("KVM_RUN of vCPU {}", self.index), source: io::Error::other(why) })
    }

    /// Turns a raw exit into one for the machine; `None` if it was served here.
    fn serve(&mut self, raw: Raw) -> Result<Option<Exit>> {
        match raw {
            Raw::Interrupted => {
                // KVM finishes a pending access before it looks at `immediate_exit` or signals.
                self.pending = Pending::Nothing;
                Ok(None)
            }
            Raw::Read(ipa, len) => {
                self.pending = Pending::Answer(len);
                let width = self.check_width(ipa, len)?;
                if let Some(offset) = self.frame.offset(ipa) {
                    self.complete_read(self.frame.read(offset, width));
                    return Ok(None);
                }
                Ok(Some(Exit::MmioRead { ipa, width }))
            }
            Raw::Write(ipa, len, value) => {
                self.pending = Pending::Completion;
                let width = self.check_width(ipa, len)?;
                if let Some(offset) = self.frame.offset(ipa) {
                    if let Some(intid) = self.frame.write(offset, width, value) {
                        gic::set_line(&self.vm.fd, intid, true)?;
                    }
                    return Ok(None);
                }
                Ok(Some(Exit::MmioWrite { ipa, width, value }))
            }
            Raw::Undecoded => {
                // SAFETY: this member of the union belongs to KVM_EXIT_ARM_NISV, which came just now; it is plain data.
                let nisv = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.arm_nisv };
                let pc = self.register(Register::Pc)?;
                // ESR_EL2.ISS is bits 24:0 (Arm DDI 0487, D19.2.39).
                let syndrome = (nisv.esr_iss & 0x1ff_ffff) as u32;
                Ok(Some(Exit::Undecoded { ipa: nisv.fault_ipa, pc, syndrome }))
            }
            Raw::Event(KVM_SYSTEM_EVENT_SHUTDOWN) => Ok(Some(Exit::SystemOff)),
            Raw::Event(KVM_SYSTEM_EVENT_RESET) => Ok(Some(Exit::SystemReset)),
            Raw::Event(KVM_SYSTEM_EVENT_CRASH) => self.fail("KVM reports that the guest crashed".into()),
            Raw::Event(kind) => self.fail(format!("KVM reports an unknown system event, type {kind}")),
            Raw::Failed(why) => self.fail(why),
        }
    }

    /// Lets KVM finish the last access, then puts right what it leaves wrong.
    fn finish_corrected(&mut self, rt: u8, value: u64) -> Result<()> {
        self.binding.set_immediate_exit(true);
        let Raw::Interrupted = self.enter()? else {
            return self.fail("the guest ran, although only an access was to be finished".into());
        };
        self.pending = Pending::Nothing;
        self.set_register(Register::X(rt), value)
    }

    fn check_width(&self, ipa: u64, len: usize) -> Result<u8> {
        match len {
            1 | 2 | 4 | 8 => Ok(len as u8),
            _ => self.fail(format!("an access of {len} bytes at guest address {ipa:#x}")),
        }
    }
}

impl Vcpu for KvmVcpu {
    fn kicker(&self) -> Arc<dyn Kick> {
        self.binding.kicker.clone()
    }

    fn set_boot_state(&mut self, pc: u64, x0: u64) -> Result<()> {
        for n in 1..=3 {
            self.set_register(Register::X(n), 0)?;
        }
        self.set_register(Register::X(0), x0)?;
        self.set_register(Register::Pc, pc)?;
        self.set_register(Register::Cpsr, BOOT_PSTATE)
    }

    fn run(&mut self) -> Result<Exit> {
        assert!(!matches!(self.pending, Pending::Answer(_)), "run() before complete_read()");
        if let Some((rt, value)) = self.correction.take() {
            self.finish_corrected(rt, value)?;
        }
        loop {
            // This order is what keeps a kick from getting lost; see `kick`.
            self.binding.set_immediate_exit(false);
            if self.binding.kicker.is_pending() {
                if self.pending == Pending::Nothing {
                    self.binding.kicker.take();
                    return Ok(Exit::Kicked);
                }
                // Let KVM finish the last access first, so that whoever kicked finds true registers.
                self.binding.set_immediate_exit(true);
            }
            let raw = self.enter()?;
            self.pending = Pending::Nothing;
            if let Some(exit) = self.serve(raw)? {
                return Ok(exit);
            }
        }
    }

    fn complete_read(&mut self, value: u64) {
        let Pending::Answer(len) = self.pending else { panic!("complete_read() without a read") };
        // Only a value with its sign bit set is extended in another way than with zeros.
        if len < 8 && value >> (8 * len - 1) & 1 == 1 {
            let load =
                self.last_fetch.signed_load(&self.fd, &self.vm, len as u8).filter(|load| load.rt != XZR);
            self.correction = load.map(|load| (load.rt, load.extend(value)));
        }
        // SAFETY: the last exit was KVM_EXIT_MMIO, to which this member of the union belongs; every bit pattern is valid.
        let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        // KVM takes the bytes as they would be in memory.
        mmio.data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
        self.pending = Pending::Completion;
    }

    fn inject_data_abort(&mut self) -> Result<()> {
        let mut events = kvm_vcpu_events::default();
        events.exception.ext_dabt_pending = 1;
        self.fd
            .set_vcpu_events(&events)
            .map_err(failed(format!("KVM_SET_VCPU_EVENTS, data abort for vCPU {}", self.index)))?;
        // The abort takes the place of an answer.
        self.pending = Pending::Completion;
        Ok(())
    }

    fn register(&self, register: Register) -> Result<u64> {
        let id = regs::id(register).ok_or_else(|| unsupported(format!("register {register:?}")))?;
        regs::get(&self.fd, id)
    }

    fn set_register(&mut self, register: Register, value: u64) -> Result<()> {
        let id = regs::id(register).ok_or_else(|| unsupported(format!("register {register:?}")))?;
        regs::set(&self.fd, id, value)
    }
}
