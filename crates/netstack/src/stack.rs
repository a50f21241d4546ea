use crate::address::{self, BROADCAST_MAC, DNS, GATEWAY, GUEST, ROUTER_MAC};
use crate::datagram::{self, Cx, Datagrams};
use crate::dhcp;
use crate::flow::Syn;
use crate::fragment::Reassembler;
use crate::frame::{ETHERNET_HEADER, ETHERTYPE_ARP, ETHERTYPE_IPV4, Frame, UDP_PAYLOAD, checksum_is_right};
use crate::guest::{Guest, Unreachable};
use crate::options::{Forward, NetOptions, Protocol};
use crate::resolver::Resolver;
use crate::tcp::{self, TcpFlows};
use crate::window::Segment;
use mio::net::TcpListener;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use outboard_bus::{Event, warn_limited};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, IpProtocol, Ipv4Packet, TcpPacket, UdpPacket,
};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// DHCP ports (RFC 2131) and that of DNS.
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const DNS_PORT: u16 = 53;

/// Why a network cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A forward's port cannot be had.
    #[error("cannot listen on {} {} for the forward to guest port {}: {source}; {}", .forward.protocol, .forward.host, .forward.guest_port, hint(.source))]
    Listen {
        /// The forward.
        forward: Forward,
        /// What the system said.
        source: io::Error,
    },
    /// The operating system refused something else.
    #[error("cannot set up the user-mode network: {0}; check the limit on open files (ulimit -n)")]
    System(#[from] io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::AddrInUse => "another program has this port: stop it or choose another host port",
        ErrorKind::PermissionDenied => "ports below 1024 need privileges: choose a higher host port",
        ErrorKind::AddrNotAvailable => "the host has no such address: leave it out to listen on 127.0.0.1",
        _ => "choose another host address or port",
    }
}

/// Who a readiness event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Waker,
    TcpForward(usize),
    UdpForward(usize),
    Tcp(usize),
    Datagram(usize),
}

/// Tables and lists of sources are far smaller than this.
const SOURCES_OF_A_KIND: usize = 1 << 24;

impl Source {
    pub(crate) fn token(self) -> Token {
        let (kind, index) = match self {
            Self::Waker => (0, 0),
            Self::TcpForward(i) => (1, i),
            Self::UdpForward(i) => (2, i),
            Self::Tcp(i) => (3, i),
            Self::Datagram(i) => (4, i),
        };
        Token(kind * SOURCES_OF_A_KIND + index)
    }

    fn from_token(token: Token) -> Self {
        let index = token.0 % SOURCES_OF_A_KIND;
        match token.0 / SOURCES_OF_A_KIND {
            0 => Self::Waker,
            1 => Self::TcpForward(index),
            2 => Self::UdpForward(index),
            3 => Self::Tcp(index),
            _ => Self::Datagram(index),
        }
    }
}

/// Whether the guest's frame carries a complete transport checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// It does, and it is verified.
    Complete,
    /// It does not, or somebody verified it already.
    Ignore,
}

/// A user-mode network for one guest: a NAT whose outer side is the host's ordinary sockets.
///
/// Passive: the owner's thread waits in [`Stack::wait`], gives frames of the guest to [`Stack::push`], calls
/// [`Stack::run`], and takes frames for the guest from [`Stack::front`] and [`Stack::pop`].
pub struct Stack {
    poll: Poll,
    events: Events,
    wakers: Vec<Arc<Event>>,
    listeners: Vec<TcpForward>,
    forwards: Vec<Forward>,
    mac: [u8; 6],
    host_loopback: bool,
    resolver: Resolver,
    guest: Guest,
    tcp: TcpFlows,
    datagrams: Datagrams,
    reassembler: Reassembler,
    /// The time of this round of work.
    now: Instant,
}

struct TcpForward {
    listener: TcpListener,
    guest_port: u16,
    ready: bool,
}

impl Stack {
    /// Sets the network up and listens on all forwarded ports.
    ///
    /// # Errors
    /// [`NetError`]; nothing is left listening then.
    pub fn new(options: &NetOptions) -> Result<Self, NetError> {
        let mut guest = Guest::new(options.mac);
        let now = guest.tick();
        let mut stack = Self {
            poll: Poll::new()?,
            events: Events::with_capacity(256),
            wakers: Vec::new(),
            listeners: Vec::new(),
            forwards: Vec::new(),
            mac: options.mac,
            host_loopback: options.host_loopback,
            resolver: Resolver::new(options.dns),
            guest,
            tcp: TcpFlows::new(),
            datagrams: Datagrams::new(),
            reassembler: Reassembler::default(),
            now,
        };
        for forward in &options.forwards {
            let host = stack
                .listen(forward)
                .map_err(|source| NetError::Listen { forward: forward.clone(), source })?;
            stack.forwards.push(Forward { host, ..forward.clone() });
        }
        Ok(stack)
    }

