//! A bounded queue in front of something that may take its time, and the thread that takes it.

use crate::RotatingFile;
use crate::descriptor::{survive_background, write_all};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Most bytes that one write takes out of a stream.
const PIECE: usize = 4096;
/// What a message costs beside its bytes, so that empty ones are bounded too.
const OVERHEAD: usize = 64;
/// Shortest time between two reports of what was lost.
const REPORT: Duration = Duration::from_secs(5);

/// What goes through a [`Writer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whole messages with a newline each: written or lost one by one.
    Messages,
    /// Bytes without a form.
    Stream,
}

/// Where a [`Writer`] writes.
pub(crate) enum Target {
    Descriptor(File),
    File(RotatingFile),
}

/// A bounded queue and a thread that empties it. Dropping it lets the thread end once the queue is empty, and waits for nothing.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// What is written, for reports: `messages of the log`.
    what: String,
    kind: Kind,
    limit: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Vec<u8>>,
    /// Of what is in the queue, in bytes with overhead.
    size: usize,
    /// The thread has taken a piece that it has not written yet.
    is_writing: bool,
    closed: bool,
    /// Pieces that were written or lost; wraps.
    done: u64,
    /// Messages or bytes that were lost and not reported.
    lost: u64,
    why: Option<String>,
}

impl State {
    fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.is_writing
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Messages or bytes in `piece`.
    fn count(&self, piece: &[u8]) -> u64 {
        match self.kind {
            Kind::Messages => 1,
            Kind::Stream => piece.len() as u64,
        }
    }
}

impl Writer {
    /// A writer of `what` (a plural, for reports) to a descriptor, with a queue of `limit` bytes.
    ///
    /// # Errors
    /// The operating system's, when it has no more threads.
    pub fn to_descriptor(what: &str, kind: Kind, limit: usize, file: File) -> io::Result<Self> {
        Self::start(what, kind, limit, Target::Descriptor(file))
    }

    /// The same to a file of limited size.
    ///
    /// # Errors
    /// The operating system's, when it has no more threads.
    pub fn to_file(what: &str, kind: Kind, limit: usize, file: RotatingFile) -> io::Result<Self> {
        Self::start(what, kind, limit, Target::File(file))
    }

    fn start(what: &str, kind: Kind, limit: usize, target: Target) -> io::Result<Self> {
        let shared =
            Shared { what: what.to_owned(), kind, limit, state: Mutex::default(), changed: Condvar::new() };
        let shared = Arc::new(shared);
        let its = shared.clone();
        std::thread::Builder::new().name("output".into()).spawn(move || empty(&its, target))?;
        Ok(Self { shared })
    }

