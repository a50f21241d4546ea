//! KVM's doorbells and interrupts by eventfd: the two ioctls as the traits need them.
//!
//! `kvm-ioctls` has wrappers, but theirs cannot match any value of one width.

#![allow(unsafe_code)] // UNSAFETY: ioctl(2) on the VM's descriptor.

use kvm_bindings::{
    KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_irqfd,
};
use kvm_ioctls::VmFd;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `_IOW(KVMIO, 0x76, struct kvm_irqfd)` and `_IOW(KVMIO, 0x79, struct kvm_ioeventfd)` (Linux include/uapi/linux/kvm.h).
const KVM_IRQFD: u64 = iow::<kvm_irqfd>(0x76);
const KVM_IOEVENTFD: u64 = iow::<kvm_ioeventfd>(0x79);

/// An ioctl number: direction write in bits 31:30, size in 29:16, KVM's type 0xae, number (asm-generic/ioctl.h).
const fn iow<T>(number: u64) -> u64 {
    1 << 30 | (size_of::<T>() as u64) << 16 | 0xae << 8 | number
}

/// What a doorbell listens to.
pub struct Doorbell {
    pub ipa: u64,
    pub width: u8,
    pub value: Option<u32>,
}

/// Binds (or with `false` unbinds) `event` to the guest's stores that match `doorbell`.
pub fn ioeventfd(vm: &VmFd, doorbell: &Doorbell, event: BorrowedFd<'_>, bind: bool) -> io::Result<()> {
    let mut flags = 0;
    if doorbell.value.is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    if !bind {
        flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
    }
    let request = kvm_ioeventfd {
        datamatch: doorbell.value.unwrap_or(0).into(),
        addr: doorbell.ipa,
        len: doorbell.width.into(),
        fd: event.as_raw_fd(),
        flags,
        ..Default::default()
    };
    call(vm, KVM_IOEVENTFD, &request)
}

/// Binds (or with `false` unbinds) `event` to interrupt `gsi` of the VM. With `resample` the interrupt is level-triggered: a signal asserts
/// it until the guest's end of interrupt, which releases it and signals `resample`.
pub fn irqfd(
    vm: &VmFd,
    gsi: u32,
    event: BorrowedFd<'_>,
    resample: Option<BorrowedFd<'_>>,
    bind: bool,
) -> io::Result<()> {
    let mut request = kvm_irqfd { fd: event.as_raw_fd() as u32, gsi, ..Default::default() };
    if !bind {
        request.flags |= KVM_IRQFD_FLAG_DEASSIGN;
    } else if let Some(resample) = resample {
        request.flags |= KVM_IRQFD_FLAG_RESAMPLE;
        request.resamplefd = resample.as_raw_fd() as u32;
    }
    call(vm, KVM_IRQFD, &request)
}

fn call<T>(vm: &VmFd, number: u64, argument: &T) -> io::Result<()> {
    // SAFETY: both requests read one structure, whose size is part of the number, and keep no pointer to it. They take
    // a reference of their own to the eventfd.
    let result = unsafe { libc::ioctl(vm.as_raw_fd(), number as _, std::ptr::from_ref(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
