//! Our own text: `m MICROSECONDS ID ADDRESS:LENGTH,...` maps, `u MICROSECONDS ID` unmaps, `@ TEXT` is a marker.

use std::collections::HashMap;

use crate::ftrace::check_time;
use crate::read::checked;
use crate::trace::{Segment, Trace};

/// What was read so far.
pub(crate) struct Ours {
    trace: Trace,
    maps: HashMap<u64, usize>,
}

impl Ours {
    pub(crate) fn new(name: String) -> Self {
        Self { trace: Trace::new(name), maps: HashMap::new() }
    }

    /// True if nothing was mapped.
    pub(crate) fn is_empty(&self) -> bool {
        self.trace.segments.is_empty()
    }

    pub(crate) fn finish(self) -> Trace {
        self.trace
    }

    /// Takes one line.
    pub(crate) fn line(&mut self, line: &str) -> Result<(), String> {
        let mut words = line.split_ascii_whitespace();
        let kind = words.next().unwrap_or_default();
        let latest = self.trace.calls.last().map_or(0, |call| call.at);
        if kind == "@" {
            self.trace.mark(latest, line.get(1..).unwrap_or_default().trim());
            return Ok(());
        }
        let mut number = |what: &str| {
            let word = words.next().ok_or_else(|| format!("no {what}"))?;
            word.parse::<u64>().map_err(|error| format!("{what} {word:?}: {error}"))
        };
        let (at, id) = (number("time in microseconds")?, number("call ID")?);
        check_time(at, latest)?;
        let list = if kind == "u" { None } else { Some(words.next().ok_or("no ADDRESS:LENGTH")?) };
        if let Some(more) = words.next() {
            return Err(format!("{more:?} is too much: two lines run into one?"));
        }
        let Some(list) = list else {
            let index = self.maps.remove(&id).ok_or_else(|| format!("call {id} is not mapped"))?;
            self.trace.unmap(at, index);
            return Ok(());
        };
        let segments = list.split(',').map(segment).collect::<Result<Vec<_>, _>>()?;
        let index = self.trace.map(at, segments);
        match self.maps.insert(id, index) {
            None => Ok(()),
            Some(_) => Err(format!("call {id} is mapped already")),
        }
    }
}

fn segment(text: &str) -> Result<Segment, String> {
    let (start, len) = text.split_once(':').ok_or_else(|| format!("{text:?} is not ADDRESS:LENGTH"))?;
    let hex = |word: &str| u64::from_str_radix(word, 16).map_err(|error| format!("{word:?}: {error}"));
    checked(hex(start)?, hex(len)?)
}
