//! A call under way: what it asks of the host, and how far it has come.

use crate::{Range, StorageError, Use};

/// One line of a batch for the host. The host works through a batch from the first line to the last, so that what is
/// unmapped makes room for what is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Request {
    /// Guest memory to map or to unmap; whole granules.
    pub range: Range,
    /// To unmap: the host's handle. To map: the caller notes here what the host gave.
    pub handle: u64,
    /// The caller notes the bus address here; a multiple of [`GRANULE`].
    pub bus: u64,
    /// True to unmap, false to map.
    pub unmap: bool,
    /// The caller notes the result here.
    pub outcome: Outcome,
    pub(crate) window: u32,
}

/// What became of a [`Request`], the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Outcome {
    /// Done; for a mapping, `bus` and `handle` are valid.
    Done,
    /// Refused because space that was given back is not free again yet: a smaller one may do, and so may waiting.
    Returning,
    /// Refused for want of space or of entries, or because space is in pieces: a smaller one may do.
    NoSpace,
    /// Refused for any other reason.
    Refused,
    /// Not answered: counts as refused.
    #[default]
    Open,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// The call is finished; every entry has its bus address.
    Done,
    /// Send [`Call::batch`] to the host, note the outcomes in it, then call [`Planner::resume`].
    ///
    /// [`Planner::resume`]: crate::Planner::resume
    Ask,
    /// Another call is with the host, and this one needs what comes of it. Let go of the lock for a moment, then call [`Planner::again`].
    ///
    /// [`Planner::again`]: crate::Planner::again
    Wait,
    /// The call failed: no entry is mapped, all that was live before still is, at the same addresses. Only idle windows
    /// may differ.
    Failed(Failure),
}

/// Why a map call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// An entry is empty, leaves the 64-bit space, or is not (all) RAM.
    NotRam(Range),
    /// The byte budget does not have room, even with every idle window given back.
    Bytes,
    /// The same for the entry budget.
    Entries,
    /// The host found no space although the budgets have room: it is in pieces.
    NoSpace,
    /// There will be space when what was or is being given back is free: the same call may succeed in some milliseconds.
    Returning,
    /// The host refused, or gave an address that cannot be used.
    Host,
}

/// A map call under way, or a batch of windows to give back. Whoever makes a call has one to itself until the call is over; as many calls may be
/// with the host at a time as there are of these.
#[derive(Debug)]
pub struct Call<'a> {
    /// Tells it from others.
    pub(crate) id: u16,
    batch: &'a mut [Request],
    lines: usize,
    /// First entry of the list that may have no address yet, and the first not looked at by the planner.
    pub(crate) cursor: usize,
    pub(crate) seen: usize,
    pub(crate) refused: u32,
    /// Whether all idle windows must go before the call goes on.
    pub(crate) clear: bool,
    /// How many exchanges the planner has settled when the call waits for others no more.
    pub(crate) patience: Option<u64>,
    /// What the mappings of the batch will pin.
    pub(crate) pending: Use,
    /// What its unmappings will free: room for the mappings behind them, and for nobody else before it is done.
    pub(crate) closing: Use,
}

impl<'a> Call<'a> {
    /// One with the number `id`, which no other of the same planner has. Batches have as many lines as `batch`.
    ///
    /// # Errors
    /// [`StorageError::TooSmall`]: at least two lines are needed.
    pub fn new(id: u16, batch: &'a mut [Request]) -> Result<Self, StorageError> {
        if batch.len() < 2 {
            return Err(StorageError::TooSmall("batch"));
        }
        let (pending, closing) = (Use::default(), Use::default());
        let (lines, cursor, seen) = (0, 0, 0);
        Ok(Self {
            id,
            batch,
            lines,
            cursor,
            seen,
            refused: 0,
            clear: false,
            patience: None,
            pending,
            closing,
        })
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.id
    }

    /// The lines to send to the host after [`Step::Ask`].
    pub fn batch(&mut self) -> &mut [Request] {
        self.batch.get_mut(..self.lines).unwrap_or_default()
    }

    pub(crate) fn begin(&mut self) {
        (self.cursor, self.seen, self.refused, self.clear, self.patience) = (0, 0, 0, false, None);
    }

    /// Lines in the batch.
    pub(crate) fn lines(&self) -> usize {
        self.lines
    }

    /// Lines that still fit.
    pub(crate) fn room(&self) -> usize {
        self.batch.len().saturating_sub(self.lines)
    }

    pub(crate) fn line(&self, index: usize) -> Option<Request> {
        self.batch.get(..self.lines)?.get(index).copied()
    }

    pub(crate) fn add(&mut self, request: Request) {
        if let Some(line) = self.batch.get_mut(self.lines) {
            *line = request;
            self.lines = self.lines.saturating_add(1);
        }
    }

    /// Takes the last line out.
    pub(crate) fn take_last(&mut self) -> Option<Request> {
        let last = self.line(self.lines.checked_sub(1)?);
        self.lines = self.lines.saturating_sub(1);
        last
    }

    pub(crate) fn empty(&mut self) {
        self.lines = 0;
    }
}
