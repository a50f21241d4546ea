//! Reading traces: our own text, the kernel's `dma:*` trace events, either packed, and generated ones by name.
//!
//! What has a DMA call is read or refused, and what a recording says it lost is kept: nothing is counted wrong in silence.

use std::borrow::Cow;
use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};

use crate::event::{self, Line};
use crate::ftrace::Events;
use crate::generate;
use crate::lost::{self, Losses, Lost};
use crate::ours::Ours;
use crate::packed::{self, Text};
use crate::trace::{Cut, Segment, Trace};

/// Longest line, bytes: a list of a million segments. Longer ones are no trace.
const MAX_LINE: u64 = 64 << 20;
/// Highest guest-physical address: what 52 bits reach. Keeps a damaged trace from asking for absurd tables.
const MAX_ADDRESS: u64 = 1 << 52;
/// Some programs begin text with it.
const BYTE_ORDER_MARK: char = '\u{feff}';
/// First comment of `outboard record`, whose last is what was lost.
const OUR_HEADER: &str = "# outboard record,";
/// The kernel's mark on a line that it could not finish.
const TOO_BIG: &str = "[LINE TOO BIG]";

/// Why a trace could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be opened or read.
    #[error("cannot read the trace {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line is not what its format asks for.
    #[error("{path}, line {line}: {what}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong, and what was expected.
        what: String,
    },
    /// No text.
    #[error("{path} is {what}; {advice}")]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is, in words.
        what: String,
        /// The next step.
        advice: &'static str,
    },
    /// Packed, and the packing is damaged.
    #[error(
        "{path}, line {line}: this {packing} file is damaged, was cut, or needs more memory to be unpacked than it is given: {source}"
    )]
    Packed {
        /// The file.
        path: PathBuf,
        /// How it is packed.
        packing: &'static str,
        /// Line at which the text ends, counted from 1.
        line: usize,
        /// Why.
        source: io::Error,
    },
    /// Nothing to replay.
    #[error(
        "{0} has no DMA call. Text of these kinds is read: the kernel's dma:* events, as `outboard record`, trace_pipe, \
         `trace-cmd report` and `perf script` print them, and lines `m MICROSECONDS ID ADDRESS:LENGTH`"
    )]
    Empty(PathBuf),
    /// Nothing but unmappings.
    #[error(
        "{path} has {unmapped} unmappings and not one mapping: all was mapped before the recording began. Begin it before the driver is \
         loaded: outboard record -- modprobe DRIVER"
    )]
    NothingMapped {
        /// The file.
        path: PathBuf,
        /// How many.
        unmapped: u64,
    },
    /// Two kinds of text in one file.
    #[error(
        "{path} has lines `m` and `u` as well as the kernel's dma:* events: these are two recordings; replay each by itself"
    )]
    Mixed {
        /// The file.
        path: PathBuf,
    },
    /// Several devices in one trace.
    #[error("{path} has DMA calls of several devices; choose one with --device: {devices}")]
    Devices {
        /// The file.
        path: PathBuf,
        /// Their names and numbers of calls.
        devices: String,
    },
    /// The device asked for does not occur.
    #[error("{path} has no DMA call of {device}; it has: {devices}")]
    NoDevice {
        /// The file.
        path: PathBuf,
        /// Asked for.
        device: String,
        /// There.
        devices: String,
    },
    /// No generated trace has this name.
    #[error("no generated trace is called {0}; there are: {names}", names = generate::names())]
    Generated(String),
}

/// Reads the trace at `path`, of `device` where the trace tells devices apart. `generated:NAME` makes one.
pub fn read(path: &Path, device: Option<&str>) -> Result<Trace, ReadError> {
    if let Some(name) = path.to_str().and_then(|p| p.strip_prefix("generated:")) {
        return generate::by_name(name).ok_or_else(|| ReadError::Generated(name.to_owned()));
    }
    let Text { text, packing } = packed::open(path)?;
    let mut lines = Lines { text, packing, path, number: 0, line: Vec::new() };
    let mut reader = Reader::new(name(path));
    while let Some((number, line, ended)) = lines.next()? {
        if !ended {
            reader.last_line(&line, number);
        } else if let Err(what) = reader.line(&line, number) {
            return Err(ReadError::Line { path: path.to_owned(), line: number, what });
        }
    }
    let trace = reader.finish(path, device)?;
    if trace.segments.is_empty() { Err(ReadError::Empty(path.to_owned())) } else { Ok(trace) }
}

/// What was read so far.
struct Reader {
    ours: Ours,
    events: Events,
    losses: Losses,
    /// First line that is nothing we know.
    unknown: Option<usize>,
    cut: Option<Cut>,
    /// `outboard record` has begun; its last word on losses is still to come.
    unfinished: bool,
}

impl Reader {
    fn new(name: String) -> Self {
        Self {
            ours: Ours::new(name),
            events: Events::default(),
            losses: Losses::default(),
            unknown: None,
            cut: None,
            unfinished: false,
        }
    }

    fn line(&mut self, line: &str, number: usize) -> Result<(), String> {
        let line = if number == 1 { line.trim_start_matches(BYTE_ORDER_MARK) } else { line };
        if line.ends_with(TOO_BIG) {
            self.losses.add(Lost::Here(1));
            return Ok(());
        }
        if line.starts_with('#') {
            return self.comment(line);
        }
        if line == "@" || line.starts_with("@ ") {
            return self.ours.line(line);
        }
        // Before our own lines: a program that is called `m` may have caused an event.
        match event::parse(line)? {
            Line::Dma(happened) => self.events.add(happened),
            Line::Text if matches!(line.split_ascii_whitespace().next(), Some("m" | "u")) => {
                self.ours.line(line)
            }
            Line::Text => self.text(line, number),
            Line::Other => {
                self.unknown.get_or_insert(number);
                Ok(())
            }
        }
    }

