//! The conformance suite: what any back end must do, checked with small guest programs through the traits alone.
//!
//! The binary `hv-conformance` runs it on this host's back end. A case creates its own VM, runs on a thread of its own
//! and is given up by a watchdog after its time, so that a hang is a failure with a name.

mod asm;
mod cases;
mod crew;
mod events;
mod guest;
mod rig;

use crate::{Capabilities, Hypervisor};
use rig::{Context, Outcome, Stop};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// A named check.
#[derive(Clone, Copy)]
pub struct Case {
    /// Unique name, in words joined by `-`.
    pub name: &'static str,
    run: fn(&Context) -> Outcome,
    limit: Duration,
}

/// Time that a case may take, on an emulated host, too.
const LIMIT: Duration = Duration::from_secs(60);
/// The same for cases that repeat something thousands of times.
const SLOW_LIMIT: Duration = Duration::from_secs(300);
/// Time for a case that was given up to come back.
const GRACE: Duration = Duration::from_secs(10);

const fn case(name: &'static str, run: fn(&Context) -> Outcome) -> Case {
    Case { name, run, limit: LIMIT }
}

const fn slow_case(name: &'static str, run: fn(&Context) -> Outcome) -> Case {
    Case { name, run, limit: SLOW_LIMIT }
}

/// All cases, in order.
pub fn cases() -> Vec<Case> {
    cases::all()
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The back end does it right.
    Passed,
    /// It does not, and why.
    Failed(String),
    /// It could not be tried, and why.
    Skipped(String),
    /// As `Failed`, but the case did not even come back, so nothing else can be run in this process.
    Stuck(String),
}

/// Runs one case on `hypervisor`, and says how it ended and how long it took. `hangs` is called once before a case
/// that hangs is interrupted: the time to look at what it does.
pub fn run(
    case: &Case,
    hypervisor: &Arc<dyn Hypervisor>,
    capabilities: &Capabilities,
    hangs: &dyn Fn(&Case),
) -> (Verdict, Duration) {
    let started = Instant::now();
    let context = Arc::new(Context::new(Arc::clone(hypervisor), capabilities.clone()));
    let (sender, result) = mpsc::channel();
    let (body, its_context) = (case.run, Arc::clone(&context));
    let spawned = std::thread::Builder::new().name(case.name.into()).spawn(move || {
        // Nobody listens any more to a case that comes back too late.
        let _ = sender.send(body(&its_context));
    });
    if let Err(error) = spawned {
        return (Verdict::Failed(format!("starting a thread: {error}")), started.elapsed());
    }
    let verdict = match result.recv_timeout(case.limit) {
        Err(RecvTimeoutError::Timeout) => {
            hangs(case);
            give_up(case, &context, &result)
        }
        ended => verdict(ended.ok()),
    };
    (verdict, started.elapsed())
}

fn give_up(case: &Case, context: &Context, result: &mpsc::Receiver<Outcome>) -> Verdict {
    let deadline = Instant::now() + GRACE;
    while Instant::now() < deadline {
        // Again and again: what hangs may be the kick.
        context.give_up();
        match result.recv_timeout(Duration::from_millis(100)) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Err(Stop::Failed(why))) => return Verdict::Failed(format!("after {:?}: {why}", case.limit)),
            _ => return Verdict::Failed(format!("hung: took more than {:?}", case.limit)),
        }
    }
    Verdict::Stuck(format!("hung: took more than {:?}, and does not answer kicks", case.limit))
}

fn verdict(ended: Option<Outcome>) -> Verdict {
    match ended {
        Some(Ok(())) => Verdict::Passed,
        Some(Err(Stop::Failed(why))) => Verdict::Failed(why),
        Some(Err(Stop::Skipped(why))) => Verdict::Skipped(why),
        None => Verdict::Failed("panicked".into()),
    }
}