    fn listen(&mut self, forward: &Forward) -> io::Result<SocketAddr> {
        let registry = self.poll.registry();
        match forward.protocol {
            Protocol::Udp => self.datagrams.listen(forward, registry),
            Protocol::Tcp => {
                let mut listener = TcpListener::bind(forward.host)?;
                let token = Source::TcpForward(self.listeners.len()).token();
                registry.register(&mut listener, token, Interest::READABLE)?;
                let address = listener.local_addr()?;
                self.listeners.push(TcpForward { listener, guest_port: forward.guest_port, ready: false });
                Ok(address)
            }
        }
    }

    /// The forwards, with the host addresses that were bound.
    pub fn forwards(&self) -> &[Forward] {
        &self.forwards
    }

    /// The guest's configured MAC address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Lets `event` end [`Stack::wait`] too, until [`Stack::reset`]. Taking its signal back is the caller's.
    ///
    /// # Errors
    /// The operating system's.
    pub fn add_waker(&mut self, event: Arc<Event>) -> io::Result<()> {
        let fd = event.as_fd().as_raw_fd();
        self.poll.registry().register(&mut SourceFd(&fd), Source::Waker.token(), Interest::READABLE)?;
        self.wakers.push(event);
        Ok(())
    }

    /// Whether frames for the guest may leave TCP and UDP checksums to it; off after a reset.
    pub fn offer_partial_checksums(&mut self, on: bool) {
        self.guest.outbox.partial_checksums = on;
    }

    /// Forgets the guest, as after its reboot: every connection is broken. Forwards go on listening.
    pub fn reset(&mut self) {
        let Self {
            poll,
            events: _,
            wakers,
            listeners: _,
            forwards: _,
            mac,
            host_loopback: _,
            resolver: _,
            ..
        } = self;
        for event in wakers.drain(..) {
            // Fails only for a descriptor that is not registered.
            let _ = poll.registry().deregister(&mut SourceFd(&event.as_fd().as_raw_fd()));
        }
        self.guest.reset(*mac);
        self.tcp.reset();
        self.datagrams.reset();
        self.reassembler = Reassembler::default();
    }

