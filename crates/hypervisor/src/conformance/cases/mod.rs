//! The cases, by subject.

mod access;
mod interrupts;
mod kicks;
mod life;
mod memory;
mod psci;
mod refusals;

use super::Case;

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    [life::CASES, access::CASES, psci::CASES, interrupts::CASES, memory::CASES, kicks::CASES, refusals::CASES]
        .concat()
}
