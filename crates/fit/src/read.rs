//! Reading traces: our own text, the kernel's `dma:*` trace events, either xz-compressed, and generated ones by name.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::ftrace;
use crate::generate;
use crate::trace::{Segment, Trace};

/// Longest line, bytes: a list of a million segments. Longer ones are no trace.
const MAX_LINE: u64 = 64 << 20;
/// Highest guest-physical address: what 52 bits reach. Keeps a damaged trace from asking for absurd tables.
const MAX_ADDRESS: u64 = 1 << 52;
const XZ_MAGIC: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
/// Memory the xz decoder may take, KiB. Its largest preset (-9) needs 65 MiB.
const XZ_MEMORY_KIB: u32 = 512 << 10;

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
    /// Nothing to replay.
    #[error(
        "{0} has no DMA call; expected lines `m TIME ID ADDRESS:LENGTH`, or `dma_map_*` events of the kernel's dma:* tracing"
    )]
    Empty(PathBuf),
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
    let io = |source| ReadError::Io { path: path.to_owned(), source };
    let mut file = BufReader::new(std::fs::File::open(path).map_err(io)?);
    let packed = file.fill_buf().map_err(io)?.starts_with(&XZ_MAGIC);
    let text: Box<dyn Read> = if packed {
        Box::new(lzma_rust2::XzReader::new_mem_limit(file, true, XZ_MEMORY_KIB))
    } else {
        Box::new(file)
    };
    let mut lines = Lines { text: BufReader::new(text), path, number: 0, line: String::new() };
    let mut ours = Ours { trace: Trace::new(name(path)), maps: HashMap::new() };
    let mut events = ftrace::Events::default();
    let mut lost = 0_u64;
    while let Some(line) = lines.next()? {
        lost = lost.saturating_add(lost_events(line));
        let parsed = match line.split_once(' ').map(|(word, _)| word) {
            Some("m" | "u" | "@") => ours.line(line),
            _ if line.starts_with('#') => Ok(()),
            _ => events.line(line),
        };
        parsed.map_err(|what| lines.error(what))?;
    }
    let mut trace =
        if ours.trace.segments.is_empty() { events.finish(path, name(path), device)? } else { ours.trace };
    trace.lost = lost;
    if trace.segments.is_empty() { Err(ReadError::Empty(path.to_owned())) } else { Ok(trace) }
}

/// What a line says was lost: `# lost N events` of `outboard record`, `CPU:1 [LOST N EVENTS]` of the kernel (which may not know how
/// many: `[LOST EVENTS]`).
fn lost_events(line: &str) -> u64 {
    if let Some(number) = line.strip_prefix("# lost ").and_then(|rest| rest.strip_suffix(" events")) {
        return number.parse().unwrap_or(0);
    }
    let kernel = line.strip_prefix("CPU:").and_then(|rest| rest.split_once(" [LOST "));
    match kernel {
        Some((_, "EVENTS]")) => 1,
        Some((_, rest)) => rest.strip_suffix(" EVENTS]").and_then(|number| number.parse().ok()).unwrap_or(0),
        None => u64::from(line.ends_with("[LINE TOO BIG]")),
    }
}

/// The file's name without what all traces' names end in.
fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let name = name.strip_suffix(".xz").unwrap_or(&name);
    let name = [".trace", ".txt"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
    name.to_owned()
}

/// Lines of bounded length.
struct Lines<'p, R> {
    text: R,
    path: &'p Path,
    number: usize,
    line: String,
}

impl<R: BufRead> Lines<'_, R> {
    fn next(&mut self) -> Result<Option<&str>, ReadError> {
        self.line.clear();
        self.number += 1;
        let read = (&mut self.text).take(MAX_LINE).read_line(&mut self.line);
        let read = read.map_err(|source| self.unreadable(source))?;
        if read as u64 == MAX_LINE {
            return Err(self.error(format!("longer than {MAX_LINE} bytes")));
        }
        Ok((read != 0).then(|| self.line.trim_end_matches(['\n', '\r'])))
    }

    fn unreadable(&self, source: io::Error) -> ReadError {
        match source.kind() {
            io::ErrorKind::InvalidData => self.error(format!("no text, nor sound xz: {source}")),
            io::ErrorKind::UnexpectedEof => self.error("the packed file ends early: it was cut".into()),
            _ => ReadError::Io { path: self.path.to_owned(), source },
        }
    }

    fn error(&self, what: String) -> ReadError {
        ReadError::Line { path: self.path.to_owned(), line: self.number, what }
    }
}

/// Our own format; see the data README and `docs`.
struct Ours {
    trace: Trace,
    maps: HashMap<u64, usize>,
}

impl Ours {
    fn line(&mut self, line: &str) -> Result<(), String> {
        let mut words = line.split_ascii_whitespace();
        let kind = words.next().unwrap_or_default();
        if kind == "@" {
            let at = self.trace.calls.last().map_or(0, |call| call.at);
            self.trace.mark(at, line.get(2..).unwrap_or_default().trim());
            return Ok(());
        }
        let mut number = |what: &str| {
            let word = words.next().ok_or_else(|| format!("no {what}"))?;
            word.parse::<u64>().map_err(|error| format!("{what} {word:?}: {error}"))
        };
        let (at, id) = (number("time in microseconds")?, number("call ID")?);
        if kind == "u" {
            let index = self.maps.remove(&id).ok_or_else(|| format!("call {id} is not mapped"))?;
            self.trace.unmap(at, index);
            return Ok(());
        }
        let list = words.next().ok_or("no ADDRESS:LENGTH")?;
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

/// A segment, if it can be one.
pub(crate) fn checked(start: u64, len: u64) -> Result<Segment, String> {
    match start.checked_add(len) {
        Some(end) if len != 0 && end <= MAX_ADDRESS => Ok(Segment { start, len }),
        _ => Err(format!("{start:#x} + {len:#x} is empty or above 52 bits")),
    }
}
