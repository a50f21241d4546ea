//! What a recording's text says it lost, in the words of each program that prints one.

/// Events that were lost, as one line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// So many, at this place in the recording.
    Here(u64),
    /// Some; nobody counted them.
    Some,
    /// So many in the whole recording of a CPU or machine: a statistic, which counts what [`Lost::Here`] may count too.
    InAll(u64),
}

/// The losses of a whole recording.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Losses {
    here: u64,
    in_all: u64,
    uncounted: bool,
}

impl Losses {
    pub(crate) fn add(&mut self, lost: Lost) {
        match lost {
            Lost::Here(count) => self.here = self.here.saturating_add(count),
            Lost::InAll(count) => self.in_all = self.in_all.saturating_add(count),
            Lost::Some => self.uncounted = true,
        }
    }

    /// Events lost, and true if it may be more.
    pub(crate) fn total(self) -> (u64, bool) {
        (self.here.max(self.in_all).max(u64::from(self.uncounted)), self.uncounted)
    }
}

/// What `line`, which holds no event, says was lost.
pub(crate) fn lost(line: &str) -> Option<Lost> {
    match line.strip_prefix('#') {
        Some(comment) => in_comment(comment.trim()),
        None => between_events(line.trim()).or_else(|| statistic(line.trim())).or_else(|| perf(line)),
    }
}

/// Comments of `outboard record`, of the guest module's recorder, and of the kernel's `trace`. Others are anybody's words.
fn in_comment(comment: &str) -> Option<Lost> {
    if let Some(number) = comment.strip_prefix("lost ").and_then(|rest| rest.strip_suffix(" events")) {
        return Some(count(number).map_or(Lost::Some, Lost::Here));
    }
    if comment.starts_with("the recorder was full") {
        return Some(Lost::Some);
    }
    let (_, counts) = comment.split_once("entries-in-buffer/entries-written: ")?;
    let (kept, written) = counts.split_whitespace().next()?.split_once('/')?;
    match (count(kept), count(written)) {
        (Some(kept), Some(written)) => Some(Lost::InAll(written.saturating_sub(kept))),
        _ => Some(Lost::Some),
    }
}

/// `CPU:1 [LOST 41 EVENTS]` of the kernel, `CPU:1 [41 EVENTS DROPPED]` of trace-cmd; either may not know how many.
fn between_events(line: &str) -> Option<Lost> {
    let (before, words) = line.strip_suffix(']')?.rsplit_once('[')?;
    let words: Vec<&str> = words.split_whitespace().collect();
    let number = match words[..] {
        ["LOST", number, "EVENTS"] | [number, "EVENTS", "DROPPED"] => Some(number),
        ["LOST", "EVENTS"] | ["EVENTS", "DROPPED"] => None,
        _ => return None,
    };
    before.contains("CPU").then(|| number.and_then(count).map_or(Lost::Some, Lost::Here))
}

/// The kernel's `per_cpu/cpu*/stats`, which `trace-cmd report --stat` prints too.
fn statistic(line: &str) -> Option<Lost> {
    let (name, number) = line.split_once(':')?;
    match name {
        "overrun" | "commit overrun" | "dropped events" => {
            Some(count(number.trim()).map_or(Lost::Some, Lost::InAll))
        }
        _ => None,
    }
}

/// `LOST 41 events!`, `PERF_RECORD_LOST lost 41`, `Processed 99 events and lost 7 chunks!` of perf, whose chunks hold nobody knows how
/// many events; others use words like these.
fn perf(line: &str) -> Option<Lost> {
    let line = line.to_ascii_lowercase();
    let words: Vec<&str> = line.split_whitespace().collect();
    let is_loss = |word: &str| matches!(word, "lost" | "dropped" | "discarded");
    for (at, word) in words.iter().enumerate() {
        let next = |ahead: usize| words.get(at + ahead).copied().unwrap_or_default();
        let number = count(next(1).trim_end_matches(['!', '.', ',']));
        let of = next(2).trim_end_matches(['!', '.', ',', ':']);
        match (is_loss(word), number, of) {
            (true, Some(number), "event" | "events" | "samples") => return Some(Lost::Here(number)),
            (true, Some(0), "chunks") => return None,
            (true, Some(_), "chunks") => return Some(Lost::Some),
            (true, Some(number), _) if line.contains("perf_record_lost") => return Some(Lost::Here(number)),
            (true, None, _) if next(1).ends_with("%!") => return Some(Lost::Some),
            _ => {}
        }
    }
    line.contains("perf_record_lost").then_some(Lost::Some)
}

/// A number of any length; what is beyond 64 bits is as many as they hold.
fn count(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_understood() {
        for (line, expected) in [
            ("# lost 2 events", Some(Lost::Here(2))),
            ("# lost many events", Some(Lost::Some)),
            ("# lost 99999999999999999999999 events", Some(Lost::Here(u64::MAX))),
            ("# the recorder was full: later calls are missing", Some(Lost::Some)),
            ("# entries-in-buffer/entries-written: 140080/250280   #P:4", Some(Lost::InAll(110_200))),
            ("# command: sh -c lost 3 events", None),
            ("CPU:1 [LOST 41 EVENTS]", Some(Lost::Here(41))),
            ("CPU:1 [LOST EVENTS]", Some(Lost::Some)),
            ("CPU:1 [41 EVENTS DROPPED]", Some(Lost::Here(41))),
            ("  CPU:1 [EVENTS DROPPED]", Some(Lost::Some)),
            ("CPU:1 [many EVENTS DROPPED]", Some(Lost::Some)),
            ("commit overrun: 3", Some(Lost::InAll(3))),
            ("dropped events: 40", Some(Lost::InAll(40))),
            ("LOST 41 events!", Some(Lost::Here(41))),
            ("Xorg 812 [001] 100.0: PERF_RECORD_LOST \t lost 41", Some(Lost::Here(41))),
            ("PERF_RECORD_LOST_SAMPLES lost 4", Some(Lost::Here(4))),
            ("Processed 100 events and lost 7 chunks!", Some(Lost::Some)),
            ("Processed 100 samples and lost 3.20%!", Some(Lost::Some)),
            ("WARNING: Tracer discarded 12 events between", Some(Lost::Here(12))),
            ("CPU 2 is empty", None),
            ("##### CPU 2 buffer started ####", None),
            ("version = 7", None),
            ("", None),
        ] {
            assert_eq!(lost(line), expected, "{line}");
        }
    }

    #[test]
    fn statistics_are_not_added_to_what_they_count() {
        let mut losses = Losses::default();
        losses.add(Lost::Here(40));
        losses.add(Lost::InAll(30));
        losses.add(Lost::InAll(20));
        assert_eq!(losses.total(), (50, false));
        losses.add(Lost::Some);
        assert_eq!(losses.total(), (50, true));
    }
}
