use crate::address::{MTU, Subnet};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{IpProtocol, checksum};
use std::collections::VecDeque;
use std::net::Ipv4Addr;

pub(crate) const ETHERNET_HEADER: usize = 14;
pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const UDP_HEADER: usize = 8;
/// EtherTypes (IEEE 802 numbers).
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;

/// The largest frame on the link, in bytes, without the frame check sequence.
pub const MAX_FRAME: usize = ETHERNET_HEADER + MTU as usize;

/// A buffer also holds a datagram of the largest size IPv4 has, before it is cut into fragments.
const BUFFER: usize = ETHERNET_HEADER + u16::MAX as usize;

/// Sockets stop sending when this many frames wait for the guest.
const ROOM: usize = 64;
/// Replies to the guest's own frames are dropped when this many wait: a guest that sends but never receives.
const LIMIT: usize = 256;

/// Where the receiver finishes a TCP or UDP checksum: the field holds the pseudo-header's sum only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// First byte to sum, in bytes from the start of the frame.
    pub start: u16,
    /// Where the sum goes, in bytes from `start`.
    pub offset: u16,
}

/// An Ethernet frame for the guest.
#[derive(Debug)]
pub struct Frame {
    buffer: Vec<u8>,
    len: usize,
    checksum: Option<PartialChecksum>,
}

impl Frame {
    /// The frame, without a frame check sequence.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    /// What the guest has to finish; `None` if the frame is complete. Only with [`crate::Stack::offer_partial_checksums`].
    pub fn partial_checksum(&self) -> Option<PartialChecksum> {
        self.checksum
    }
}

/// Frames on their way to the guest, and the buffers they are made in.
pub(crate) struct Outbox {
    queue: VecDeque<Frame>,
    spare: Vec<Vec<u8>>,
    router_mac: [u8; 6],
    /// The guest's MAC address, as its own frames last gave it.
    pub(crate) guest_mac: [u8; 6],
    /// The guest finishes TCP and UDP checksums itself.
    pub(crate) partial_checksums: bool,
    next_ident: u16,
}

impl Outbox {
    pub(crate) fn new(guest_mac: [u8; 6], subnet: Subnet) -> Self {
        Self {
            queue: VecDeque::new(),
            spare: Vec::new(),
            router_mac: subnet.router_mac(),
            guest_mac,
            partial_checksums: false,
            next_ident: 0,
        }
    }

    /// Whether sockets may add frames.
    pub(crate) fn has_room(&self) -> bool {
        self.queue.len() < ROOM
    }

    pub(crate) fn front(&self) -> Option<&Frame> {
        self.queue.front()
    }

    /// Takes the oldest frame away; its buffer is used again.
    pub(crate) fn pop(&mut self) -> bool {
        let Some(frame) = self.queue.pop_front() else { return false };
        self.recycle(frame.buffer);
        true
    }

    pub(crate) fn clear(&mut self) {
        while self.pop() {}
    }

