//! What Arm's PrimeCell peripherals have in common: identification registers and 32-bit registers at 4-byte steps.

use outboard_bus::{AccessError, Width};

/// First of the identification registers.
const ID_BASE: u64 = 0xfe0;
/// PCellID0 to PCellID3, the same for every PrimeCell (Arm DDI 0183, section 3.3.15).
const PCELL_ID: [u8; 4] = [0x0d, 0xf0, 0x05, 0xb1];

/// The identification register at `offset` of a peripheral with PeriphID0 to 3 `periph`; `None` below them.
pub(crate) fn id_register(offset: u64, periph: [u8; 4]) -> Option<u64> {
    let index = usize::try_from(offset.checked_sub(ID_BASE)? / 4).ok()?;
    let byte = if index < 4 { periph[index] } else { *PCELL_ID.get(index - 4)? };
    Some(byte.into())
}

/// Registers are 32 bits at multiples of 4; drivers also use narrower accesses, which reach the low bits.
pub(crate) fn check(offset: u64, width: Width) -> Result<(), AccessError> {
    if width == Width::B8 || !offset.is_multiple_of(4) { Err(AccessError::BadWidth) } else { Ok(()) }
}