    fn comment(&mut self, line: &str) -> Result<(), String> {
        let is_ours = line.starts_with(OUR_HEADER);
        if is_ours || line.starts_with("# tracer:") {
            self.begins()?;
            self.unfinished = is_ours;
        }
        if let Some(lost) = lost::lost(line) {
            self.losses.add(lost);
            self.unfinished = false;
        }
        Ok(())
    }

    /// Text that is no event, no call and no comment.
    fn text(&mut self, line: &str, number: usize) -> Result<(), String> {
        // trace-cmd's first lines.
        if line.starts_with("cpus=") || line.starts_with("version = ") {
            self.begins()?;
        }
        match lost::lost(line) {
            Some(lost) => self.losses.add(lost),
            None if line.trim().is_empty() => {}
            None => drop(self.unknown.get_or_insert(number)),
        }
        Ok(())
    }

    /// A recording begins: what the one before it left mapped would count for this one.
    fn begins(&self) -> Result<(), String> {
        if self.events.is_empty() && self.ours.is_empty() {
            return Ok(());
        }
        Err("a second recording begins here; replay each by itself (split the file before this line)"
            .to_owned())
    }

    /// A line without its end may be half a line, whose last number is another one.
    fn last_line(&mut self, line: &str, number: usize) {
        if line.starts_with('#') && lost::lost(line).is_some() && self.comment(line).is_ok() {
            return;
        }
        let is_ours = matches!(line.split_ascii_whitespace().next(), Some("m" | "u" | "@"))
            && event::parse(line) == Ok(Line::Text);
        let says_losses = !line.starts_with('#') && lost::lost(line).is_some();
        let is_whole = is_ours || says_losses || event::is_whole(line);
        let counted = is_whole && self.line(line, number).is_ok();
        self.cut = Some(if counted { Cut::Counted } else { Cut::LeftOut });
    }

    fn finish(self, path: &Path, device: Option<&str>) -> Result<Trace, ReadError> {
        let mut trace = match (self.ours.is_empty(), self.events.is_empty()) {
            (false, false) => return Err(ReadError::Mixed { path: path.to_owned() }),
            (true, _) => self.events.finish(path, self.ours.finish().name, device)?,
            (false, true) => {
                if let Some(line) = self.unknown {
                    let what = "no line of a trace: those are `m MICROSECONDS ID ADDRESS:LENGTH,...`, `u MICROSECONDS ID`, `@ TEXT` and \
                                `# COMMENT`";
                    return Err(ReadError::Line { path: path.to_owned(), line, what: what.to_owned() });
                }
                self.ours.finish()
            }
        };
        (trace.gaps.lost, trace.gaps.lost_at_least) = self.losses.total();
        trace.gaps.cut = self.cut;
        trace.gaps.unfinished = self.unfinished;
        Ok(trace)
    }
}

/// The file's name without what all traces' names end in.
fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let packed = [".xz", ".gz", ".zst"];
    let name = packed.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    let name = [".trace", ".txt"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
    name.to_owned()
}

/// Lines of bounded length. Bytes that are no UTF-8 are replaced: a task's name may be cut within a character.
struct Lines<'p> {
    text: Box<dyn BufRead>,
    packing: Option<&'static str>,
    path: &'p Path,
    number: usize,
    line: Vec<u8>,
}

impl Lines<'_> {
    /// The next line with its number, and false if the file ends within it.
    fn next(&mut self) -> Result<Option<(usize, Cow<'_, str>, bool)>, ReadError> {
        self.line.clear();
        self.number += 1;
        let read = (&mut self.text).take(MAX_LINE).read_until(b'\n', &mut self.line);
        let read = read.map_err(|source| self.unreadable(source))?;
        if read as u64 == MAX_LINE {
            return Err(self.error(format!("longer than {MAX_LINE} bytes")));
        }
        if self.line.contains(&0) {
            return Err(self.error(
                "zero bytes, which no text has: the file is binary, or damaged from here on".to_owned(),
            ));
        }
        if read == 0 {
            return Ok(None);
        }
        let ended = self.line.pop_if(|last| *last == b'\n').is_some();
        while ended && self.line.pop_if(|last| *last == b'\r').is_some() {}
        Ok(Some((self.number, String::from_utf8_lossy(&self.line), ended)))
    }

    fn unreadable(&self, source: io::Error) -> ReadError {
        let (path, line) = (self.path.to_owned(), self.number);
        match self.packing {
            Some(packing) => ReadError::Packed { path, packing, line, source },
            None => ReadError::Io { path, source },
        }
    }

    fn error(&self, what: String) -> ReadError {
        ReadError::Line { path: self.path.to_owned(), line: self.number, what }
    }
}

/// A segment, if it can be one.
pub(crate) fn checked(start: u64, len: u64) -> Result<Segment, String> {
    match start.checked_add(len) {
        Some(end) if len != 0 && end <= MAX_ADDRESS => Ok(Segment { start, len }),
        _ => Err(format!("{start:#x} + {len:#x} is empty or above 52 bits")),
    }
}
