//! DMA calls in memory, whatever they were read from.

use std::ops::Range as Span;

/// One piece of memory in a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub start: u64,
    /// Bytes; not zero.
    pub len: u64,
}

/// One DMA call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Maps these segments ([`Trace::segments`] at this span).
    Map(Span<usize>),
    /// Unmaps all that an earlier call mapped: its index among [`Trace::calls`].
    Unmap(usize),
    /// A remark of the workload ([`Trace::markers`] at this index).
    Marker(usize),
}

/// One line of a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Microseconds since an arbitrary moment; never less than in the call before.
    pub at: u64,
    /// What it does.
    pub op: Op,
}

/// A recorded or generated workload.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// Name for reports.
    pub name: String,
    /// Calls in order.
    pub calls: Vec<Call>,
    /// Segments of all calls.
    pub segments: Vec<Segment>,
    /// Text of the markers.
    pub markers: Vec<String>,
    /// What is known to be absent or uncertain.
    pub gaps: Gaps,
}

/// What a trace is known not to say; with any of these its figures are not the whole truth.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gaps {
    /// Events that the recording says it lost.
    pub lost: u64,
    /// The recording lost some that nobody counted: `lost` is the least.
    pub lost_at_least: bool,
    /// Entries of long scatterlists that the kernel's events did not keep; they are not in the trace's segments.
    pub missing: u64,
    /// Entries of scatterlists whose lengths are even shares of a sum.
    pub estimated: u64,
    /// Unmappings of what no call of the recording has mapped.
    pub unmatched: u64,
    /// Allocations that lie at their bus addresses for want of physical ones, where an IOMMU translates.
    pub misplaced: u64,
    /// The file ends within a line.
    pub cut: Option<Cut>,
    /// `outboard record` began the file and did not finish it.
    pub unfinished: bool,
}

/// What became of a last line that has no end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// It looks whole and is counted.
    Counted,
    /// It is not whole and is left out.
    LeftOut,
}

impl Trace {
    /// An empty trace.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Appends a map call; its index, to unmap it by.
    pub fn map(&mut self, at: u64, segments: impl IntoIterator<Item = Segment>) -> usize {
        let from = self.segments.len();
        self.segments.extend(segments);
        self.push(at, Op::Map(from..self.segments.len()))
    }

    /// Appends the unmapping of what call `index` mapped.
    pub fn unmap(&mut self, at: u64, index: usize) {
        self.push(at, Op::Unmap(index));
    }

    /// Appends a marker.
    pub fn mark(&mut self, at: u64, text: impl Into<String>) {
        self.markers.push(text.into());
        self.push(at, Op::Marker(self.markers.len() - 1));
    }

    fn push(&mut self, at: u64, op: Op) -> usize {
        // Clocks of several CPUs may differ by a little; time only moves on.
        let at = at.max(self.calls.last().map_or(0, |call| call.at));
        self.calls.push(Call { at, op });
        self.calls.len() - 1
    }

    /// Time of the first call, microseconds.
    pub fn begins(&self) -> u64 {
        self.calls.first().map_or(0, |call| call.at)
    }
}
