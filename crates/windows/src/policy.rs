//! How large a new window may be, and what may be mapped ahead of need.
//!
//! The larger answer of two rules gives the size:
//!
//! 1. **Balance.** Free bytes divided by free entries is the mean window at which both budgets run out together. Windows
//!    up to two thirds of it are always allowed: they leave bytes for large requests to come. With a Mac's limits that is
//!    16 KiB at first and grows as entries run short; with few entries and many bytes it is large from the start. When
//!    entries are nearly gone and bytes are not, the whole mean is allowed.
//! 2. **Generosity.** Larger windows save exits but may keep bytes mapped that nobody asked for (*slack*), and slack
//!    under a live reference cannot be taken back. So slack may reach a tenth of the byte budget and no more, which
//!    bounds the price: nine tenths are there for what the driver asks for. One window takes at most 1/64 of what is left
//!    of the tenth, so sizes shrink smoothly.
//!
//! Where windows are small, what lies around a new one is mapped **ahead** in the same exchange, as windows of their own.
//! They save exits as a large window would, but are idle, so they are evicted when room is needed. They take space in the
//! order in which the host places things, though, so they too have a share that they may not exceed.

use crate::GRANULE;

/// What the host lets one device have mapped at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes, counted in whole granules.
    pub bytes: u64,
    /// Mappings.
    pub entries: u32,
}

/// The constants of the policy; [`Policy::default`] is what ships, others exist to show that it is on no knife's edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Slack may reach this many thousandths of the byte limit.
    pub slack_per_mille: u32,
    /// Bytes mapped ahead of need and not used yet may reach this many thousandths of the byte limit.
    pub ahead_per_mille: u32,
    /// A generous window takes at most one part in this many of the slack still allowed.
    pub slack_parts: u32,
    /// A balanced window is at most this many per cent of free bytes per free entry.
    pub balance_percent: u32,
    /// Largest generous window, bytes, a power of two: the published scheme's 256 KiB, in which the clusters of real
    /// drivers were seen (dart-and-dma 3.1).
    pub generous_max: u64,
    /// Largest window of all that is not asked for in one piece, bytes, a power of two. Bounds what one miss costs.
    pub largest: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            slack_per_mille: 100,
            ahead_per_mille: 90,
            slack_parts: 64,
            balance_percent: 66,
            generous_max: 256 << 10,
            largest: 4 << 20,
        }
    }
}

/// Whether three quarters of the entries are in use, and bytes are an eighth of their limit behind: caution with bytes
/// would then only waste them.
fn short_of_entries(limits: Limits, bytes: u64, entries: u32) -> bool {
    // In 1/1024 of each limit.
    let share = |used: u64, limit: u64| used.saturating_mul(1024).checked_div(limit).unwrap_or(1024);
    let entries = share(u64::from(entries), u64::from(limits.entries));
    entries >= 768 && entries.saturating_sub(share(bytes, limits.bytes)) >= 128
}

impl Policy {
    /// Bytes of slack allowed under `limits`.
    pub(crate) fn slack_allowed(&self, limits: Limits) -> u64 {
        (limits.bytes / 1000).saturating_mul(u64::from(self.slack_per_mille))
    }

    /// Bytes that may be mapped ahead of need and unused under `limits`.
    pub(crate) fn ahead_allowed(&self, limits: Limits) -> u64 {
        (limits.bytes / 1000).saturating_mul(u64::from(self.ahead_per_mille))
    }

    /// Size of the aligned block that a new window may fill, a power of two of at least a granule, where `bytes` and
    /// `entries` are pinned by references and `slack` bytes of them are not asked for.
    pub(crate) fn window_size(&self, limits: Limits, bytes: u64, entries: u32, slack: u64) -> u64 {
        let free_bytes = limits.bytes.saturating_sub(bytes);
        let free_entries = u64::from(limits.entries.saturating_sub(entries)).max(1);
        let mean = free_bytes.checked_div(free_entries).unwrap_or(0);
        let percent = if short_of_entries(limits, bytes, entries) { 100 } else { self.balance_percent };
        let balanced = (mean / 100).saturating_mul(u64::from(percent)).min(self.largest);
        let slack_left = self.slack_allowed(limits).saturating_sub(slack);
        let parts = u64::from(self.slack_parts.max(1));
        let generous = slack_left.checked_div(parts).unwrap_or(0).min(self.generous_max);
        let size = balanced.max(generous).max(GRANULE);
        1 << (u64::BITS.saturating_sub(1).saturating_sub(size.leading_zeros()))
    }
}