    /// A buffer of the largest size, with any contents. Pages that nobody writes take no memory.
    pub(crate) fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_else(|| vec![0; BUFFER])
    }

    pub(crate) fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < ROOM {
            self.spare.push(buffer);
        }
    }

    /// Sends a complete payload of an Ethernet frame that starts at [`ETHERNET_HEADER`] of `buffer`.
    pub(crate) fn push_ethernet(&mut self, mut buffer: Vec<u8>, payload: usize, ethertype: u16, to: [u8; 6]) {
        if self.queue.len() >= LIMIT {
            self.recycle(buffer);
            return;
        }
        buffer[..6].copy_from_slice(&to);
        buffer[6..12].copy_from_slice(&self.router_mac);
        buffer[12..14].copy_from_slice(&ethertype.to_be_bytes());
        self.queue.push_back(Frame { buffer, len: ETHERNET_HEADER + payload, checksum: None });
    }

    /// Sends the IPv4 packet of `len` bytes at [`ETHERNET_HEADER`] of `buffer`, whose TCP checksum is still to be made.
    fn push_tcp(&mut self, mut buffer: Vec<u8>, len: usize) {
        let packet = &mut buffer[ETHERNET_HEADER..ETHERNET_HEADER + len];
        let checksum = fill_checksum(packet, TCP_CHECKSUM, self.partial_checksums);
        self.push_ipv4(buffer, len, checksum);
    }

    /// Sends a UDP datagram whose payload of `len` bytes (65507 at most) is at [`UDP_PAYLOAD`] of `buffer`.
    pub(crate) fn push_udp(
        &mut self,
        mut buffer: Vec<u8>,
        len: usize,
        from: (Ipv4Addr, u16),
        to: (Ipv4Addr, u16),
    ) {
        let total = IPV4_HEADER + UDP_HEADER + len;
        let udp = &mut buffer[ETHERNET_HEADER + IPV4_HEADER..UDP_PAYLOAD];
        udp[..2].copy_from_slice(&from.1.to_be_bytes());
        udp[2..4].copy_from_slice(&to.1.to_be_bytes());
        udp[4..6].copy_from_slice(&((UDP_HEADER + len) as u16).to_be_bytes());
        // Zero says that there is no checksum (RFC 768), which also serves fragments and guests without offload.
        udp[6..8].fill(0);
        self.write_ipv4_header(&mut buffer, total, IpProtocol::Udp, from.0, to.0);
        let packet = &mut buffer[ETHERNET_HEADER..ETHERNET_HEADER + total];
        let checksum = if self.partial_checksums && total <= usize::from(MTU) {
            fill_checksum(packet, UDP_CHECKSUM, true)
        } else {
            None
        };
        self.push_ipv4(buffer, total, checksum);
    }

    /// Sends an ICMP message of `len` bytes at [`IP_PAYLOAD`] of `buffer`, whose checksum is still to be made.
    pub(crate) fn push_icmp(&mut self, mut buffer: Vec<u8>, len: usize, from: Ipv4Addr, to: Ipv4Addr) {
        let icmp = &mut buffer[IP_PAYLOAD..IP_PAYLOAD + len];
        icmp[2..4].fill(0);
        let sum = !checksum::data(icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        self.write_ipv4_header(&mut buffer, IPV4_HEADER + len, IpProtocol::Icmp, from, to);
        self.push_ipv4(buffer, IPV4_HEADER + len, None);
    }

    fn write_ipv4_header(
        &mut self,
        buffer: &mut [u8],
        len: usize,
        protocol: IpProtocol,
        from: Ipv4Addr,
        to: Ipv4Addr,
    ) {
        self.next_ident = self.next_ident.wrapping_add(1);
        let header = &mut buffer[ETHERNET_HEADER..IP_PAYLOAD];
        header.fill(0);
        header[0] = 0x45; // version 4, five words
        header[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        header[4..6].copy_from_slice(&self.next_ident.to_be_bytes());
        header[8] = 64; // time to live
        header[9] = protocol.into();
        header[12..16].copy_from_slice(&from.octets());
        header[16..20].copy_from_slice(&to.octets());
        finish_ipv4_header(header);
    }

    /// Sends the IPv4 packet at [`ETHERNET_HEADER`] of `buffer`, in fragments where it is larger than the link's MTU.
    fn push_ipv4(&mut self, mut buffer: Vec<u8>, len: usize, checksum: Option<PartialChecksum>) {
        let to = self.guest_mac;
        if len <= usize::from(MTU) {
            let queued = self.queue.len();
            self.push_ethernet(buffer, len, ETHERTYPE_IPV4, to);
            if self.queue.len() > queued
                && let Some(frame) = self.queue.back_mut()
            {
                frame.checksum = checksum;
            }
            return;
        }
        // All fragments but the last carry a multiple of eight bytes (RFC 791).
        let first = (usize::from(MTU) - IPV4_HEADER) & !7;
        let rest = len - IPV4_HEADER - first;
        let mut second = self.buffer();
        second[ETHERNET_HEADER..IP_PAYLOAD].copy_from_slice(&buffer[ETHERNET_HEADER..IP_PAYLOAD]);
        second[IP_PAYLOAD..IP_PAYLOAD + rest]
            .copy_from_slice(&buffer[IP_PAYLOAD + first..IP_PAYLOAD + first + rest]);
        for (buffer, payload, flags_and_offset) in
            [(&mut buffer, first, MORE_FRAGMENTS), (&mut second, rest, (first / 8) as u16)]
        {
            let header = &mut buffer[ETHERNET_HEADER..IP_PAYLOAD];
            header[2..4].copy_from_slice(&((IPV4_HEADER + payload) as u16).to_be_bytes());
            header[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
            finish_ipv4_header(header);
        }
        self.push_ethernet(buffer, IPV4_HEADER + first, ETHERTYPE_IPV4, to);
        self.push_ethernet(second, IPV4_HEADER + rest, ETHERTYPE_IPV4, to);
    }
}

/// Where an IPv4 packet's payload starts in a frame made here.
pub(crate) const IP_PAYLOAD: usize = ETHERNET_HEADER + IPV4_HEADER;
/// Where a UDP datagram's payload starts in a frame made here.
pub(crate) const UDP_PAYLOAD: usize = IP_PAYLOAD + UDP_HEADER;
/// The flag in the IPv4 header's seventh and eighth byte.
pub(crate) const MORE_FRAGMENTS: u16 = 0x2000;

/// Offsets of the checksum in the TCP (RFC 9293) and UDP header.
const TCP_CHECKSUM: u16 = 16;
const UDP_CHECKSUM: u16 = 6;

/// Makes the header's checksum anew; the header is all of `header`.
pub(crate) fn finish_ipv4_header(header: &mut [u8]) {
    header[10..12].fill(0);
    let sum = !checksum::data(header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Fills in the transport checksum at `offset` after the IPv4 header of a packet made here: only the pseudo-header's part
/// if `partial`, which the receiver is told to finish.
fn fill_checksum(packet: &mut [u8], offset: u16, partial: bool) -> Option<PartialChecksum> {
    let pseudo = pseudo_header(packet, IPV4_HEADER);
    let field = IPV4_HEADER + usize::from(offset);
    packet[field..field + 2].fill(0);
    let sum =
        if partial { pseudo } else { !checksum::combine(&[pseudo, checksum::data(&packet[IPV4_HEADER..])]) };
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    partial.then_some(PartialChecksum { start: IP_PAYLOAD as u16, offset })
}

/// Whether the TCP, UDP or ICMP checksum of a packet from the guest is right. `packet` ends where its header says.
pub(crate) fn checksum_is_right(packet: &[u8], header: usize, protocol: IpProtocol) -> bool {
    let data = &packet[header..];
    match protocol {
        IpProtocol::Udp if data.get(6..8) == Some(&[0, 0]) => true,
        IpProtocol::Tcp | IpProtocol::Udp => {
            checksum::combine(&[pseudo_header(packet, header), checksum::data(data)]) == 0xffff
        }
        _ => checksum::data(data) == 0xffff,
    }
}

fn pseudo_header(packet: &[u8], header: usize) -> u16 {
    let length = [0, packet[9], ((packet.len() - header) >> 8) as u8, (packet.len() - header) as u8];
    checksum::combine(&[checksum::data(&packet[12..20]), checksum::data(&length)])
}

/// The device smoltcp sees: at most one packet to receive, and the way to the guest. It deals in IP packets.
pub(crate) struct Link<'a> {
    pub(crate) receive: Option<&'a [u8]>,
    pub(crate) outbox: &'a mut Outbox,
}

pub(crate) struct Received<'a>(&'a [u8]);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

pub(crate) struct Sender<'a>(&'a mut Outbox);

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut buffer = self.0.buffer();
        let result = f(&mut buffer[ETHERNET_HEADER..ETHERNET_HEADER + len]);
        self.0.push_tcp(buffer, len);
        result
    }
}

impl phy::Device for Link<'_> {
    type RxToken<'b>
        = Received<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Sender<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sender<'_>)> {
        Some((Received(self.receive.take()?), Sender(self.outbox)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        self.outbox.has_room().then_some(Sender(self.outbox))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(MTU);
        // Incoming packets are checked before they get here; the transport checksum is made in `push_tcp`.
        capabilities.checksum = ChecksumCapabilities::ignored();
        capabilities.checksum.ipv4 = phy::Checksum::Tx;
        capabilities
    }
}
