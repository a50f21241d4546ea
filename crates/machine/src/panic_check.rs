//! Asks the vCPUs for a second sign of a kernel panic, after the console has shown the first.
//!
//! A Linux kernel that has panicked and stays where it is (kernel/panic.c, `panic=0`) has stopped every CPU but one with
//! interrupts masked for good, and that one waits in a loop, in the kernel, with interrupts enabled. No program runs any
//! more. A guest that is alive runs programs (exception level 0), or waits on every CPU with interrupts masked, as an idle
//! arm64 Linux does, between short times of work. So the vCPUs are looked at several times in a few seconds: one must be
//! in the kernel with interrupts enabled nearly each time, the others masked every time, and none at exception level 0.

use crate::vcpus::CpuState;
use std::time::{Duration, Instant};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(100);
/// Looks at all vCPUs that make one judgement.
const LOOKS: usize = 20;
/// Looks out of [`LOOKS`] at which the CPU that panicked has interrupts enabled: timer interrupts are still taken on it.
const ENABLED_LOOKS: usize = 15;
/// Judgements before the suspicion is dropped: a slow console may delay the end of a panic.
const JUDGEMENTS: u32 = 3;

/// PSTATE.M bits 3:2, the exception level (Arm DDI 0487, C5.2.19 SPSR_EL1).
const PSTATE_EL: u64 = 0b1100;
/// PSTATE.I: interrupts are masked (the same section).
const PSTATE_I: u64 = 1 << 7;

/// A suspicion that is being looked into.
#[derive(Debug, Default)]
pub(crate) struct PanicCheck {
    next_look: Option<Instant>,
    looks: Vec<Vec<CpuState>>,
    judgements: u32,
}

/// The result of one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Not known yet.
    Open,
    /// The guest's kernel has panicked.
    Panicked,
    /// The guest runs on; whatever its console showed was no panic.
    Alive,
}

impl PanicCheck {
    /// The console has shown a panic's last line.
    pub(crate) fn suspect(&mut self) {
        *self = Self { next_look: Some(Instant::now() + INTERVAL), ..Self::default() };
    }

    /// Time until the next look is due; `None` without a suspicion.
    pub(crate) fn due_in(&self) -> Option<Duration> {
        self.next_look.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Takes note of what all vCPUs were doing at the same time.
    pub(crate) fn look(&mut self, cpus: Vec<CpuState>) -> Verdict {
        self.next_look = Some(Instant::now() + INTERVAL);
        self.looks.push(cpus);
        if self.looks.len() < LOOKS {
            return Verdict::Open;
        }
        let looks = std::mem::take(&mut self.looks);
        if is_panicked(&looks) {
            self.next_look = None;
            return Verdict::Panicked;
        }
        self.judgements += 1;
        if self.judgements < JUDGEMENTS {
            return Verdict::Open;
        }
        self.next_look = None;
        Verdict::Alive
    }
}

/// True if `looks` at all vCPUs show a kernel that has panicked.
fn is_panicked(looks: &[Vec<CpuState>]) -> bool {
    let at_el0 = |cpu: &CpuState| cpu.pstate & PSTATE_EL == 0;
    if looks.is_empty() || looks.iter().flatten().any(at_el0) {
        return false;
    }
    let enabled: Vec<usize> = (0..looks[0].len()).map(|cpu| enabled_looks(looks, cpu)).collect();
    let waiting = enabled.iter().filter(|count| **count >= ENABLED_LOOKS).count();
    let stopped = enabled.iter().filter(|count| **count == 0).count();
    waiting == 1 && stopped == enabled.len() - 1
}

/// The number of looks at which vCPU `cpu` had interrupts enabled.
fn enabled_looks(looks: &[Vec<CpuState>], cpu: usize) -> usize {
    looks.iter().filter(|cpus| cpus.get(cpu).is_some_and(|state| state.pstate & PSTATE_I == 0)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const IN_PROGRAM: u64 = 0x6000_0000;
    const KERNEL_ENABLED: u64 = 0x6000_0005;
    const KERNEL_MASKED: u64 = 0x6000_03c5;

    /// The verdict on vCPUs of which `pstate` tells the state at each look.
    fn verdict(cpus: usize, pstate: impl Fn(usize, usize) -> u64) -> Verdict {
        let mut check = PanicCheck::default();
        check.suspect();
        for look in 0.. {
            let states = (0..cpus).map(|cpu| CpuState { pstate: pstate(look, cpu) }).collect();
            match check.look(states) {
                Verdict::Open => assert!(look < LOOKS * JUDGEMENTS as usize),
                verdict => return verdict,
            }
        }
        unreachable!("it ends by a verdict")
    }

    #[test]
    fn one_waits_and_the_others_are_stopped() {
        assert_eq!(verdict(1, |_, _| KERNEL_ENABLED), Verdict::Panicked);
        let panicked = |look: usize, cpu| match cpu {
            // A timer interrupt now and then.
            2 if look % 7 != 3 => KERNEL_ENABLED,
            _ => KERNEL_MASKED,
        };
        assert_eq!(verdict(4, panicked), Verdict::Panicked);
    }

    #[test]
    fn an_idle_guest_is_alive() {
        assert_eq!(verdict(1, |_, _| KERNEL_MASKED), Verdict::Alive);
        assert_eq!(verdict(4, |_, _| KERNEL_MASKED), Verdict::Alive);
    }

    #[test]
    fn a_guest_whose_programs_run_is_alive() {
        let works = |look: usize, cpu| match cpu {
            0 if look % 10 == 9 => IN_PROGRAM,
            0 => KERNEL_ENABLED,
            _ => KERNEL_MASKED,
        };
        assert_eq!(verdict(2, works), Verdict::Alive);
        assert_eq!(verdict(2, |_, _| KERNEL_ENABLED), Verdict::Alive, "two CPUs that work in the kernel");
    }

    #[test]
    fn a_panic_whose_end_is_late_is_found() {
        let late = |look, cpu| {
            if look < LOOKS && cpu == 0 {
                IN_PROGRAM
            } else if cpu == 0 {
                KERNEL_ENABLED
            } else {
                KERNEL_MASKED
            }
        };
        assert_eq!(verdict(2, late), Verdict::Panicked);
    }

    #[test]
    fn without_a_suspicion_nothing_is_due() {
        let mut check = PanicCheck::default();
        assert_eq!(check.due_in(), None);
        check.suspect();
        assert!(check.due_in().is_some());
    }
}
