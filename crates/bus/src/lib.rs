//! MMIO dispatch and the small types every device model shares.
//!
//! Devices implement [`MmioDevice`] and *report* accesses they cannot serve; [`MmioBus`] *answers*: a read nobody
//! serves gives all-ones, a write is dropped, both are counted and logged at a bounded rate.

mod event;
mod interrupt;
mod mmio;
mod ratelimit;
mod width;

pub use event::{Event, poll_readable, poll_writable};
pub use interrupt::{IrqLine, MsiMessage, MsiSink};
pub use mmio::{AccessError, BusStats, MapError, MmioBus, MmioDevice};
pub use ratelimit::RateLimit;
pub use width::Width;

#[doc(hidden)]
pub mod __private {
    /// Body of [`crate::error_limited`].
    pub fn error_with_count(swallowed: u64, message: std::fmt::Arguments<'_>) {
        if swallowed == 0 {
            tracing::error!("{message}");
        } else {
            tracing::error!("{message} ({swallowed} similar messages were dropped)");
        }
    }

    /// Body of [`crate::warn_limited`]: keeps the macro's expansion small.
    pub fn warn_with_count(swallowed: u64, message: std::fmt::Arguments<'_>) {
        if swallowed == 0 {
            tracing::warn!("{message}");
        } else {
            tracing::warn!("{message} ({swallowed} similar messages were dropped)");
        }
    }
}
