//! KVM on an arm64 Linux host.
//!
//! Where KVM would allow more than a Mac, the Mac's rule holds here too (16 KiB granule, whole mappings only, the
//! interrupt controller before any vCPU, one VM at a time): what runs here must run there.

mod eventfd;
mod gic;
mod kick;
mod regs;
mod signed;
mod vcpu;
mod vm;

use crate::{Capabilities, Error, GRANULE, Hypervisor, Result, Vm, VmOptions};
use kvm_ioctls::Cap;
use std::io;
use std::sync::Arc;

const NAME: &str = "kvm";
/// The only KVM API version there ever was (Linux Documentation/virt/kvm/api.rst, KVM_GET_API_VERSION).
const API_VERSION: i32 = 12;
/// Smallest guest-physical address width that KVM takes (api.rst, KVM_CREATE_VM on arm64).
const MIN_IPA_BITS: u8 = 32;
/// Width before hosts could choose one (the same place).
const LEGACY_IPA_BITS: u8 = 40;

/// The host's KVM.
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks that it has what Outboard needs.
    ///
    /// # Errors
    /// [`Error::Unavailable`], with what the user can do about it; [`Error::Unsupported`] for a KVM that is too old.
    pub fn open() -> Result<Arc<dyn Hypervisor>> {
        let kvm = kvm_ioctls::Kvm::new().map_err(|e| cannot_open(host_error(e)))?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(unsupported(format!("KVM API version {API_VERSION}: it says {version}")));
        }
        check_page_size()?;
        let needed = [
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT (Linux 4.13)"),
            (Cap::OneReg, "KVM_CAP_ONE_REG"),
            (Cap::ArmPsci02, "KVM_CAP_ARM_PSCI_0_2"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS (Linux 4.19)"),
        ];
        for (cap, name) in needed {
            if !kvm.check_extension(cap) {
                return Err(unsupported(format!("{name}, without which no guest can run")));
            }
        }
        kick::install_handler()?;
        Ok(Arc::new(Self { kvm }))
    }
}

impl Hypervisor for Kvm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let ipa_bits = self.kvm.get_host_ipa_limit();
        Ok(Capabilities {
            max_vcpus: u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            // 0 on hosts that cannot choose (before Linux 4.20).
            max_ipa_bits: u8::try_from(ipa_bits).ok().filter(|bits| *bits != 0).unwrap_or(LEGACY_IPA_BITS),
            // A per-thread mode of Apple's CPUs, which Linux does not offer to KVM guests.
            tso: false,
            kernel_events: self.kvm.check_extension(Cap::Irqfd) && self.kvm.check_extension(Cap::Ioeventfd),
            // KVM takes execute permission away only from what the host itself maps as device memory (a VFIO BAR).
            enforces_device_no_execute: false,
        })
    }

    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>> {
        let caps = self.capabilities()?;
        if options.vcpu.tso {
            return Err(unsupported("the total-store-order memory model (it needs a Mac)".into()));
        }
        if !(1..=caps.max_vcpus).contains(&options.vcpus) {
            return Err(unsupported(format!("{} vCPUs: it takes 1 to {}", options.vcpus, caps.max_vcpus)));
        }
        if !(MIN_IPA_BITS..=caps.max_ipa_bits).contains(&options.ipa_bits) {
            return Err(unsupported(format!(
                "{} bits of guest-physical address: it takes {MIN_IPA_BITS} to {}",
                options.ipa_bits, caps.max_ipa_bits
            )));
        }
        Ok(Arc::new(vm::KvmVm::new(&self.kvm, options)?))
    }
}

/// Guest mappings come in units of 16 KiB; a host whose own pages are larger cannot make them.
fn check_page_size() -> Result<()> {
    #[allow(unsafe_code)] // UNSAFETY: sysconf(3) has no wrapper in std.
    // SAFETY: sysconf takes no pointers.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    match u64::try_from(page) {
        Ok(page) if page <= GRANULE => Ok(()),
        _ => Err(Error::Unavailable {
            why: format!(
                "this host's kernel uses pages of {} KiB, larger than the guest's unit of 16 KiB",
                page / 1024
            ),
            next: "boot a kernel with 4 KiB or 16 KiB pages",
        }),
    }
}

fn cannot_open(error: io::Error) -> Error {
    let (what, next) = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => (
            "/dev/kvm is not there: the host's kernel has no KVM, or was not started at EL2 (a virtual machine needs nested virtualization)",
            "check `dmesg | grep -i kvm`, or run `cargo xtask lab`, which emulates a host that has it",
        ),
        Some(libc::EACCES | libc::EPERM) => (
            "/dev/kvm may not be opened by this user",
            "add the user to the group of /dev/kvm (`sudo usermod -aG kvm $USER`) and log in again",
        ),
        _ => ("/dev/kvm cannot be opened", "check `dmesg | grep -i kvm`"),
    };
    Error::Unavailable { why: format!("{what} ({error})"), next }
}

fn unsupported(what: String) -> Error {
    Error::Unsupported { backend: NAME, what }
}

fn host_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// Wraps the failure of a KVM call, named by `call`.
fn failed(call: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    let call = call.into();
    move |error| Error::Host { call, source: host_error(error) }
}
