//! Loads that extend a sign.
//!
//! Linux extends the sign of an MMIO read's value and then cuts it to the width of the access again
//! (arch/arm64/kvm/mmio.c, `kvm_handle_mmio_return`; "KVM: arm64: Fix sign-extension of MMIO loads", June 2026, says since
//! commit b30070862edbd of 2014), so LDRSB and its like get a zero-extended value. `kvm_run` does not tell which kind of
//! load it is. So, where it makes a difference, this looks at the instruction. A difference needs a value whose sign bit
//! is set; then it costs one more ioctl, or six when the guest was elsewhere before.

use super::regs;
use super::vm::VmShared;
use crate::Result;
use crate::backend::SignedLoad;
use kvm_ioctls::VcpuFd;

/// Where a vCPU's last instruction with such a value was: virtual and guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastFetch {
    pc: u64,
    ipa: u64,
}

impl LastFetch {
    /// The load at which `vcpu` waits for `width` bytes, if it is one that extends the sign. One that cannot be read
    /// from memory counts as one that does not.
    pub fn signed_load(&mut self, vcpu: &VcpuFd, vm: &VmShared, width: u8) -> Option<SignedLoad> {
        let ipa = match self.locate(vcpu, vm) {
            Ok(ipa) => ipa?,
            Err(error) => {
                tracing::debug!(%error, "cannot look at the guest's instruction");
                return None;
            }
        };
        SignedLoad::decode(vm.read_ram(ipa)?).filter(|load| load.width == width)
    }

    fn locate(&mut self, vcpu: &VcpuFd, vm: &VmShared) -> Result<Option<u64>> {
        let pc = regs::get(vcpu, regs::PC)?;
        // Addresses of the upper half are the kernel's, the same in every process.
        if pc == self.pc && pc >> 55 & 1 == 1 {
            return Ok(Some(self.ipa));
        }
        let read = |ipa| Some(u64::from(vm.read_ram(ipa)?) | u64::from(vm.read_ram(ipa + 4)?) << 32);
        let ipa = regs::stage1(vcpu)?.translate(pc, read);
        *self = ipa.map_or_else(Self::default, |ipa| Self { pc, ipa });
        Ok(ipa)
    }
}
