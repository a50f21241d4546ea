//! What a run of the lab reports: to people while it runs, to machines at its end.

use crate::progress;
use anyhow::{Context, Result};
use lab_cases::protocol::Outcome;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::path::Path;
use std::time::Duration;

/// The report for machines: `docs/lab.md` explains its keys.
#[derive(Default, Serialize)]
pub struct Report {
    /// Whether everything that was asked for succeeded.
    pub ok: bool,
    /// What was done, in order.
    pub phases: Vec<Phase>,
    /// The guest of the demonstration, if one ran.
    pub guest: serde_json::Value,
    /// The PCI device passed through, if a case did that.
    pub device: serde_json::Value,
    /// What the demonstration found.
    pub facts: BTreeMap<String, serde_json::Value>,
    /// Cases that ran.
    pub cases: Vec<CaseResult>,
    /// Measurements of a benchmark; `cargo xtask bench` has its own report.
    #[serde(skip)]
    pub samples: Vec<super::Sample>,
    /// What failed, if not a case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A phase and its duration.
#[derive(Debug, Serialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// Milliseconds.
    pub ms: u64,
}

/// How a case, or a part of one, ended.
#[derive(Debug, Serialize)]
pub struct CaseResult {
    /// `CASE` or `CASE/PART`.
    pub name: String,
    /// `passed`, `failed` or `skipped`, with the reason.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Whether it counts by itself: not if its parts do.
    #[serde(skip)]
    pub counts: bool,
    /// Milliseconds; parts have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms: Option<u64>,
}

/// Passed, failed, skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Number that passed.
    pub passed: u32,
    /// Number that failed.
    pub failed: u32,
    /// Number that were skipped.
    pub skipped: u32,
}

impl Counts {
    /// Counts one more.
    pub fn add(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl Report {
    /// Counts of the parts, and of the cases that have none.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.cases.iter().filter(|case| case.counts).for_each(|case| counts.add(&case.outcome));
        counts
    }

    /// Writes it as JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Streams phases, and keeps how long they took.
pub struct Progress {
    phases: Vec<Phase>,
}

impl Progress {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { phases: Vec::new() }
    }

    /// A phase begins (and the one before is over).
    pub fn begin(&mut self, name: &str) {
        self.end();
        progress::begin(name);
    }

    /// The running phase is over.
    pub fn end(&mut self) {
        if let Some((name, took)) = progress::end() {
            self.done(&name, u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
        }
    }

    /// The running phase is over and was only the sum of others, or failed: it is not reported. Its name.
    pub fn forget(&mut self) -> Option<String> {
        progress::end().map(|(name, _)| name)
    }

    /// A phase that someone else has timed.
    pub fn done(&mut self, name: &str, ms: u64) {
        progress::say(&format!("  {:<28} {:>8.1} s", name, Duration::from_millis(ms).as_secs_f64()));
        self.phases.push(Phase { name: name.to_owned(), ms });
    }

    /// All phases that ended.
    pub fn take(&mut self) -> Vec<Phase> {
        self.end();
        std::mem::take(&mut self.phases)
    }
}
