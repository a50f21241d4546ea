use crate::frame::{IPV4_HEADER, finish_ipv4_header};
use smoltcp::wire::Ipv4Packet;
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Datagrams being put together at a time; the oldest gives way.
const MAX_PARTIAL: usize = 8;
/// Separate runs of bytes of one datagram that are kept apart; a datagram in more pieces is dropped.
const MAX_RUNS: usize = 64;
/// How long pieces are kept; RFC 791 suggests 15 s.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Puts the guest's IPv4 fragments together, in bounded memory (8 times 64 KiB).
#[derive(Default)]
pub(crate) struct Reassembler {
    partial: VecDeque<Partial>,
}

struct Partial {
    key: (Ipv4Addr, u8, u16),
    started: Instant,
    /// A header without options, then the payload as far as it was seen.
    packet: Vec<u8>,
    /// Payload bytes that are there: sorted, not touching.
    runs: Vec<(usize, usize)>,
    /// Length of the whole payload, known from the last fragment.
    total: Option<usize>,
}

impl Reassembler {
    /// Takes a fragment; gives the whole packet, with a header that says so, when this was the last missing piece.
    ///
    /// Overlapping pieces are an attack (RFC 5722): the whole datagram is dropped.
    pub(crate) fn add(&mut self, fragment: &Ipv4Packet<&[u8]>, now: Instant) -> Option<Vec<u8>> {
        self.partial.retain(|p| now.duration_since(p.started) < TIMEOUT);
        let key = (fragment.dst_addr(), u8::from(fragment.next_header()), fragment.ident());
        let at = match self.partial.iter().position(|p| p.key == key) {
            Some(at) => at,
            None => {
                if self.partial.len() >= MAX_PARTIAL {
                    self.partial.pop_front();
                }
                self.partial.push_back(Partial::new(key, fragment, now));
                self.partial.len() - 1
            }
        };
        match self.partial[at].add(fragment) {
            Ok(false) => None,
            Ok(true) => self.partial.remove(at).map(Partial::finish),
            Err(Bad) => {
                self.partial.remove(at);
                None
            }
        }
    }
}

/// The pieces contradict each other.
struct Bad;

impl Partial {
    fn new(key: (Ipv4Addr, u8, u16), fragment: &Ipv4Packet<&[u8]>, now: Instant) -> Self {
        let mut packet = vec![0u8; IPV4_HEADER];
        packet[0] = 0x45; // version 4, five words: options, if any, are left out
        packet[8] = fragment.hop_limit();
        packet[9] = key.1;
        packet[12..16].copy_from_slice(&fragment.src_addr().octets());
        packet[16..20].copy_from_slice(&key.0.octets());
        Self { key, started: now, packet, runs: Vec::new(), total: None }
    }

    /// Whether the datagram is complete now.
    fn add(&mut self, fragment: &Ipv4Packet<&[u8]>) -> Result<bool, Bad> {
        let payload = fragment.payload();
        let start = usize::from(fragment.frag_offset());
        let end = start + payload.len();
        if payload.is_empty() || IPV4_HEADER + end > usize::from(u16::MAX) {
            return Err(Bad);
        }
        if !fragment.more_frags() {
            if self.total.is_some_and(|t| t != end) || self.runs.last().is_some_and(|r| r.1 > end) {
                return Err(Bad);
            }
            self.total = Some(end);
        } else if !payload.len().is_multiple_of(8) || self.total.is_some_and(|t| end > t) {
            return Err(Bad);
        }
        self.mark(start, end)?;
        if self.packet.len() < IPV4_HEADER + end {
            self.packet.resize(IPV4_HEADER + end, 0);
        }
        self.packet[IPV4_HEADER + start..IPV4_HEADER + end].copy_from_slice(payload);
        Ok(self.total.is_some_and(|t| self.runs == [(0, t)]))
    }

