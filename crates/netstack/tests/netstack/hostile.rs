//! A guest that sends what no sane driver would. After everything the stack must still serve.

use crate::frames::*;
use crate::guest::pattern;
use outboard_netstack::address::{DNS, GATEWAY, GUEST};
use outboard_netstack::{Checksum, Stack};
use proptest::prelude::*;
use smoltcp::wire::*;
use std::net::UdpSocket;
use std::time::Duration;

/// Waits for packets for the guest.
fn receive(stack: &mut Stack) -> Vec<Vec<u8>> {
    loop {
        stack.run();
        let packets = drain(stack);
        if !packets.is_empty() {
            return packets;
        }
        stack.wait(Some(Duration::from_secs(60))).unwrap();
    }
}

#[test]
fn only_the_guests_own_address_is_served() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut stack = stack("user");
    for spoofed in [[10, 0, 2, 16], [10, 0, 2, 2], [127, 0, 0, 1], [8, 8, 8, 8], [0, 0, 0, 0], [255; 4]] {
        push(&mut stack, &udp((spoofed.into(), 9), (GATEWAY, port), b"spoofed"));
        push(&mut stack, &tcp((spoofed.into(), 9), (GATEWAY, 1), TcpControl::Syn, b""));
    }
    stack.run();
    assert_eq!(drain(&mut stack), Vec::<Vec<u8>>::new());
    push(&mut stack, &udp((GUEST, 9), (GATEWAY, port), b"true"));
    let mut buffer = [0; 16];
    let (n, _) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"true", "nothing spoofed came before it");
}

#[test]
fn wrong_checksums_are_dropped_unless_the_guest_left_them_out() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = (GATEWAY, server.local_addr().unwrap().port());
    let mut stack = stack("user");
    for (data, checksum) in [(b"1", Checksum::Complete), (b"2", Checksum::Ignore)] {
        let mut packet = udp((GUEST, 9), to, data);
        packet[26] ^= 1;
        stack.push(&ethernet(EthernetProtocol::Ipv4, &packet), checksum);
    }
    let mut buffer = [0; 16];
    let (n, _) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"2");
}

#[test]
fn the_guest_may_finish_checksums_itself() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = (GATEWAY, server.local_addr().unwrap().port());
    let mut stack = stack("user");
    stack.offer_partial_checksums(true);
    push(&mut stack, &udp((GUEST, 9), to, b"question"));
    let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
    server.send_to(b"answer", from).unwrap();
    while stack.front().is_none() {
        stack.wait(None).unwrap();
        stack.run();
    }
    let frame = stack.front().unwrap();
    let partial = frame.partial_checksum().unwrap();
    // What a driver does with VIRTIO_NET_HDR_F_NEEDS_CSUM: sum everything from `start`, the field as it is included.
    let mut bytes = frame.bytes().to_vec();
    let start = usize::from(partial.start);
    let sum = !checksum::data(&bytes[start..]);
    bytes[start + usize::from(partial.offset)..][..2].copy_from_slice(&sum.to_be_bytes());
    let packet = UdpPacket::new_checked(&bytes[34..]).unwrap();
    assert!(packet.checksum() != 0 && packet.verify_checksum(&GATEWAY.into(), &GUEST.into()));
}

#[test]
fn the_largest_datagrams_travel_in_fragments_both_ways() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let data = pattern(65_507, 5);
    let whole = udp((GUEST, 9), (GATEWAY, port), &data);
    let mut stack = stack("user");
    // The guest's MTU is 1500, as if its user had set it; the pieces come in reverse.
    let pieces: Vec<_> = whole[20..].chunks(1480).collect();
    for (i, piece) in pieces.iter().enumerate().rev() {
        let mut packet = ipv4(GUEST, GATEWAY, IpProtocol::Udp, piece);
        let mut header = Ipv4Packet::new_unchecked(&mut packet[..]);
        header.set_dont_frag(false);
        header.set_ident(7);
        header.set_frag_offset((i * 1480) as u16);
        header.set_more_frags(i + 1 < pieces.len());
        header.fill_checksum();
        push(&mut stack, &packet);
    }
    let mut buffer = vec![0; 65536];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert!(buffer[..n] == data);

    server.send_to(&data, from).unwrap();
    let pieces = receive(&mut stack);
    assert_eq!(pieces.len(), 2);
    let mut payload = Vec::new();
    for (i, piece) in pieces.iter().enumerate() {
        let packet = Ipv4Packet::new_checked(&piece[..]).unwrap();
        assert!(packet.verify_checksum() && piece.len() <= 65520);
        assert_eq!((usize::from(packet.frag_offset()), packet.more_frags()), (payload.len(), i == 0));
        payload.extend_from_slice(packet.payload());
    }
    let datagram = UdpPacket::new_checked(&payload[..]).unwrap();
    assert!(datagram.verify_checksum(&GATEWAY.into(), &GUEST.into()));
    assert!(datagram.payload() == data);
}

