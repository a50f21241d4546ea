/// Why [`crate::Vcpu::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest loads from an address where nothing is mapped: answer with [`crate::Vcpu::complete_read`].
    MmioRead {
        /// Guest-physical address.
        ipa: u64,
        /// Width in bytes: 1, 2, 4 or 8.
        width: u8,
    },
    /// The guest stores to an address where nothing is mapped.
    MmioWrite {
        /// Guest-physical address.
        ipa: u64,
        /// Width in bytes: 1, 2, 4 or 8.
        width: u8,
        /// The value, upper bits zero.
        value: u64,
    },
    /// An access to unmapped memory that the CPU does not describe (ESR_EL2.ISV = 0: pairs, writeback, SIMD,
    /// exclusives, atomics, DC ZVA). The machine names it in its log and calls [`crate::Vcpu::inject_data_abort`].
    Undecoded {
        /// Guest-physical address.
        ipa: u64,
        /// Guest-virtual address of the instruction.
        pc: u64,
        /// The instruction-specific syndrome, ESR_EL2 bits 24:0.
        syndrome: u32,
    },
    /// PSCI SYSTEM_OFF.
    SystemOff,
    /// PSCI SYSTEM_RESET or SYSTEM_RESET2.
    SystemReset,
    /// [`crate::Kick::kick`] was called.
    Kicked,
}
