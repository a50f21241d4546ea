//! Register names of KVM_GET_ONE_REG (Linux Documentation/virt/kvm/api.rst, 4.68) and access to 64-bit ones.

use super::failed;
use crate::backend::Stage1;
use crate::{Register, Result};
use kvm_bindings::{KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U64};
use kvm_ioctls::VcpuFd;

/// KVM's name of the system register with op0 3 and op1 0.
const fn el1(crn: u64, crm: u64, op2: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | 3 << 14 | crn << 7 | crm << 3 | op2
}

/// MPIDR_EL1.
pub const MPIDR_EL1: u64 = el1(0, 0, 5);
const SCTLR_EL1: u64 = el1(1, 0, 0);
const TTBR0_EL1: u64 = el1(2, 0, 0);
const TTBR1_EL1: u64 = el1(2, 0, 1);
const TCR_EL1: u64 = el1(2, 0, 2);
/// Aff3 and Aff2 to Aff0 of MPIDR_EL1 (Arm DDI 0487, D19.2.101).
pub const MPIDR_AFFINITY: u64 = 0xff_00ff_ffff;

/// The program counter.
pub const PC: u64 = core(32 * 2);

/// KVM's name of the core register at `word`, its offset in struct kvm_regs in 32-bit words. It starts with
/// struct user_pt_regs { u64 regs[31]; u64 sp; u64 pc; u64 pstate; }.
const fn core(word: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | word
}

/// KVM's name of `register`; `None` if the CPU has no such register.
pub fn id(register: Register) -> Option<u64> {
    match register {
        Register::X(n) if n <= 30 => Some(core(u64::from(n) * 2)),
        Register::X(_) => None,
        Register::Pc => Some(PC),
        Register::Cpsr => Some(core(33 * 2)),
    }
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

/// The registers that rule the guest's own page tables.
pub fn stage1(vcpu: &VcpuFd) -> Result<Stage1> {
    Ok(Stage1 {
        sctlr: get(vcpu, SCTLR_EL1)?,
        tcr: get(vcpu, TCR_EL1)?,
        ttbr0: get(vcpu, TTBR0_EL1)?,
        ttbr1: get(vcpu, TTBR1_EL1)?,
    })
}