#[test]
fn a_closed_udp_port_is_reported() {
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut stack = stack("user,host-loopback=off");
    push(&mut stack, &udp((GUEST, 9), (GATEWAY, port), b"x"));
    let answer = drain(&mut stack).remove(0);
    assert_eq!((answer[9], answer[20], answer[21]), (1, 3, 3), "ICMP port unreachable");
}

#[test]
fn a_guest_that_takes_no_frames_costs_bounded_memory() {
    let mut stack = stack("user");
    for _ in 0..5000 {
        push(&mut stack, &ping(GATEWAY));
    }
    assert_eq!(drain(&mut stack).len(), 256);
    assert_alive(&mut stack);
}

/// Frames near to valid ones: that is where parsers break.
fn seeds() -> Vec<Vec<u8>> {
    let mut fragment = udp((GUEST, 9), (GATEWAY, 9), &[1; 64]);
    let mut header = Ipv4Packet::new_unchecked(&mut fragment[..]);
    header.set_more_frags(true);
    header.fill_checksum();
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: GUEST_MAC,
        source_protocol_addr: GUEST,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: GATEWAY,
    };
    let mut arp_bytes = vec![0; 28];
    arp.emit(&mut ArpPacket::new_unchecked(&mut arp_bytes[..]));
    let mut packets: Vec<_> =
        [TcpControl::Syn, TcpControl::None, TcpControl::Fin, TcpControl::Rst, TcpControl::Psh]
            .iter()
            .map(|control| tcp((GUEST, 9), (GATEWAY, 1), *control, b"data"))
            .collect();
    packets.push(udp((GUEST, 9), (DNS, 1), b"query"));
    packets.push(udp(([0; 4].into(), 68), ([255; 4].into(), 67), &[1; 300]));
    packets.push(ping(GATEWAY));
    packets.push(fragment);
    let mut frames: Vec<_> = packets.iter().map(|p| ethernet(EthernetProtocol::Ipv4, p)).collect();
    frames.push(ethernet(EthernetProtocol::Arp, &arp_bytes));
    frames
}

/// Makes the IPv4 header's checksum right again, so that mutations get past the first check.
fn repair(frame: &mut [u8]) {
    let header = frame.get(14).map_or(0, |b| usize::from(b & 0xf) * 4);
    if frame[12..14] == [8, 0] && header >= 20 && frame.len() >= 14 + header {
        frame[24..26].fill(0);
        let sum = !checksum::data(&frame[14..14 + header]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_frames_do_harm(
        mutations in proptest::collection::vec(
            (any::<prop::sample::Index>(), proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
             any::<prop::sample::Index>(), any::<bool>()),
            1..40,
        ),
        noise in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..5),
    ) {
        let mut stack = stack("user,host-loopback=off,dns=127.0.0.1:1");
        let seeds = seeds();
        for (seed, changes, cut, whole) in mutations {
            let mut frame = seed.get(&seeds).clone();
            for (at, value) in changes {
                // Not the destination address beyond 10.0.2.0/24: a test must not send packets to the Internet.
                let at = 12 + at.index(frame.len() - 12);
                if !(30..33).contains(&at) {
                    frame[at] = value;
                }
            }
            if !whole {
                frame.truncate(14 + cut.index(frame.len() - 13));
            }
            repair(&mut frame);
            stack.push(&frame, Checksum::Ignore);
            stack.run();
        }
        for frame in noise {
            stack.push(&frame, Checksum::Ignore);
        }
        assert_alive(&mut stack);
    }
}
