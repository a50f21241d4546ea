//! Asks the vCPUs for a second sign of a kernel panic, after the console has shown the first.
//!
//! A Linux kernel that has panicked and stays where it is (kernel/panic.c, `panic=0`) has stopped every CPU but one with
//! interrupts masked for good, and that one waits in a delay loop, in the kernel, with interrupts enabled. No program runs
//! any more. A guest that is alive runs programs (exception level 0), or waits on every CPU with interrupts masked, as an
//! idle arm64 Linux does, between short times of work. So the vCPUs are looked at many times: one must be in the same few
//! instructions of the kernel with interrupts enabled nearly each time and must have run for a while, so that a busy host
//! that lets the guest stand still proves nothing; the others must be masked every time, and none at exception level 0.

use crate::vcpus::CpuState;
use std::time::{Duration, Instant};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(100);
/// Fewest looks at all vCPUs that make a judgement.
const LOOKS: usize = 20;
/// Time that the CPU that panicked must have run during those.
const RUN_TIME: Duration = Duration::from_secs(1);
/// Time until the suspicion is dropped: a slow console may delay the end of a panic, a busy host the guest.
const PATIENCE: Duration = Duration::from_secs(30);
/// Three quarters of the looks find the CPU that panicked in its delay loop: timer interrupts are still taken on it.
const SHARE_WAITING: (usize, usize) = (3, 4);
/// Bytes of code that the delay loop takes at most (Linux arch/arm64/lib/delay.c, `__delay`).
const LOOP_BYTES: u64 = 512;

/// PSTATE.M bits 3:2, the exception level (Arm DDI 0487, C5.2.19 SPSR_EL1).
const PSTATE_EL: u64 = 0b1100;
/// PSTATE.I: interrupts are masked (the same section).
const PSTATE_I: u64 = 1 << 7;

/// A suspicion that is being looked into.
#[derive(Debug, Default)]
pub(crate) struct PanicCheck {
    next_look: Option<Instant>,
    end: Option<Instant>,
    /// Since the last one that found a program.
    looks: Vec<Vec<CpuState>>,
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
        let now = Instant::now();
        *self = Self { next_look: Some(now + INTERVAL), end: Some(now + PATIENCE), looks: Vec::new() };
    }

    /// Time until the next look is due; `None` without a suspicion.
    pub(crate) fn due_in(&self) -> Option<Duration> {
        self.next_look.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Takes note of what all vCPUs were doing at the same time.
    pub(crate) fn look(&mut self, cpus: Vec<CpuState>) -> Verdict {
        let now = Instant::now();
        self.next_look = Some(now + INTERVAL);
        if cpus.iter().any(|cpu| cpu.pstate & PSTATE_EL == 0) {
            self.looks.clear();
        } else {
            self.looks.push(cpus);
        }
        let verdict = match self.end {
            _ if is_panicked(&self.looks) => Verdict::Panicked,
            Some(end) if now < end => Verdict::Open,
            _ => Verdict::Alive,
        };
        if verdict != Verdict::Open {
            *self = Self::default();
        }
        verdict
    }
}

/// True if the last of `looks`, none of which found a program, show a kernel that has panicked.
fn is_panicked(looks: &[Vec<CpuState>]) -> bool {
    let Some(last) = looks.last() else { return false };
    (0..last.len()).any(|cpu| {
        // The shortest time up to now in which this CPU has run for long enough.
        let ran = |from: usize| last[cpu].run_time.saturating_sub(looks[from][cpu].run_time);
        let start = (0..=looks.len().saturating_sub(LOOKS)).rev().find(|from| ran(*from) >= RUN_TIME);
        start.is_some_and(|start| is_waiting(&looks[start..], cpu) && are_stopped(&looks[start..], cpu))
    })
}

/// True if vCPU `cpu` was nearly always in the same few instructions with interrupts enabled.
fn is_waiting(looks: &[Vec<CpuState>], cpu: usize) -> bool {
    let enabled = looks.iter().map(|cpus| cpus[cpu]).filter(|state| state.pstate & PSTATE_I == 0);
    let mut places: Vec<u64> = enabled.map(|state| state.pc).collect();
    places.sort_unstable();
    let (part, whole) = SHARE_WAITING;
    let wanted = looks.len() * part / whole;
    places.windows(wanted.max(1)).any(|near| near[near.len() - 1] - near[0] < LOOP_BYTES)
}

