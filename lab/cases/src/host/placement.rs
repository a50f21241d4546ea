//! Where a monitor and the interrupts of its guest's devices run.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::fs;

/// The CPU on which all of it runs.
const CPU: usize = 1;
/// Mask of CPUs, in hexadecimal, that interrupts get when they are requested (Linux, Documentation/core-api/irq/irq-affinity.rst).
const NEW_INTERRUPTS: &str = "/proc/irq/default_smp_affinity";

/// As long as it lives, processes that this thread starts run on one CPU, and interrupts requested meanwhile arrive there.
///
/// An interrupt that arrives on the CPU on which the vCPU runs costs no second interrupt to that CPU. Which one it is, is luck otherwise: the
/// interrupt controller's driver takes the one with the fewest interrupts, the scheduler the one that is free.
pub struct OneCpu {
    before: CpuSet,
    interrupts: String,
}

impl OneCpu {
    /// From now on.
    pub fn new() -> Result<Self> {
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).context("cannot read this thread's CPUs")?;
        let interrupts =
            fs::read_to_string(NEW_INTERRUPTS).with_context(|| format!("cannot read {NEW_INTERRUPTS}"))?;
        let guard = Self { before, interrupts };
        let mut one = CpuSet::new();
        one.set(CPU)?;
        sched_setaffinity(this, &one).context("cannot choose this thread's CPU")?;
        fs::write(NEW_INTERRUPTS, format!("{:x}", 1 << CPU))
            .with_context(|| format!("cannot write {NEW_INTERRUPTS}"))?;
        Ok(guard)
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        // Only the speed of what follows depends on it.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.before);
        let _ = fs::write(NEW_INTERRUPTS, self.interrupts.trim());
    }
}
