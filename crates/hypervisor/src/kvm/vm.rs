//! A KVM virtual machine: its memory, doorbells and the order in which its parts come to be.

#![allow(unsafe_code)] // UNSAFETY: KVM_SET_USER_MEMORY_REGION takes a pointer to host memory, which is read here as well.

use super::eventfd::{self, Doorbell};
use super::gic::{self, KvmGic};
use super::vcpu::{self, KvmVcpu};
use super::{NAME, failed, kick, unsupported};
use crate::backend::{Mappings, MsiFrame, Slots, check_gic};
use crate::{Error, GicConfig, InterruptController, MemoryKind, Result, Vcpu, Vm, VmOptions};
use kvm_bindings::{
    KVM_CAP_ARM_INJECT_EXT_DABT, KVM_CAP_ARM_NISV_TO_USER, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// The process's one VM: a Mac has no second, so neither has KVM here.
struct OnlyVm;

static VM_EXISTS: AtomicBool = AtomicBool::new(false);

impl OnlyVm {
    fn claim() -> Result<Self> {
        if VM_EXISTS.swap(true, Ordering::SeqCst) {
            return Err(Error::WrongPhase("this process has a VM already: drop every part of it first"));
        }
        Ok(Self)
    }
}

impl Drop for OnlyVm {
    fn drop(&mut self) {
        VM_EXISTS.store(false, Ordering::SeqCst);
    }
}

/// What every part of a VM keeps alive: when the last of them is dropped, the descriptor closes and the VM is gone.
///
/// Lock order: `vcpus` before `memory`; neither is held while a vCPU runs.
pub struct VmShared {
    pub fd: VmFd,
    options: VmOptions,
    memory: Mutex<Memory>,
    /// Set with the interrupt controller.
    pub frame: OnceLock<MsiFrame>,
    /// vCPUs that no thread has taken yet; empty before the interrupt controller.
    vcpus: Mutex<Vec<Option<VcpuFd>>>,
    /// After `fd`, so that the next VM can only come when this one's descriptor is closed.
    _only: OnlyVm,
}

/// A mapping: its slot at KVM and the host's side of it.
struct Mapping {
    slot: u32,
    host: u64,
    kind: MemoryKind,
}

/// Guest memory.
struct Memory {
    mappings: Mappings<Mapping>,
    slots: Slots,
}

impl VmShared {
    /// The naturally aligned word of guest memory at `ipa`; `None` where no RAM is.
    pub fn read_ram(&self, ipa: u64) -> Option<u32> {
        // Held while the memory is read, so that it cannot be unmapped meanwhile.
        let memory = lock(&self.memory);
        let (mapping, offset) = memory.mappings.find(ipa, 4).filter(|_| ipa.is_multiple_of(4))?;
        if mapping.kind != MemoryKind::Ram {
            return None;
        }
        let word = (mapping.host + offset) as *mut u32;
        // SAFETY: within a mapping whose memory its caller keeps while it is mapped; aligned, as both parts are; atomic,
        // since the guest may write there.
        Some(unsafe { AtomicU32::from_ptr(word) }.load(Ordering::Relaxed))
    }
}

/// The trait's view of a VM.
pub struct KvmVm(Arc<VmShared>);

impl KvmVm {
    /// A VM with `options` that were checked against the capabilities.
    pub fn new(kvm: &kvm_ioctls::Kvm, options: &VmOptions) -> Result<Self> {
        let only = OnlyVm::claim()?;
        let fd = kvm
            .create_vm_with_ipa_size(options.ipa_bits.into())
            .map_err(failed(format!("KVM_CREATE_VM with {} address bits", options.ipa_bits)))?;
        enable_undecoded_exits(&fd)?;
        let memory = Memory {
            mappings: Mappings::new(options.ipa_bits),
            slots: Slots::new(u32::try_from(kvm.get_nr_memslots()).unwrap_or(u32::MAX)),
        };
        Ok(Self(Arc::new(VmShared {
            fd,
            options: options.clone(),
            memory: Mutex::new(memory),
            frame: OnceLock::new(),
            vcpus: Mutex::default(),
            _only: only,
        })))
    }

    fn set_region(&self, slot: u32, ipa: u64, host: u64, len: u64) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: ipa,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: the memory's lifetime is the promise of `Vm::map`'s caller; a length of 0 takes the slot away.
        unsafe { self.0.fd.set_user_memory_region(region) }
            .map_err(failed(format!("KVM_SET_USER_MEMORY_REGION, {len:#x} bytes at guest address {ipa:#x}")))
    }

    fn doorbell(&self, doorbell: &Doorbell, event: BorrowedFd<'_>, bind: bool) -> Result<()> {
        let Doorbell { ipa, width, .. } = *doorbell;
        if !matches!(width, 2 | 4) {
            return Err(unsupported(format!("a doorbell of {width} bytes at {ipa:#x}: it takes 2 or 4")));
        }
        eventfd::ioeventfd(&self.0.fd, doorbell, event, bind).map_err(|source| {
            if !bind && source.raw_os_error() == Some(libc::ENOENT) {
                return Error::NotMapped { ipa, len: width.into() };
            }
            Error::Host { call: format!("KVM_IOEVENTFD for {width} bytes at guest address {ipa:#x}"), source }
        })
    }
}

