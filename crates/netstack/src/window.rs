//! What of a guest's TCP segments may reach smoltcp.
//!
//! smoltcp 0.14 asserts that received data fits its buffer, yet takes more than that before its first segment after the
//! handshake (`docs/upstream/smoltcp-receive-window.md`), and takes data beyond the end of the stream. The first is met by
//! buffers whose size is a whole window; everything is checked again here, against numbers of our own.

use smoltcp::wire::TcpPacket;

/// Sizes that a receive buffer may have, in bytes, largest first.
///
/// smoltcp announces a buffer of this many bytes as a window of 65535 and a shift, in the SYN too, where the shift does not
/// count. Right after a SYN it reckons with 65535 shifted, which is the buffer only if the buffer is exactly that large. A
/// window below 65536 bytes has no shift.
pub(crate) const BUFFER_SIZES: [usize; 5] = [WINDOW << 3, WINDOW << 2, WINDOW << 1, WINDOW, SMALLEST_BUFFER];
const WINDOW: usize = u16::MAX as usize;
const SMALLEST_BUFFER: usize = 32 << 10;

/// How far a segment may be from the receive buffer, in sequence numbers, on either side: the largest window that TCP has
/// (RFC 7323, section 2.3). Comparisons of sequence numbers that are further apart than twice this have no meaning.
const FARTHEST: i64 = 1 << 30;

/// Sequence number, length and flags of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Segment {
    seq: u32,
    len: usize,
    pub(crate) syn: bool,
    fin: bool,
    pub(crate) rst: bool,
}

impl Segment {
    pub(crate) fn of(packet: &TcpPacket<&[u8]>) -> Self {
        Self {
            seq: packet.seq_number().0.cast_unsigned(),
            len: packet.payload().len(),
            syn: packet.syn(),
            fin: packet.fin(),
            rst: packet.rst(),
        }
    }
}

/// Where a connection's receive buffer stands in the guest's sequence numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReceiveWindow {
    /// Sequence number of the buffer's first byte.
    start: u32,
    capacity: usize,
}

/// How full the buffer is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filling {
    /// Bytes in order that the host's side has not taken yet.
    pub(crate) queued: usize,
    /// The guest has ended its stream behind them.
    pub(crate) ended: bool,
}

impl ReceiveWindow {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { start: 0, capacity }
    }

    /// The guest's SYN was given to smoltcp, which may take it.
    pub(crate) fn synchronize(&mut self, syn: Segment) {
        self.start = syn.seq.wrapping_add(1);
    }

    /// The host's side took `count` bytes out of the buffer.
    pub(crate) fn consume(&mut self, count: usize) {
        self.start = self.start.wrapping_add(count as u32);
    }

    /// Whether smoltcp may see `segment` of a connection that is synchronized. What is merely outside the window is, for it is
    /// to be answered with an acknowledgement (RFC 9293, section 3.10.7.4).
    pub(crate) fn admits(&self, segment: Segment, filling: Filling) -> bool {
        let from = i64::from(segment.seq.wrapping_sub(self.start).cast_signed());
        let to = from + segment.len as i64;
        let capacity = self.capacity as i64;
        if !(-FARTHEST..=FARTHEST).contains(&from) {
            return false;
        }
        // Begins in the buffer or before it and ends behind it: no window ever allowed that. smoltcp would cut it off but
        // believe a FIN at its end.
        if from < capacity && to > capacity {
            return false;
        }
        // Data behind the end of the stream.
        !(filling.ended && segment.len > 0 && to > filling.queued as i64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: usize = 65535;

    fn segment(seq: u32, len: usize) -> Segment {
        Segment { seq, len, syn: false, fin: false, rst: false }
    }

    /// A window whose first byte has the sequence number `start`.
    fn window(start: u32) -> ReceiveWindow {
        let mut window = ReceiveWindow::new(CAPACITY);
        window.synchronize(segment(start.wrapping_sub(1), 0));
        window
    }

    #[test]
    fn segments_that_overrun_the_buffer_or_are_far_away_are_kept_out() {
        let open = Filling { queued: 100, ended: false };
        // Sequence numbers wrap: the same holds everywhere.
        for start in [0, 1000, u32::MAX - 10, 1 << 31] {
            let window = window(start);
            for (offset, len, admitted) in [
                (100, 1000, true),
                (100, CAPACITY - 100, true),
                (100, CAPACITY - 99, false),
                (-5000, 1000, true),
                (-5000, CAPACITY + 5001, false),
                (CAPACITY as i64, 1, true), // a window probe
                (FARTHEST, 0, true),
                (FARTHEST + 1, 0, false),
                (-FARTHEST - 1, 0, false),
                ((1 << 31) - 1, 10, false),
            ] {
                let seq = start.wrapping_add(offset as u32);
                assert_eq!(window.admits(segment(seq, len), open), admitted, "{start} {offset} {len}");
            }
        }
    }

    #[test]
    fn nothing_comes_after_the_end() {
        let window = window(1000);
        let ended = Filling { queued: 100, ended: true };
        assert!(window.admits(segment(1000, 100), ended), "sent again");
        assert!(window.admits(segment(1101, 0), ended), "an acknowledgement");
        assert!(!window.admits(segment(1101, 1), ended));
        assert!(!window.admits(segment(1000, 102), ended));
    }

    #[test]
    fn the_buffer_moves_on_as_data_is_taken() {
        let mut window = window(u32::MAX);
        let empty = Filling { queued: 0, ended: false };
        assert!(!window.admits(segment(0, CAPACITY), empty));
        window.consume(10);
        assert!(window.admits(segment(9, CAPACITY), empty));
        assert!(!window.admits(segment(10, CAPACITY), empty));
    }

    /// What smoltcp makes of a buffer's size: `Socket::new`, the SYN in `dispatch`, and the window's end in `process`.
    #[test]
    fn buffers_are_as_large_as_smoltcp_believes_after_a_syn() {
        for size in BUFFER_SIZES {
            let shift = (usize::BITS - size.leading_zeros()).saturating_sub(16);
            assert_eq!(size.min(usize::from(u16::MAX)) << shift, size);
        }
    }
}
