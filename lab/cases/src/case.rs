//! What a case is, and the table of all of them.

use crate::guest::Guest;
use crate::host::{Host, Kernel};
use anyhow::Result;

/// A case's host half: runs in the emulated host, starts guests, checks what can be seen from outside.
/// `Ok(Some(reason))` skips the case.
pub type HostHalf = fn(&Host) -> Result<Option<String>>;
/// A case's guest half: runs as the guest's init. When it returns, the guest reports the result and switches itself off.
pub type GuestHalf = fn(&mut Guest) -> Result<()>;

/// The emulated host's kernel where nothing else is needed: guests start twice as fast on it.
///
/// On 6.12 they take 12.8 s instead of 6.0 s from the monitor's start to init: from 6.3 on KVM traps a guest's reads of CTR_EL0 on CPUs without
/// FEAT_EVT, which QEMU 7.2 does not emulate.
pub const HOST: Kernel = Kernel::V6_1;
/// For what looks at the host's own DMA, with what 6.1 does not have: a count of IOMMU page tables (6.11), `dma:*` events (6.12).
pub const HOST_OF_DMA: Kernel = Kernel::V6_12;

/// One end-to-end check, both halves in one place.
pub struct Case {
    /// Unique, lower-case with hyphens.
    pub name: &'static str,
    /// One line for `--list`.
    pub about: &'static str,
    /// Seconds after which it has failed.
    pub limit_s: u64,
    /// When it is run.
    pub group: Group,
    /// The kernel of the emulated host: [`HOST`] or [`HOST_OF_DMA`].
    pub host_kernel: Kernel,
    /// The half in the emulated host.
    pub host: HostHalf,
    /// The half in the guest.
    pub guest: GuestHalf,
}

/// When a case is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// With `cargo xtask lab --cases` and `cargo xtask test`.
    Test,
    /// Only by name: the demonstration, the shell, the benchmarks.
    Tool,
}

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    crate::cases::table()
}

/// The case called `name`.
pub fn find(name: &str) -> Option<Case> {
    all().into_iter().find(|case| case.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_fit_a_command_line() {
        let mut seen = HashSet::new();
        for case in all() {
            assert!(seen.insert(case.name), "{} is there twice", case.name);
            assert!(
                case.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c)),
                "{} does not fit a kernel command line",
                case.name
            );
        }
    }
}