    fn mark(&mut self, start: usize, end: usize) -> Result<(), Bad> {
        let at = self.runs.partition_point(|r| r.1 <= start);
        if self.runs.get(at).is_some_and(|r| r.0 < end) {
            return Err(Bad);
        }
        self.runs.insert(at, (start, end));
        if self.runs.get(at + 1).is_some_and(|r| r.0 == end) {
            self.runs[at].1 = self.runs.remove(at + 1).1;
        }
        if at > 0 && self.runs[at - 1].1 == start {
            self.runs[at - 1].1 = self.runs.remove(at).1;
        }
        if self.runs.len() > MAX_RUNS { Err(Bad) } else { Ok(()) }
    }

    fn finish(mut self) -> Vec<u8> {
        let total = self.packet.len() as u16;
        self.packet[2..4].copy_from_slice(&total.to_be_bytes());
        finish_ipv4_header(&mut self.packet[..IPV4_HEADER]);
        self.packet
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fragment(ident: u16, offset: usize, more: bool, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0u8; IPV4_HEADER];
        bytes.extend_from_slice(payload);
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
        packet.set_version(4);
        packet.set_header_len(20);
        packet.set_total_len((IPV4_HEADER + payload.len()) as u16);
        packet.set_ident(ident);
        packet.set_more_frags(more);
        packet.set_frag_offset(offset as u16);
        packet.set_next_header(smoltcp::wire::IpProtocol::Udp);
        packet.fill_checksum();
        bytes
    }

    fn add(r: &mut Reassembler, bytes: &[u8], now: Instant) -> Option<Vec<u8>> {
        r.add(&Ipv4Packet::new_checked(bytes).unwrap(), now)
    }

    #[test]
    fn overlaps_drop_the_datagram_and_old_pieces_expire() {
        let (mut r, now) = (Reassembler::default(), Instant::now());
        assert_eq!(add(&mut r, &fragment(1, 0, true, &[1; 16]), now), None);
        assert_eq!(add(&mut r, &fragment(1, 8, true, &[2; 16]), now), None);
        assert!(r.partial.is_empty());
        assert_eq!(add(&mut r, &fragment(2, 0, true, &[1; 16]), now), None);
        assert_eq!(add(&mut r, &fragment(2, 16, false, &[1; 3]), now + TIMEOUT), None);
        assert_eq!(r.partial.len(), 1, "the first piece is gone, the last one waits");
    }

    #[test]
    fn a_flood_keeps_memory_bounded() {
        let (mut r, now) = (Reassembler::default(), Instant::now());
        for ident in 0..5000 {
            add(&mut r, &fragment(ident, 64000, true, &[0; 1024]), now);
        }
        assert_eq!(r.partial.len(), MAX_PARTIAL);
        for piece in 0..1000 {
            add(&mut r, &fragment(9999, piece * 16, true, &[0; 8]), now);
        }
        assert!(r.partial.iter().all(|p| p.runs.len() <= MAX_RUNS));
        assert_eq!(add(&mut r, &fragment(7, 65528, false, &[0; 8]), now), None, "beyond 64 KiB");
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_make_the_whole(
            payload in proptest::collection::vec(any::<u8>(), 1..5000),
            size in 1usize..100,
            seed in any::<u64>(),
        ) {
            let size = size.max(payload.len() / 8 / MAX_RUNS + 1) * 8;
            let mut pieces: Vec<_> = payload.chunks(size).enumerate().map(|(i, chunk)| {
                fragment(5, i * size, (i + 1) * size < payload.len(), chunk)
            }).collect();
            let mut state = seed | 1;
            for i in (1..pieces.len()).rev() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                pieces.swap(i, (state >> 33) as usize % (i + 1));
            }
            let (mut r, now) = (Reassembler::default(), Instant::now());
            let last = pieces.pop().unwrap();
            for piece in &pieces {
                prop_assert_eq!(add(&mut r, piece, now), None);
            }
            let whole = add(&mut r, &last, now).expect("all pieces are there");
            let packet = Ipv4Packet::new_checked(&whole[..]).unwrap();
            prop_assert!(packet.verify_checksum() && !packet.more_frags());
            prop_assert_eq!(packet.payload(), &payload[..]);
        }
    }
}