    /// Waits until there is something to do: a socket is ready, a timer runs out, a waker was signalled or `timeout` is
    /// over (`None`: for ever).
    ///
    /// # Errors
    /// The operating system's, which do not happen in normal operation.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = match (timeout, self.time_to_next()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            other => other?,
        }
        for event in &self.events {
            match Source::from_token(event.token()) {
                Source::Waker => {}
                Source::TcpForward(i) => self.listeners[i].ready = true,
                Source::UdpForward(i) => self.datagrams.forward_ready(i),
                Source::Tcp(id) => self.tcp.host_ready(id, event),
                Source::Datagram(id) => self.datagrams.flow_ready(id),
            }
        }
        Ok(())
    }

    fn time_to_next(&mut self) -> Option<Duration> {
        if self.guest.outbox.has_room() && (self.tcp.has_runnable() || self.datagrams.has_runnable()) {
            return Some(Duration::ZERO);
        }
        let now = self.guest.tick();
        let sweep = self.datagrams.next_sweep().map(|t| t.saturating_duration_since(now));
        let timer = self.tcp.next_deadline().map(|t| {
            let micros = t.total_micros() - self.guest.now.total_micros();
            Duration::from_micros(u64::try_from(micros).unwrap_or(0))
        });
        match (sweep, timer) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Moves data between the host's sockets and the guest's connections, and handles timers. Bounded work.
    pub fn run(&mut self) {
        self.now = self.guest.tick();
        self.accept();
        self.tcp.run(&mut self.guest);
        let (datagrams, mut cx) = self.datagrams();
        datagrams.run(&mut cx);
    }

    /// Whether [`Stack::run`] has more to do right now.
    pub fn has_work(&self) -> bool {
        self.guest.outbox.has_room() && (self.tcp.has_runnable() || self.datagrams.has_runnable())
    }

    /// The oldest frame that waits for the guest.
    pub fn front(&self) -> Option<&Frame> {
        self.guest.outbox.front()
    }

    /// Takes the oldest frame away; `false` if there is none.
    pub fn pop(&mut self) -> bool {
        self.guest.outbox.pop()
    }

    /// Takes a frame from the guest, without frame check sequence. What is malformed, spoofed or not for anybody here is
    /// dropped silently, as a network does.
    pub fn push(&mut self, frame: &[u8], checksum: Checksum) {
        if frame.len() < ETHERNET_HEADER {
            return;
        }
        let (header, payload) = frame.split_at(ETHERNET_HEADER);
        let (to, from) = (&header[..6], &header[6..12]);
        if (to != ROUTER_MAC && to != BROADCAST_MAC) || from[0] & 1 != 0 {
            return;
        }
        self.guest.outbox.guest_mac.copy_from_slice(from);
        match u16::from_be_bytes([header[12], header[13]]) {
            ETHERTYPE_IPV4 => self.push_ipv4(payload, checksum),
            ETHERTYPE_ARP => self.push_arp(payload),
            _ => {}
        }
    }

    fn push_arp(&mut self, payload: &[u8]) {
        let Ok(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = ArpPacket::new_checked(payload).and_then(|p| ArpRepr::parse(&p))
        else {
            return;
        };
        if operation != ArpOperation::Request || ![GATEWAY, DNS].contains(&target_protocol_addr) {
            return;
        }
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: EthernetAddress(ROUTER_MAC),
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        let mut buffer = self.guest.outbox.buffer();
        reply.emit(&mut ArpPacket::new_unchecked(&mut buffer[ETHERNET_HEADER..]));
        let to = self.guest.outbox.guest_mac;
        self.guest.outbox.push_ethernet(buffer, reply.buffer_len(), ETHERTYPE_ARP, to);
    }

    fn push_ipv4(&mut self, payload: &[u8], checksum: Checksum) {
        let Ok(packet) = Ipv4Packet::new_checked(payload) else { return };
        if packet.version() != 4 || packet.header_len() < 20 || !packet.verify_checksum() {
            return;
        }
        let dhcp = packet.src_addr().is_unspecified() && packet.next_header() == IpProtocol::Udp;
        if packet.src_addr() != GUEST && !dhcp {
            warn_limited!("guest sent from {}; only {GUEST} is served", packet.src_addr());
            return;
        }
        if packet.more_frags() || packet.frag_offset() != 0 {
            // A fragment has no transport checksum of its own that could have been left to us.
            if let Some(whole) = self.reassembler.add(&packet, self.now)
                && let Ok(packet) = Ipv4Packet::new_checked(&whole[..])
            {
                self.push_whole(&packet, &whole, Checksum::Complete);
            }
            return;
        }
        // An Ethernet frame may be padded.
        let packet_bytes = &payload[..usize::from(packet.total_len())];
        self.push_whole(&packet, packet_bytes, checksum);
    }

    /// Takes a packet that is no fragment; `bytes` is all of it.
    fn push_whole(&mut self, packet: &Ipv4Packet<&[u8]>, bytes: &[u8], checksum: Checksum) {
        let (header, protocol) = (usize::from(packet.header_len()), packet.next_header());
        let complete = checksum == Checksum::Complete || protocol == IpProtocol::Icmp;
        if complete && !checksum_is_right(bytes, header, protocol) {
            return;
        }
        match protocol {
            IpProtocol::Tcp if packet.src_addr() == GUEST => self.push_tcp(packet, bytes),
            IpProtocol::Udp => self.push_udp(packet, bytes),
            IpProtocol::Icmp => self.push_icmp(packet),
            _ => {}
        }
    }

    fn push_tcp(&mut self, packet: &Ipv4Packet<&[u8]>, bytes: &[u8]) {
        let Ok(tcp) = TcpPacket::new_checked(packet.payload()) else { return };
        if tcp.src_port() == 0 || tcp.dst_port() == 0 {
            return;
        }
        let remote = SocketAddrV4::new(packet.dst_addr(), tcp.dst_port());
        let key = tcp::Key { guest_port: tcp.src_port(), remote };
        let segment = Segment::of(&tcp);
        if self.tcp.receive(key, bytes, segment, &mut self.guest) {
            return;
        }
        if !tcp.syn() || tcp.ack() || tcp.rst() || tcp.fin() {
            return tcp::reject(bytes, &mut self.guest);
        }
        if self.tcp.is_full() {
            warn_limited!(
                "{} connections are open: the guest's connection to {remote} is refused",
                tcp::MAX_FLOWS
            );
            return tcp::reject(bytes, &mut self.guest);
        }
        match self.host_address(remote) {
            Some(host) => {
                let syn = Syn { packet: bytes.to_vec(), segment };
                self.tcp.connect(key, syn, host, &mut self.guest, self.poll.registry());
            }
            None => tcp::reject(bytes, &mut self.guest),
        }
    }

    fn push_udp(&mut self, packet: &Ipv4Packet<&[u8]>, bytes: &[u8]) {
        let Ok(datagram) = UdpPacket::new_checked(packet.payload()) else { return };
        let (from, to) = (datagram.src_port(), datagram.dst_port());
        let broadcast = packet.dst_addr().is_broadcast();
        if to == DHCP_SERVER && from == DHCP_CLIENT && (broadcast || packet.dst_addr() == GATEWAY) {
            return self.push_dhcp(datagram.payload());
        }
        if packet.src_addr() != GUEST || broadcast || packet.dst_addr().is_multicast() || from == 0 || to == 0
        {
            return;
        }
        let remote = SocketAddrV4::new(packet.dst_addr(), to);
        let key = datagram::Key::Udp(from, remote);
        // A peer of a forward is answered even where its address leads nowhere by itself.
        let Some(host) =
            self.host_address(remote).or_else(|| self.datagrams.contains(key).then_some(remote.into()))
        else {
            return self.guest.send_unreachable(bytes, GATEWAY, Unreachable::Port);
        };
        let (datagrams, mut cx) = self.datagrams();
        datagrams.send(key, datagram.payload(), bytes, host, &mut cx);
    }

    fn push_dhcp(&mut self, message: &[u8]) {
        let mut buffer = self.guest.outbox.buffer();
        let Some(reply) = dhcp::answer(message, &mut buffer[UDP_PAYLOAD..]) else {
            return self.guest.outbox.recycle(buffer);
        };
        self.guest.outbox.push_udp(buffer, reply.len, (GATEWAY, DHCP_SERVER), (reply.to, DHCP_CLIENT));
    }

    fn push_icmp(&mut self, packet: &Ipv4Packet<&[u8]>) {
        let (message, to) = (packet.payload(), packet.dst_addr());
        let Some(ident) = datagram::echo_request_ident(message) else { return };
        if to == GATEWAY || to == DNS {
            return datagram::answer_echo(message, to, &mut self.guest);
        }
        if address::is_routable(to) {
            let (datagrams, mut cx) = self.datagrams();
            datagrams.send(datagram::Key::Ping(ident, to), message, message, (to, 0).into(), &mut cx);
        }
    }

    /// Where a connection or datagram of the guest to `remote` really goes; `None` if nowhere.
    fn host_address(&mut self, remote: SocketAddrV4) -> Option<SocketAddr> {
        let ip = *remote.ip();
        if ip == DNS {
            (remote.port() == DNS_PORT).then(|| self.resolver.address(self.now))
        } else if ip == GATEWAY {
            self.host_loopback.then_some(([127, 0, 0, 1], remote.port()).into())
        } else {
            address::is_routable(ip).then_some(remote.into())
        }
    }

    /// Takes connections that wait at the forwards.
    fn accept(&mut self) {
        let registry = self.poll.registry();
        for forward in &mut self.listeners {
            while forward.ready && !self.tcp.is_full() && self.guest.outbox.has_room() {
                let (stream, peer) = match forward.listener.accept() {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of descriptors, say: the next round tries again.
                        forward.ready = error.kind() != ErrorKind::WouldBlock;
                        break;
                    }
                };
                let key = tcp::Key { guest_port: forward.guest_port, remote: datagram::as_guest_sees(peer) };
                if let Err(error) = self.tcp.accept(stream, key, &mut self.guest, registry) {
                    warn_limited!("connection from {peer} to guest port {}: {error}", forward.guest_port);
                }
            }
        }
    }

    fn datagrams(&mut self) -> (&mut Datagrams, Cx<'_>) {
        let cx = Cx {
            guest: &mut self.guest,
            registry: self.poll.registry(),
            now: self.now,
            resolver: &mut self.resolver,
        };
        (&mut self.datagrams, cx)
    }
}