    /// Appends a message, or drops and counts it if there is no room.
    pub fn push(&self, message: &[u8]) {
        let mut state = self.shared.lock();
        if state.size + message.len() + OVERHEAD > self.shared.limit {
            lose(&self.shared, &mut state, self.shared.count(message), "nobody took them");
            return;
        }
        append(&mut state, message);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Appends the part of a stream that there is room for, and returns its length.
    pub fn push_some(&self, data: &[u8]) -> usize {
        let mut state = self.shared.lock();
        let room = self.shared.limit.saturating_sub(state.size);
        let part = &data[..data.len().min(room)];
        let has_place = state.queue.back().is_some_and(|last| last.len() + part.len() <= PIECE);
        match state.queue.back_mut().filter(|_| has_place) {
            Some(last) => {
                last.extend_from_slice(part);
                state.size += part.len();
            }
            None => part.chunks(PIECE).for_each(|piece| append(&mut state, piece)),
        }
        drop(state);
        self.shared.changed.notify_all();
        part.len()
    }

    /// Counts `bytes` of a stream that found no room.
    pub fn lose(&self, bytes: usize) {
        lose(&self.shared, &mut self.shared.lock(), bytes as u64, "nobody took them");
    }

    /// Waits until there is room in the queue, at most for `limit`.
    pub fn wait_for_room(&self, limit: Duration) -> bool {
        self.wait(limit, |state| state.size < self.shared.limit)
    }

    /// Waits until everything is written or lost. True if that is so; false if nothing came of it for `limit`, or not all for ten times as long.
    pub fn flush(&self, limit: Duration) -> bool {
        let start = Instant::now();
        loop {
            let before = self.shared.lock().done;
            if self.wait(limit, |state| state.is_idle() || state.done != before)
                && self.shared.lock().is_idle()
            {
                return true;
            }
            if self.shared.lock().done == before || start.elapsed() > limit.saturating_mul(10) {
                return false;
            }
        }
    }

    fn wait(&self, limit: Duration, is_done: impl Fn(&State) -> bool) -> bool {
        let state = self.shared.lock();
        let waited = self.shared.changed.wait_timeout_while(state, limit, |state| !is_done(state));
        let (state, _) = waited.unwrap_or_else(|e| e.into_inner());
        is_done(&state)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

fn append(state: &mut State, piece: &[u8]) {
    state.size += piece.len() + OVERHEAD;
    state.queue.push_back(piece.to_vec());
}

fn lose(shared: &Shared, state: &mut State, count: u64, why: &str) {
    // Said at once where it can be: the end of a console's output may be long in coming. A log cannot say it of itself.
    let is_new = state.lost == 0 && shared.kind == Kind::Stream;
    state.lost += count;
    state.why = Some(why.to_owned());
    if is_new {
        tracing::warn!("{} are being lost: {why}", shared.what);
    }
}

/// The thread: writes what is in the queue, until it is closed and empty.
fn empty(shared: &Shared, mut target: Target) {
    survive_background();
    let (mut reported, mut is_cut) = (None, false);
    loop {
        let Some(piece) = next(shared) else { return };
        let (done, result) = match (&mut target, is_cut && shared.kind == Kind::Messages) {
            (Target::Descriptor(file), false) => write_all(file, &piece),
            (Target::Descriptor(file), true) => write_all(file, &[b"\n", &piece[..]].concat()),
            (Target::File(file), false) => file.write(&piece),
            (Target::File(file), true) => file.write(&[b"\n", &piece[..]].concat()),
        };
        is_cut = result.is_err() && (done > 0 || is_cut);
        let mut state = shared.lock();
        state.is_writing = false;
        state.done = state.done.wrapping_add(1);
        match result {
            Err(error) => {
                let lost = shared.count(&piece);
                lose(shared, &mut state, lost, &error.to_string());
            }
            Ok(()) if state.lost > 0 && state.size < shared.limit / 2 => {
                let may_report = reported.is_none_or(|at: Instant| at.elapsed() >= REPORT);
                if may_report {
                    reported = Some(Instant::now());
                    let (lost, why) = (std::mem::take(&mut state.lost), state.why.take());
                    drop(state);
                    tracing::error!("{lost} {} were lost: {}", shared.what, why.unwrap_or_default());
                }
            }
            Ok(()) => {}
        }
        shared.changed.notify_all();
    }
}

/// The next piece, once there is one; `None` at the end.
fn next(shared: &Shared) -> Option<Vec<u8>> {
    let mut state = shared.lock();
    loop {
        if let Some(piece) = state.queue.pop_front() {
            state.size = state.size.saturating_sub(piece.len() + OVERHEAD);
            state.is_writing = true;
            drop(state);
            shared.changed.notify_all();
            return Some(piece);
        }
        if state.closed {
            return None;
        }
        state = shared.changed.wait(state).unwrap_or_else(|e| e.into_inner());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read};
    use std::os::fd::OwnedFd;

    const LONG: Duration = Duration::from_secs(20);

    fn pipe() -> (io::PipeReader, File) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, File::from(OwnedFd::from(writer)))
    }

    #[test]
    fn a_reader_that_stops_costs_messages_and_no_time() {
        let (reader, file) = pipe();
        let writer = Writer::to_descriptor("messages", Kind::Messages, 256 << 10, file).unwrap();
        let message = [&[b'x'; 999][..], b"\n"].concat();
        // More than the pipe and the queue hold together; this would never end if anything waited.
        for _ in 0..2000 {
            writer.push(&message);
        }
        assert!(!writer.flush(Duration::from_millis(50)), "the queue is larger than a pipe");
        let lost = writer.shared.lock().lost;
        assert!(lost > 500, "{lost}");
        // The reader goes on: what was in the queue comes whole, and new messages after it.
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        for _ in 0..2000 - lost {
            line.clear();
            reader.read_until(b'\n', &mut line).unwrap();
            assert_eq!(line, message);
        }
        writer.push(b"and on\n");
        line.clear();
        reader.read_until(b'\n', &mut line).unwrap();
        assert_eq!(line, b"and on\n");
    }

    #[test]
    fn a_full_disk_costs_messages_and_no_more() {
        let Ok(full) = File::options().write(true).open("/dev/full") else { return };
        let writer = Writer::to_descriptor("messages", Kind::Messages, 4096, full).unwrap();
        for _ in 0..3 {
            writer.push(b"message\n");
        }
        assert!(writer.flush(LONG));
        let state = writer.shared.lock();
        assert_eq!(state.lost, 3);
        assert!(state.why.as_ref().unwrap().contains("space"), "{:?}", state.why);
    }

    #[test]
    fn a_stream_says_how_much_it_takes_and_keeps_its_order() {
        let (mut reader, file) = pipe();
        let writer = Writer::to_descriptor("bytes", Kind::Stream, 10_000, file).unwrap();
        let data: Vec<u8> = (0..1_000_000u32).map(|i| (i / 7) as u8).collect();
        let mut rest = &data[..];
        let collect = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        while !rest.is_empty() {
            let taken = writer.push_some(&rest[..rest.len().min(777)]);
            rest = &rest[taken..];
            assert!(taken > 0 || writer.wait_for_room(LONG));
        }
        assert!(writer.flush(LONG));
        drop(writer);
        assert_eq!(collect.join().unwrap(), data);
    }

    #[test]
    fn a_descriptor_that_somebody_made_non_blocking_is_waited_for() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let file = File::from(OwnedFd::from(ours));
        let writer = Writer::to_descriptor("bytes", Kind::Stream, 4 << 20, file).unwrap();
        let data = vec![3; 2 << 20];
        assert_eq!(writer.push_some(&data), data.len());
        drop(writer);
        let mut all = Vec::new();
        (&theirs).read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), data.len());
    }
}