/// True if every vCPU but `cpu` had interrupts masked every time.
fn are_stopped(looks: &[Vec<CpuState>], cpu: usize) -> bool {
    let others = |cpus: &Vec<CpuState>| {
        cpus.iter().enumerate().all(|(index, state)| index == cpu || state.pstate & PSTATE_I != 0)
    };
    looks.iter().all(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IN_PROGRAM: u64 = 0x6000_0000;
    const KERNEL_ENABLED: u64 = 0x6000_0005;
    const KERNEL_MASKED: u64 = 0x6000_03c5;
    /// Looks after which a test takes the guest for alive.
    const MANY: usize = 300;

    /// Whether `state` (of look and vCPU: PSTATE, PC, milliseconds run since the look before) is taken for a panic.
    fn panics(cpus: usize, state: impl Fn(usize, usize) -> (u64, u64, u64)) -> bool {
        let mut check = PanicCheck::default();
        check.suspect();
        let mut ran = vec![Duration::ZERO; cpus];
        (0..MANY).any(|look| {
            let states = (0..cpus).map(|cpu| {
                let (pstate, pc, ms) = state(look, cpu);
                ran[cpu] += Duration::from_millis(ms);
                CpuState { pstate, pc, run_time: ran[cpu] }
            });
            check.look(states.collect()) == Verdict::Panicked
        })
    }

    #[test]
    fn one_waits_and_the_others_are_stopped() {
        assert!(panics(1, |look, _| (KERNEL_ENABLED, 0x1000 + 4 * (look as u64 % 20), 100)));
        let panicked = |look: usize, cpu| match cpu {
            // A timer interrupt now and then.
            2 if look % 7 != 3 => (KERNEL_ENABLED, 0x1000, 100),
            2 => (KERNEL_MASKED, 0x9000, 100),
            _ => (KERNEL_MASKED, 0x5000, 100),
        };
        assert!(panics(4, panicked));
    }

    #[test]
    fn an_idle_guest_is_alive() {
        assert!(!panics(1, |_, _| (KERNEL_MASKED, 0x1000, 0)));
        assert!(!panics(4, |_, _| (KERNEL_MASKED, 0x1000, 0)));
    }

    #[test]
    fn a_guest_whose_programs_run_is_alive() {
        let works = |look: usize, cpu| match cpu {
            0 if look % 10 == 9 => (IN_PROGRAM, 0x40, 100),
            0 => (KERNEL_ENABLED, 0x1000, 100),
            _ => (KERNEL_MASKED, 0x5000, 0),
        };
        assert!(!panics(2, works));
        assert!(!panics(2, |_, _| (KERNEL_ENABLED, 0x1000, 100)), "two CPUs that work in the kernel");
    }

    #[test]
    fn a_kernel_that_works_here_and_there_is_alive() {
        assert!(!panics(1, |look, _| (KERNEL_ENABLED, 0x1000 * look as u64, 100)));
    }

    #[test]
    fn a_guest_that_a_busy_host_lets_stand_still_proves_nothing() {
        assert!(!panics(1, |_, _| (KERNEL_ENABLED, 0x1000, 1)));
        assert!(panics(1, |_, _| (KERNEL_ENABLED, 0x1000, 10)), "though it may take long");
    }

    #[test]
    fn a_panic_whose_end_is_late_is_found() {
        let late = |look, cpu| match cpu {
            0 if look < 50 && look % 5 == 0 => (IN_PROGRAM, 0x40, 100),
            0 if look < 50 => (KERNEL_ENABLED, 0x1000 * look as u64, 100),
            0 => (KERNEL_ENABLED, 0x1000, 100),
            _ => (KERNEL_MASKED, 0x5000, 0),
        };
        assert!(panics(2, late));
    }

    #[test]
    fn without_a_suspicion_nothing_is_due() {
        let mut check = PanicCheck::default();
        assert_eq!(check.due_in(), None);
        check.suspect();
        assert!(check.due_in().is_some());
    }
}
