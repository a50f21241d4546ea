//! The Rust half of the guest's kernel module `outboard_dma`.
//!
//! The C half owns the kernel's interfaces, this half the decisions: which windows exist ([`outboard_windows`]), what is asked of the
//! DMA device and in which form ([`exchange`]), what its answers mean. The C half calls the functions of [`ffi`], which `core.h` declares.
//!
//! In the kernel this is a static library for `aarch64-unknown-none-softfloat`; on every other target it is an ordinary library, so that its
//! tests run as programs.
#![cfg_attr(target_os = "none", no_std)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::arithmetic_side_effects
    )
)]

pub mod domain;
pub mod exchange;
pub mod ffi;
mod memory;
pub mod quirks;
pub mod served;
pub mod tracker;

/// Nothing in here panics: `xtask` refuses a library in which this function is still reachable after the linker has dropped what is not
/// used. A kernel must have an answer all the same.
#[cfg(target_os = "none")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the C half defines it; it does not return.
    #[allow(unsafe_code, reason = "calls the C half")]
    unsafe {
        outboard_fatal()
    }
}

#[cfg(target_os = "none")]
#[allow(unsafe_code, reason = "declares a function of the C half")]
unsafe extern "C" {
    fn outboard_fatal() -> !;
}
