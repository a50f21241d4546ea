//! Frames as a guest sends them, made by hand.

use outboard_netstack::address::{GATEWAY, GUEST};
use outboard_netstack::{Checksum, NetOptions, Stack};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::*;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

pub const ROUTER_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);
pub const GUEST_MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

/// Options with the way to the host's loopback interface open, where the tests' servers are, unless `text` closes it.
pub fn options(text: &str) -> NetOptions {
    let options: NetOptions = text.parse().unwrap();
    NetOptions { host_loopback: !text.contains("host-loopback=off"), ..options }
}

pub fn stack(text: &str) -> Stack {
    Stack::new(&options(text)).unwrap()
}

pub fn ethernet(ethertype: EthernetProtocol, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 14 + payload.len()];
    EthernetRepr { src_addr: GUEST_MAC, dst_addr: ROUTER_MAC, ethertype }
        .emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
    frame[14..].copy_from_slice(payload);
    frame
}

pub fn ipv4(src_addr: Ipv4Addr, dst_addr: Ipv4Addr, next_header: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let repr = Ipv4Repr { src_addr, dst_addr, next_header, payload_len: payload.len(), hop_limit: 64 };
    let mut packet = vec![0; 20 + payload.len()];
    repr.emit(&mut Ipv4Packet::new_unchecked(&mut packet[..]), &ChecksumCapabilities::default());
    packet[20..].copy_from_slice(payload);
    packet
}

pub fn udp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), data: &[u8]) -> Vec<u8> {
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

pub fn tcp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), control: TcpControl, payload: &[u8]) -> Vec<u8> {
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

pub fn ping(to: Ipv4Addr) -> Vec<u8> {
    let repr = Icmpv4Repr::EchoRequest { ident: 1, seq_no: 2, data: b"ping" };
    let mut message = vec![0; repr.buffer_len()];
    repr.emit(&mut Icmpv4Packet::new_unchecked(&mut message[..]), &ChecksumCapabilities::default());
    ipv4(GUEST, to, IpProtocol::Icmp, &message)
}

/// All IPv4 packets that wait for the guest.
pub fn drain(stack: &mut Stack) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while let Some(frame) = stack.front() {
        if frame.bytes()[12..14] == [8, 0] {
            packets.push(frame.bytes()[14..].to_vec());
        }
        stack.pop();
    }
    packets
}

pub fn push(stack: &mut Stack, packet: &[u8]) {
    stack.push(&ethernet(EthernetProtocol::Ipv4, packet), Checksum::Complete);
}

pub fn assert_alive(stack: &mut Stack) {
    drain(stack);
    push(stack, &ping(GATEWAY));
    let answers = drain(stack);
    assert!(answers.iter().any(|p| p[9] == 1 && p[20] == 0), "no echo reply in {answers:?}");
}

/// A TCP segment of the guest.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    pub port: u16,
    pub to: (Ipv4Addr, u16),
    pub control: TcpControl,
    pub seq: u32,
    pub ack: Option<u32>,
    pub scale: Option<u8>,
    pub data: &'a [u8],
}

impl Segment<'_> {
    pub fn packet(&self) -> Vec<u8> {
        let repr = TcpRepr {
            src_port: self.port,
            dst_port: self.to.1,
            control: self.control,
            seq_number: TcpSeqNumber(self.seq as i32),
            ack_number: self.ack.map(|ack| TcpSeqNumber(ack as i32)),
            window_len: u16::MAX,
            window_scale: self.scale,
            max_seg_size: self.scale.map(|_| 65_480),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: self.data,
        };
        let mut segment = vec![0; repr.buffer_len()];
        let mut packet = TcpPacket::new_unchecked(&mut segment[..]);
        repr.emit(&mut packet, &GUEST.into(), &self.to.0.into(), &ChecksumCapabilities::default());
        ipv4(GUEST, self.to.0, IpProtocol::Tcp, &segment)
    }
}

/// What comes for the guest within `patience`, as soon as there is something.
pub fn answers(stack: &mut Stack, patience: Duration) -> Vec<Vec<u8>> {
    let end = Instant::now() + patience;
    loop {
        stack.run();
        let packets = drain(stack);
        if !packets.is_empty() || Instant::now() > end {
            return packets;
        }
        stack.wait(Some(Duration::from_millis(5))).unwrap();
    }
}

/// Opens a connection from `port`; the stack's initial sequence number, `None` where it was refused.
pub fn open(stack: &mut Stack, syn: Segment<'_>) -> Option<u32> {
    push(stack, &syn.packet());
    let packets = answers(stack, Duration::from_secs(5));
    let answer = packets.iter().find(|packet| packet[9] == 6).expect("an answer to SYN");
    let answer = TcpPacket::new_checked(&answer[20..]).unwrap();
    (!answer.rst()).then(|| answer.seq_number().0 as u32)
}

/// A server on the host's loopback, and where the guest finds it.
pub fn server() -> (TcpListener, (Ipv4Addr, u16)) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, (GATEWAY, port))
}

/// The segment that opens a connection from `port`, with window scaling.
pub fn syn(port: u16, to: (Ipv4Addr, u16)) -> Segment<'static> {
    Segment { port, to, control: TcpControl::Syn, seq: 1000, ack: None, scale: Some(7), data: b"" }
}
