//! Accesses to registers, one plain instruction each.
//!
//! A volatile access may become a load or store that also updates its address register, or one of a pair. When such a one traps, the CPU does not say what
//! it wanted (Arm DDI 0487, ESR_ELx.ISV), and a monitor can only refuse it; seen with link-time optimisation. Linux uses assembly for the same reason.
#![allow(unsafe_code)] // UNSAFETY: one instruction each, on an address that the caller vouches for.

#[cfg(target_arch = "aarch64")]
use std::arch::asm;

/// Reads a register of 1, 2, 4 or 8 bytes.
///
/// # Safety
/// `at` is mapped and aligned, and `T` is any bytes of such a size.
pub unsafe fn read<T: Copy>(at: *const T) -> T {
    #[cfg(target_arch = "aarch64")]
    {
        let value: u64;
        // SAFETY: the caller's promise; each touches nothing else.
        unsafe {
            match size_of::<T>() {
                1 => asm!("ldrb {v:w}, [{at}]", v = out(reg) value, at = in(reg) at, options(nostack)),
                2 => asm!("ldrh {v:w}, [{at}]", v = out(reg) value, at = in(reg) at, options(nostack)),
                4 => asm!("ldr {v:w}, [{at}]", v = out(reg) value, at = in(reg) at, options(nostack)),
                8 => asm!("ldr {v}, [{at}]", v = out(reg) value, at = in(reg) at, options(nostack)),
                bytes => panic!("no register has {bytes} bytes"),
            }
            // Little endian: the first bytes are the value.
            std::ptr::from_ref(&value).cast::<T>().read()
        }
    }
    #[cfg(not(target_arch = "aarch64"))]
    {
        assert!(size_of::<T>() <= 8, "no register is that wide");
        // SAFETY: the caller's promise.
        unsafe { at.read_volatile() }
    }
}

/// Writes a register of 1, 2, 4 or 8 bytes.
///
/// # Safety
/// As [`read`].
pub unsafe fn write<T: Copy>(at: *mut T, value: T) {
    #[cfg(target_arch = "aarch64")]
    {
        let mut bytes = 0_u64;
        assert!(size_of::<T>() <= 8, "no register is that wide");
        // SAFETY: `bytes` has room for it; then the caller's promise; each touches nothing else.
        unsafe {
            std::ptr::from_mut(&mut bytes).cast::<T>().write(value);
            match size_of::<T>() {
                1 => asm!("strb {v:w}, [{at}]", v = in(reg) bytes, at = in(reg) at, options(nostack)),
                2 => asm!("strh {v:w}, [{at}]", v = in(reg) bytes, at = in(reg) at, options(nostack)),
                4 => asm!("str {v:w}, [{at}]", v = in(reg) bytes, at = in(reg) at, options(nostack)),
                8 => asm!("str {v}, [{at}]", v = in(reg) bytes, at = in(reg) at, options(nostack)),
                bytes => panic!("no register has {bytes} bytes"),
            }
        }
    }
    #[cfg(not(target_arch = "aarch64"))]
    {
        assert!(size_of::<T>() <= 8, "no register is that wide");
        // SAFETY: the caller's promise.
        unsafe { at.write_volatile(value) }
    }
}
