//! Register names of KVM_GET_ONE_REG (Linux Documentation/virt/kvm/api.rst, 4.68) and access to 64-bit ones.

use super::failed;
use crate::{Register, Result};
use kvm_bindings::{KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U64};
use kvm_ioctls::VcpuFd;

/// MPIDR_EL1: op0 3, op1 0, CRn 0, CRm 0, op2 5.
pub const MPIDR_EL1: u64 = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | (3 << 14) | 5;
/// Aff3 and Aff2 to Aff0 of MPIDR_EL1 (Arm DDI 0487, D19.2.101).
pub const MPIDR_AFFINITY: u64 = 0xff_00ff_ffff;

/// KVM's name of `register`; `None` if the CPU has no such register.
pub fn id(register: Register) -> Option<u64> {
    // Core registers are named by their offset in struct kvm_regs, in 32-bit words. It starts with
    // struct user_pt_regs { u64 regs[31]; u64 sp; u64 pc; u64 pstate; }.
    let word = match register {
        Register::X(n) if n <= 30 => u64::from(n) * 2,
        Register::X(_) => return None,
        Register::Pc => 32 * 2,
        Register::Cpsr => 33 * 2,
    };
    Some(KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | word)
}

/// Reads the 64-bit register `id`.
pub fn get(vcpu: &VcpuFd, id: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    vcpu.get_one_reg(id, &mut bytes).map_err(failed(format!("KVM_GET_ONE_REG {id:#x}")))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Writes the 64-bit register `id`.
pub fn set(vcpu: &VcpuFd, id: u64, value: u64) -> Result<()> {
    vcpu.set_one_reg(id, &value.to_ne_bytes()).map_err(failed(format!("KVM_SET_ONE_REG {id:#x}")))?;
    Ok(())
}
