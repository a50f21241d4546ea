//! A hostile guest, and peers of the host that are no better, as a string of bytes tells them to behave. The fuzz target
//! (`fuzz/`) lets libFuzzer find such strings; the tests run some of them every time.
//!
//! Nothing leaves the machine: whatever the bytes say, packets go to the stack itself, to addresses that it must refuse, or
//! through the gateway to the servers here.

use crate::frames::*;
use outboard_netstack::address::{DNS, GATEWAY, GUEST};
use outboard_netstack::{Checksum, Stack};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::*;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

/// Steps of one scenario, so that each is short.
const MAX_STEPS: usize = 200;
/// Connections that the guest begins, by its port.
const GUEST_PORTS: [u16; 3] = [2000, 2001, 2002];
/// The guest's port that a forward leads to.
const SERVED_PORT: u16 = 80;
/// The most data that a segment or datagram carries on the link, nearly.
const LARGEST_PAYLOAD: usize = 65_480;

/// The host's servers; all scenarios of a process share them.
pub struct World {
    tcp: TcpListener,
    udp: UdpSocket,
    dns: UdpSocket,
}

impl World {
    pub fn new() -> Self {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let dns = UdpSocket::bind("127.0.0.1:0").unwrap();
        tcp.set_nonblocking(true).unwrap();
        udp.set_nonblocking(true).unwrap();
        dns.set_nonblocking(true).unwrap();
        Self { tcp, udp, dns }
    }

    /// Runs the scenario that `input` describes.
    pub fn run(&self, input: &[u8]) {
        while self.tcp.accept().is_ok() {}
        let options = format!(
            "user,dns={},forward=127.0.0.1:0:{SERVED_PORT},forward=udp:127.0.0.1:0:{SERVED_PORT}",
            self.dns.local_addr().unwrap()
        );
        let mut scenario = Scenario {
            world: self,
            stack: stack(&options),
            input: Input(input),
            connections: [Connection::default(); 4],
            streams: Vec::new(),
            peer_port: 0,
        };
        for _ in 0..MAX_STEPS {
            let Some(kind) = scenario.input.next() else { break };
            scenario.step(kind);
        }
        scenario.stack.run();
        assert_alive(&mut scenario.stack);
        // Breaks connections rather than closing them: closed ones would use up the host's ports.
        scenario.stack.reset();
        assert_alive(&mut scenario.stack);
    }
}

/// The bytes that are left; zeros once they are used up.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn u8(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | (u32::from(self.u16()) << 16)
    }

    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

/// What the guest knows of a connection.
#[derive(Clone, Copy, Default)]
struct Connection {
    /// The guest's next sequence number, and the stack's.
    next: u32,
    theirs: u32,
}

struct Scenario<'a> {
    world: &'a World,
    stack: Stack,
    input: Input<'a>,
    /// Those of [`GUEST_PORTS`], and the one that a peer of the forward began.
    connections: [Connection; 4],
    /// The host's ends.
    streams: Vec<TcpStream>,
    /// The port that the forward's peer seems to have.
    peer_port: u16,
}