/// Asks for KVM_EXIT_ARM_NISV, without which an access that the CPU does not describe ends the VM, and makes sure that
/// it can be answered (Linux Documentation/virt/kvm/api.rst, 8.22 and KVM_SET_VCPU_EVENTS).
fn enable_undecoded_exits(vm: &VmFd) -> Result<()> {
    let cap = kvm_enable_cap { cap: KVM_CAP_ARM_NISV_TO_USER, ..Default::default() };
    vm.enable_cap(&cap).map_err(failed("enabling KVM_CAP_ARM_NISV_TO_USER (Linux 5.5)"))?;
    if vm.check_extension_raw(KVM_CAP_ARM_INJECT_EXT_DABT.into()) <= 0 {
        return Err(unsupported("KVM_CAP_ARM_INJECT_EXT_DABT (Linux 5.5)".into()));
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic under these locks is a bug of ours that already ends the VM; the data is still whole.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Vm for KvmVm {
    // KVM decides about execute permission itself: never on memory that the host maps as a device's (a VFIO BAR), always
    // on ordinary memory. No flag of a slot says otherwise, so KVM is not told of `kind`; the capability
    // `enforces_device_no_execute` is false for that reason.
    unsafe fn map(&self, ipa: u64, host: NonNull<u8>, len: u64, kind: MemoryKind) -> Result<()> {
        let host = host.as_ptr() as u64;
        let mut memory = lock(&self.0.memory);
        memory.mappings.check(ipa, host, len)?;
        let slot = memory
            .slots
            .take()
            .ok_or_else(|| unsupported("another mapping: all its slots are in use".into()))?;
        if let Err(error) = self.set_region(slot, ipa, host, len) {
            memory.slots.give_back(slot);
            return Err(error);
        }
        memory.mappings.insert(ipa, len, Mapping { slot, host, kind });
        Ok(())
    }

    fn unmap(&self, ipa: u64, len: u64) -> Result<()> {
        let mut memory = lock(&self.0.memory);
        let slot = memory.mappings.exact(ipa, len)?.slot;
        // Returns when the stage-2 entries and every CPU's TLB entries for them are gone.
        self.set_region(slot, ipa, 0, 0)?;
        memory.mappings.remove(ipa);
        memory.slots.give_back(slot);
        Ok(())
    }

    // KVM wants its GIC initialized after the last vCPU was made; the traits want the controller before the first. So
    // all vCPUs are made here, and `bind_vcpu` only hands each to its thread. (KVM lets a vCPU move between threads.)
    fn create_interrupt_controller(&self, config: &GicConfig) -> Result<Arc<dyn InterruptController>> {
        let vm = &self.0;
        let mut vcpus = lock(&vm.vcpus);
        if !vcpus.is_empty() {
            return Err(Error::WrongPhase("the VM has its interrupt controller already"));
        }
        let count = vm.options.vcpus;
        let frames = check_gic(NAME, config, count)?;
        lock(&vm.memory).mappings.reserve(&frames)?;
        *vcpus = (0..count).map(|index| vcpu::create(&vm.fd, index).map(Some)).collect::<Result<_>>()?;
        gic::create(&vm.fd, config, count)?;
        let set = vm.frame.set(MsiFrame::new(config));
        assert!(set.is_ok(), "only set here, under the lock of `vcpus`");
        Ok(Arc::new(KvmGic { vm: Arc::clone(vm), config: config.clone() }))
    }

    fn bind_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let vm = &self.0;
        let count = vm.options.vcpus;
        if index >= count {
            return Err(unsupported(format!("vCPU {index} of a VM with {count}")));
        }
        let frame = vm.frame.get().ok_or(Error::WrongPhase("a vCPU needs the interrupt controller first"))?;
        let mut vcpus = lock(&vm.vcpus);
        let slot = &mut vcpus[index as usize];
        if slot.is_none() {
            return Err(Error::WrongPhase("this vCPU is bound to a thread already, for good"));
        }
        kick::set_priority(index, vm.options.vcpu.priority)?;
        let mut vcpu = KvmVcpu::bind(slot, index, frame.clone(), Arc::clone(vm))?;
        // With `vcpus` locked: one after the other.
        vcpu.prepare()?;
        Ok(Box::new(vcpu))
    }

    fn bind_doorbell(&self, ipa: u64, width: u8, value: Option<u32>, event: BorrowedFd<'_>) -> Result<()> {
        self.doorbell(&Doorbell { ipa, width, value }, event, true)
    }

    fn unbind_doorbell(&self, ipa: u64, width: u8, value: Option<u32>, event: BorrowedFd<'_>) -> Result<()> {
        self.doorbell(&Doorbell { ipa, width, value }, event, false)
    }
}
