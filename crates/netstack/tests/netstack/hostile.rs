//! A guest that sends what no sane driver would. After everything the stack must still serve.

use crate::guest::pattern;
use outboard_netstack::address::{DNS, GATEWAY, GUEST};
use outboard_netstack::{Checksum, NetOptions, Stack};
use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::*;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::time::Duration;

const ROUTER_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);
const GUEST_MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

fn stack(options: &str) -> Stack {
    Stack::new(&options.parse::<NetOptions>().unwrap()).unwrap()
}

fn ethernet(ethertype: EthernetProtocol, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 14 + payload.len()];
    EthernetRepr { src_addr: GUEST_MAC, dst_addr: ROUTER_MAC, ethertype }
        .emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
    frame[14..].copy_from_slice(payload);
    frame
}

fn ipv4(src_addr: Ipv4Addr, dst_addr: Ipv4Addr, next_header: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let repr = Ipv4Repr { src_addr, dst_addr, next_header, payload_len: payload.len(), hop_limit: 64 };
    let mut packet = vec![0; 20 + payload.len()];
    repr.emit(&mut Ipv4Packet::new_unchecked(&mut packet[..]), &ChecksumCapabilities::default());
    packet[20..].copy_from_slice(payload);
    packet
}

fn udp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), data: &[u8]) -> Vec<u8> {
    let repr = UdpRepr { src_port: src.1, dst_port: dst.1 };
    let mut datagram = vec![0; 8 + data.len()];
    repr.emit(
        &mut UdpPacket::new_unchecked(&mut datagram[..]),
        &src.0.into(),
        &dst.0.into(),
        data.len(),
        |payload| payload.copy_from_slice(data),
        &ChecksumCapabilities::default(),
    );
    ipv4(src.0, dst.0, IpProtocol::Udp, &datagram)
}

fn tcp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), control: TcpControl, payload: &[u8]) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: src.1,
        dst_port: dst.1,
        control,
        seq_number: TcpSeqNumber(1000),
        ack_number: None,
        window_len: 1000,
        window_scale: Some(7),
        max_seg_size: Some(1460),
        sack_permitted: true,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let mut segment = vec![0; repr.buffer_len()];
    let mut packet = TcpPacket::new_unchecked(&mut segment[..]);
    repr.emit(&mut packet, &src.0.into(), &dst.0.into(), &ChecksumCapabilities::default());
    ipv4(src.0, dst.0, IpProtocol::Tcp, &segment)
}

fn ping(to: Ipv4Addr) -> Vec<u8> {
    let repr = Icmpv4Repr::EchoRequest { ident: 1, seq_no: 2, data: b"ping" };
    let mut message = vec![0; repr.buffer_len()];
    repr.emit(&mut Icmpv4Packet::new_unchecked(&mut message[..]), &ChecksumCapabilities::default());
    ipv4(GUEST, to, IpProtocol::Icmp, &message)
}

/// All IPv4 packets that wait for the guest.
fn drain(stack: &mut Stack) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while let Some(frame) = stack.front() {
        if frame.bytes()[12..14] == [8, 0] {
            packets.push(frame.bytes()[14..].to_vec());
        }
        stack.pop();
    }
    packets
}

fn push(stack: &mut Stack, packet: &[u8]) {
    stack.push(&ethernet(EthernetProtocol::Ipv4, packet), Checksum::Complete);
}

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

fn assert_alive(stack: &mut Stack) {
    drain(stack);
    push(stack, &ping(GATEWAY));
    let answers = drain(stack);
    assert!(answers.iter().any(|p| p[9] == 1 && p[20] == 0), "no echo reply in {answers:?}");
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
fn a_syn_flood_fills_the_table_and_no_more() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut stack = stack("user");
    let mut refused = 0;
    for source in 1..4000u16 {
        push(&mut stack, &tcp((GUEST, source), (GATEWAY, port), TcpControl::Syn, b""));
        stack.wait(Some(Duration::ZERO)).unwrap();
        stack.run();
        refused += drain(&mut stack).iter().filter(|p| p[9] == 6 && p[33] & 4 != 0).count();
    }
    // The system's limit on open files may end it sooner than the table does.
    assert!(refused >= 4000 - 1 - 1024, "{refused}");
    assert_alive(&mut stack);
}

#[test]
fn a_flood_of_datagrams_reuses_the_table() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut stack = stack("user");
    for source in 1..3000u16 {
        push(&mut stack, &udp((GUEST, source), (GATEWAY, port), b"x"));
        stack.run();
    }
    assert_alive(&mut stack);
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