impl Scenario<'_> {
    fn step(&mut self, kind: u8) {
        match kind % 16 {
            0..=4 => self.segment(),
            5 => self.raw_frame(),
            6 => self.fragment(),
            7 => self.datagram(),
            8 => self.host_stream(),
            9 => self.host_datagrams(),
            10 => self.connect_to_forward(),
            11..=13 => self.turn(),
            14 => self.take_frames(),
            _ => self.rare(),
        }
    }

    /// A TCP segment that makes sense up to a point.
    fn segment(&mut self) {
        let shape = self.input.u8();
        let index = usize::from(shape & 3);
        let connection = self.connections[index];
        let (from, port) = match GUEST_PORTS.get(index) {
            Some(port) => (*port, self.world.tcp.local_addr().unwrap().port()),
            None => (SERVED_PORT, self.peer_port),
        };
        let flags = self.input.u8();
        let control = match flags & 7 {
            0 => TcpControl::Syn,
            1 => TcpControl::Fin,
            2 => TcpControl::Rst,
            3 => TcpControl::Psh,
            _ => TcpControl::None,
        };
        let seq = connection.next.wrapping_add(self.distance(shape >> 2));
        let ack = connection.theirs.wrapping_add(self.distance(shape >> 4));
        let len = if flags & 8 != 0 { usize::from(self.input.u16()).min(LARGEST_PAYLOAD) } else { 0 };
        let opens = control == TcpControl::Syn;
        let repr = TcpRepr {
            src_port: from,
            dst_port: port.max(1),
            control,
            seq_number: TcpSeqNumber(seq.cast_signed()),
            ack_number: (flags & 16 == 0).then_some(TcpSeqNumber(ack.cast_signed())),
            window_len: if flags & 32 != 0 { self.input.u16() } else { u16::MAX },
            window_scale: (opens && flags & 64 == 0).then(|| self.input.u8()),
            max_seg_size: (opens && flags & 128 == 0).then(|| self.input.u16()),
            sack_permitted: opens && shape & 64 == 0,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &vec![flags; len],
        };
        // In order, the next segment follows this one.
        if shape & 12 == 0 {
            let occupied = len as u32 + u32::from(matches!(control, TcpControl::Syn | TcpControl::Fin));
            self.connections[index].next = seq.wrapping_add(occupied);
        }
        let mut segment = vec![0; repr.buffer_len()];
        let mut packet = TcpPacket::new_unchecked(&mut segment[..]);
        // The checksum is left out, as drivers do: making and verifying it would take most of a scenario's time.
        repr.emit(&mut packet, &GUEST.into(), &GATEWAY.into(), &ChecksumCapabilities::ignored());
        let packet = ipv4(GUEST, GATEWAY, IpProtocol::Tcp, &segment);
        self.stack.push(&ethernet(EthernetProtocol::Ipv4, &packet), Checksum::Ignore);
    }

    /// How far a sequence number is from where it should be.
    fn distance(&mut self, kind: u8) -> u32 {
        match kind & 3 {
            0 => 0,
            1 => u32::from(self.input.u16()),
            2 => u32::from(self.input.u16()).wrapping_neg(),
            _ => self.input.u32(),
        }
    }

    fn push(&mut self, packet: &[u8]) {
        let frame = ethernet(EthernetProtocol::Ipv4, packet);
        self.stack.push(&frame, Checksum::Complete);
    }

    /// Any bytes, behind headers that are right in the places that would lead outside.
    fn raw_frame(&mut self) {
        let len = usize::from(self.input.u8());
        let mut frame = self.input.bytes(len).to_vec();
        let shape = self.input.u8();
        if shape & 1 == 0 && frame.len() >= 14 {
            frame[..6].copy_from_slice(&ROUTER_MAC.0);
            frame[6..12].copy_from_slice(&GUEST_MAC.0);
            frame[12..14].copy_from_slice(if shape & 2 == 0 { &[8, 0] } else { &[8, 6] });
        }
        self.tame(&mut frame, shape);
        self.stack.push(&frame, if shape & 4 == 0 { Checksum::Ignore } else { Checksum::Complete });
    }

    /// Keeps an IPv4 frame within the machine: a destination that is here or forbidden, a port that is ours.
    fn tame(&self, frame: &mut [u8], shape: u8) {
        if frame.len() < 34 || frame[12..14] != [8, 0] {
            return;
        }
        let to: [u8; 4] = match shape >> 4 {
            0..=8 => GATEWAY.octets(),
            9 => DNS.octets(),
            10 => [10, 0, 2, 99],
            11 => [127, 0, 0, 1],
            12 => [169, 254, 169, 254],
            13 => [255, 255, 255, 255],
            14 => [224, 0, 0, 251],
            _ => [0, 0, 0, 0],
        };
        if shape & 8 == 0 {
            frame[14] = 0x45 | (frame[14] & 0x02);
            frame[26..30].copy_from_slice(&GUEST.octets());
        }
        frame[30..34].copy_from_slice(&to);
        let payload = 14 + usize::from(frame[14] & 0xf) * 4;
        let port = if frame[23] == 6 { self.world.tcp.local_addr() } else { self.world.udp.local_addr() };
        if to == GATEWAY.octets()
            && let Some(field) = frame.get_mut(payload + 2..payload + 4)
        {
            field.copy_from_slice(&port.unwrap().port().to_be_bytes());
        }
        let header = payload.min(frame.len());
        frame[24..26].fill(0);
        let sum = !checksum::data(&frame[14..header]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }

    /// A fragment of a datagram to the server.
    fn fragment(&mut self) {
        let (shape, offset, len) = (self.input.u8(), self.input.u16(), self.input.u16());
        let len = usize::from(len).min(LARGEST_PAYLOAD);
        let port = self.world.udp.local_addr().unwrap().port();
        let mut packet = udp((GUEST, 9), (GATEWAY, port), &vec![shape; len]);
        packet[26..28].fill(0);
        let mut header = Ipv4Packet::new_unchecked(&mut packet[..]);
        header.set_ident(u16::from(shape & 7));
        header.set_more_frags(shape & 8 == 0);
        header.set_frag_offset(if shape & 16 == 0 { 0 } else { offset & 0xfff8 });
        header.set_dont_frag(false);
        header.fill_checksum();
        self.push(&packet);
    }

    fn datagram(&mut self) {
        let shape = self.input.u8();
        let len = usize::from(self.input.u16()).min(LARGEST_PAYLOAD);
        let port = self.world.udp.local_addr().unwrap().port();
        let from = 9 + u16::from(shape >> 5);
        let packet = match shape & 7 {
            0 | 1 => udp((GUEST, from), (GATEWAY, port), &vec![shape; len]),
            2 => udp((GUEST, from), (DNS, 53), self.input.bytes(len.min(600))),
            3 => udp((Ipv4Addr::UNSPECIFIED, 68), (Ipv4Addr::BROADCAST, 67), self.input.bytes(len.min(600))),
            4 => udp((GUEST, SERVED_PORT), (GATEWAY, self.peer_port.max(1)), &vec![shape; len]),
            5 => udp((GUEST, from), ([169, 254, 169, 254].into(), 80), b"x"),
            6 => ping(GATEWAY),
            _ => ping([10, 0, 2, 77].into()),
        };
        self.push(&packet);
    }

    /// Something that a program of the host does with its end of a connection.
    fn host_stream(&mut self) {
        if let Ok((stream, _)) = self.world.tcp.accept() {
            stream.set_nonblocking(true).unwrap();
            self.streams.push(stream);
        }
        let (which, action) = (self.input.u8(), self.input.u8());
        if self.streams.is_empty() {
            return;
        }
        let index = usize::from(which) % self.streams.len();
        let stream = &mut self.streams[index];
        // What fails fails because of an earlier step.
        match action % 6 {
            0 | 1 => drop(stream.write(&vec![action; 1 + 700 * usize::from(action)])),
            2 => drop(stream.read(&mut vec![0; 1 + 4000 * usize::from(action)])),
            3 => drop(stream.shutdown(Shutdown::Write)),
            4 => drop(self.streams.swap_remove(index)),
            _ => {
                let stream = self.streams.swap_remove(index);
                drop(socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)));
            }
        }
    }

    /// The servers answer what came.
    fn host_datagrams(&mut self) {
        let mut buffer = vec![0; 65536];
        for socket in [&self.world.udp, &self.world.dns] {
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..len], from);
            }
        }
    }

    fn connect_to_forward(&mut self) {
        let address: SocketAddr = self.stack.forwards()[0].host;
        if self.streams.len() < 8
            && let Ok(stream) = TcpStream::connect(address)
        {
            stream.set_nonblocking(true).unwrap();
            self.streams.push(stream);
        }
        let _ = self.world.udp.send_to(&[self.input.u8()], self.stack.forwards()[1].host);
    }

    /// The stack's turn.
    fn turn(&mut self) {
        self.stack.run();
        self.stack.wait(Some(Duration::ZERO)).unwrap();
        self.stack.run();
    }

    /// The guest takes its frames, and learns from them.
    fn take_frames(&mut self) {
        for packet in drain(&mut self.stack) {
            let Ok(ip) = Ipv4Packet::new_checked(&packet[..]) else { panic!("not IPv4: {packet:?}") };
            if ip.next_header() != IpProtocol::Tcp {
                continue;
            }
            let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else { panic!("not TCP: {packet:?}") };
            let index = match GUEST_PORTS.iter().position(|port| *port == tcp.dst_port()) {
                Some(index) => index,
                None => {
                    self.peer_port = tcp.src_port();
                    3
                }
            };
            let end = tcp.seq_number() + tcp.segment_len();
            self.connections[index].theirs = end.0.cast_unsigned();
        }
    }

    fn rare(&mut self) {
        match self.input.u8() % 8 {
            0 => self.stack.reset(),
            1 => self.stack.offer_partial_checksums(true),
            2 => self.stack.offer_partial_checksums(false),
            _ => self.turn(),
        }
    }
}
