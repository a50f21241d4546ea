//! Results as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::host::Limits;
use crate::replay::{Policy, Replay};
use crate::trace::{Cut, Gaps};

/// A trace through one policy.
#[derive(Debug, Clone)]
pub struct Row {
    /// Which.
    pub policy: Policy,
    /// What came out.
    pub replay: Replay,
    /// Smallest byte limit under which it runs; none if not asked for, or if it does not run at all.
    pub tightest_bytes: Option<u64>,
    /// The same for entries.
    pub tightest_entries: Option<u32>,
}

/// A trace through all policies.
#[derive(Debug, Clone)]
pub struct Report {
    /// The trace's name.
    pub trace: String,
    /// Under these limits.
    pub limits: Limits,
    /// What the trace is known not to say.
    pub gaps: Gaps,
    /// One for each policy.
    pub rows: Vec<Row>,
}

#[derive(Serialize)]
struct JsonRow {
    peak_entries: u32,
    peak_mapped_bytes: u64,
    peak_live_bytes: u64,
    host_calls: u64,
    host_round_trips: u64,
    fits: bool,
    tightest_bytes: Option<u64>,
    tightest_entries: Option<u32>,
}

#[derive(Serialize)]
struct Json<'r> {
    trace: &'r str,
    lost_events: u64,
    missing_entries: u64,
    caveats: Vec<String>,
    policies: BTreeMap<&'static str, JsonRow>,
}

impl Report {
    /// One JSON object on one line.
    pub fn json(&self) -> Result<String, serde_json::Error> {
        let row = |row: &Row| JsonRow {
            peak_entries: row.replay.peak_entries,
            peak_mapped_bytes: row.replay.peak_mapped_bytes,
            peak_live_bytes: row.replay.peak_live_bytes,
            host_calls: row.replay.host_calls,
            host_round_trips: row.replay.host_round_trips,
            fits: row.replay.failures == 0,
            tightest_bytes: row.tightest_bytes,
            tightest_entries: row.tightest_entries,
        };
        let policies = self.rows.iter().map(|r| (r.policy.name(), row(r))).collect();
        serde_json::to_string(&Json {
            trace: &self.trace,
            lost_events: self.gaps.lost,
            missing_entries: self.gaps.missing,
            caveats: self.caveats(),
            policies,
        })
    }

    /// A table for the terminal.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{} (limits: {} MiB, {} entries)\n  {:<11} {:>8} {:>6} {:>10} {:>6} {:>9} {:>8} {:>8} {:>9}",
            self.trace,
            self.limits.bytes >> 20,
            self.limits.entries,
            "policy",
            "entries",
            "%",
            "mapped MiB",
            "%",
            "live MiB",
            "calls",
            "trips",
            "failures",
        );
        let tightest = self.rows.iter().any(|row| row.tightest_bytes.is_some());
        if tightest {
            let _ = write!(text, " {:>12} {:>8}", "tightest MiB", "entries");
        }
        text.push('\n');
        for row in &self.rows {
            let r = &row.replay;
            let percent = |used: u64, limit: u64| 100.0 * used as f64 / limit as f64;
            let _ = write!(
                text,
                "  {:<11} {:>8} {:>6.1} {:>10.1} {:>6.1} {:>9.1} {:>8} {:>8} {:>9}",
                row.policy.name(),
                r.peak_entries,
                percent(r.peak_entries.into(), self.limits.entries.into()),
                mib(r.peak_mapped_bytes),
                percent(r.peak_mapped_bytes, self.limits.bytes),
                mib(r.peak_live_bytes),
                r.host_calls,
                r.host_round_trips,
                r.failures,
            );
            if tightest {
                let bytes = row.tightest_bytes.map_or("-".to_owned(), |b| format!("{:.1}", mib(b)));
                let entries = row.tightest_entries.map_or("-".to_owned(), |e| e.to_string());
                let _ = write!(text, " {bytes:>12} {entries:>8}");
            }
            text.push_str("  ");
            text.push_str(&verdict(r));
            text.push('\n');
        }
        for caveat in self.caveats() {
            let _ = writeln!(text, "  {caveat}");
        }
        text
    }

    /// What the recording does not say, one sentence each.
    fn caveats(&self) -> Vec<String> {
        let Gaps { lost, lost_at_least, missing, estimated, unmatched, misplaced, cut, unfinished } =
            self.gaps;
        let mut caveats = Vec::new();
        if lost > 0 {
            let least = if lost_at_least { "at least " } else { "" };
            caveats.push(format!(
                "the recording lost {least}{lost} events: these figures are not the whole truth; record again with a larger buffer"
            ));
        }
        if unfinished {
            caveats.push(
                "outboard record did not finish this recording (its last line, with the number of lost events, is missing): these figures may \
                 not be the whole truth"
                    .to_owned(),
            );
        }
        match cut {
            Some(Cut::Counted) => caveats.push(
                "the file's last line has no end: it is counted as it stands, but the recording may have been cut there".to_owned(),
            ),
            Some(Cut::LeftOut) => caveats.push(
                "the file ends within a line, which is left out: the recording was cut there, and what came after it is not counted"
                    .to_owned(),
            ),
            None => {}
        }
        if missing > 0 {
            caveats.push(format!(
                "{missing} entries of long scatterlists are missing: the kernel keeps the first 128 of a list, and these lists' unmappings \
                 were not recorded; entries and bytes are higher than shown"
            ));
        }
        if estimated > 0 {
            caveats.push(format!(
                "{estimated} entries of scatterlists are counted with even shares of their list's length: an IOMMU merged them, and the \
                 recording does not say how long each was"
            ));
        }
        if unmatched > 0 {
            caveats.push(format!(
                "{unmatched} unmappings are of what was mapped before the recording began (or are lost): that is not in these figures"
            ));
        }
        if misplaced > 0 {
            caveats.push(format!(
                "{misplaced} allocations are counted at their bus addresses, which an IOMMU translated: the kernel does not record where they \
                 lie; bytes are right, entries may not be"
            ));
        }
        caveats
    }
}

fn verdict(replay: &Replay) -> String {
    let Some(first) = &replay.first_failure else {
        return match replay.waited {
            0 => "fits".to_owned(),
            waited => format!("fits (host waited {:.1} ms for freed space)", waited as f64 / 1000.0),
        };
    };
    let marker = first.marker.as_ref().map_or(String::new(), |m| format!(" after {m:?}"));
    let seconds = first.at as f64 / 1e6;
    format!("does not fit: call {} at {seconds:.3} s{marker}: {}", first.call, first.cause)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
