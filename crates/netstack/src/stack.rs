use crate::address::{BROADCAST_MAC, Class, Subnet};
use crate::datagram::{self, Cx, Datagram, Datagrams};
use crate::dhcp;
use crate::dns::DnsRelay;
use crate::flow::Syn;
use crate::fragment::Reassembler;
use crate::frame::{ETHERNET_HEADER, ETHERTYPE_ARP, ETHERTYPE_IPV4, Frame, UDP_PAYLOAD, checksum_is_right};
use crate::guest::{Guest, Quote, Unreachable};
use crate::host_net::{self, HostNetworks};
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
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
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
    Dns(usize),
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
            Self::Dns(i) => (5, i),
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
            4 => Self::Datagram(index),
            _ => Self::Dns(index),
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
    lan: bool,
    host_networks: HostNetworks,
    resolver: Resolver,
    guest: Guest,
    tcp: TcpFlows,
    datagrams: Datagrams,
    dns: DnsRelay,
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
        let mut guest = Guest::new(options.mac(), options.subnet());
        let now = guest.tick();
        let mut stack = Self {
            poll: Poll::new()?,
            events: Events::with_capacity(256),
            wakers: Vec::new(),
            listeners: Vec::new(),
            forwards: Vec::new(),
            mac: options.mac(),
            host_loopback: options.host_loopback,
            lan: options.lan,
            host_networks: HostNetworks::default(),
            resolver: Resolver::new(options.dns, now),
            guest,
            tcp: TcpFlows::new(),
            datagrams: Datagrams::new(),
            dns: DnsRelay::new(),
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

    /// The virtual network's addresses.
    pub fn subnet(&self) -> Subnet {
        self.guest.subnet()
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
            lan: _,
            host_networks: _,
            resolver: _,
            guest,
            tcp,
            datagrams,
            dns,
            reassembler,
            now: _,
        } = self;
        for event in wakers.drain(..) {
            // Fails only for a descriptor that is not registered.
            let _ = poll.registry().deregister(&mut SourceFd(&event.as_fd().as_raw_fd()));
        }
        guest.reset(*mac);
        tcp.reset();
        datagrams.reset();
        dns.reset();
        *reassembler = Reassembler::default();
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
        let result = self.poll.poll(&mut self.events, timeout);
        // The wait may have been long, and what is pushed next must not look as old as the round before it.
        self.now = self.guest.tick();
        match result {
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
                Source::Dns(id) => self.dns.ready(id),
            }
        }
        Ok(())
    }

    fn time_to_next(&mut self) -> Option<Duration> {
        if self.has_work() {
            return Some(Duration::ZERO);
        }
        let now = self.guest.tick();
        let due = [self.datagrams.next_sweep(), self.dns.next_check()].into_iter().flatten().min();
        let sweep = due.map(|t| t.saturating_duration_since(now));
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
        let (datagrams, dns, mut cx) = self.datagrams();
        datagrams.run(&mut cx);
        dns.run(&mut cx);
    }

    /// Whether [`Stack::run`] has more to do right now.
    pub fn has_work(&self) -> bool {
        let runnable = self.tcp.has_runnable() || self.datagrams.has_runnable() || self.dns.has_runnable();
        runnable && self.guest.outbox.has_room()
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
        if (to != self.subnet().router_mac() && to != BROADCAST_MAC) || from[0] & 1 != 0 {
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
        let subnet = self.subnet();
        if operation != ArpOperation::Request
            || ![subnet.gateway(), subnet.dns()].contains(&target_protocol_addr)
        {
            return;
        }
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: EthernetAddress(subnet.router_mac()),
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
        let guest = self.subnet().guest();
        if packet.src_addr() != guest && !dhcp {
            warn_limited!("guest sent from {}; only {guest} is served", packet.src_addr());
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
        let from_guest = packet.src_addr() == self.subnet().guest();
        match protocol {
            IpProtocol::Tcp if from_guest => self.push_tcp(packet, bytes),
            IpProtocol::Udp => self.push_udp(packet, bytes),
            IpProtocol::Icmp if from_guest => self.push_icmp(packet, bytes),
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
        if !self.tcp.has_room(&self.guest) {
            warn_limited!(
                "{} connections are open and in use: the guest's connection to {remote} is refused",
                tcp::MAX_FLOWS
            );
            return tcp::reject(bytes, &mut self.guest);
        }
        match self.host_address(remote) {
            Ok(host) => {
                let syn = Syn { packet: bytes.to_vec(), segment };
                self.tcp.connect(key, syn, host, &mut self.guest, self.poll.registry());
            }
            Err(_) => tcp::reject(bytes, &mut self.guest),
        }
    }

    fn push_udp(&mut self, packet: &Ipv4Packet<&[u8]>, bytes: &[u8]) {
        let Ok(udp) = UdpPacket::new_checked(packet.payload()) else { return };
        let (from, to, subnet) = (udp.src_port(), udp.dst_port(), self.subnet());
        let remote = SocketAddrV4::new(packet.dst_addr(), to);
        let broadcast = remote.ip().is_broadcast();
        if to == DHCP_SERVER && from == DHCP_CLIENT && (broadcast || *remote.ip() == subnet.gateway()) {
            return self.push_dhcp(udp.payload());
        }
        let group = broadcast || remote.ip().is_multicast();
        if packet.src_addr() != subnet.guest() || group || from == 0 || to == 0 {
            return;
        }
        if remote == SocketAddrV4::new(subnet.dns(), DNS_PORT) {
            let (_, dns, mut cx) = self.datagrams();
            return dns.send(from, udp.payload(), &mut cx);
        }
        let key = datagram::Key::Udp(from, remote);
        self.push_datagram(&Datagram::new(key, udp.payload(), packet, bytes), remote);
    }

    /// Sends a datagram or ping on to `remote`, or tells the guest why not.
    fn push_datagram(&mut self, datagram: &Datagram<'_>, remote: SocketAddrV4) {
        // A flow that stands was allowed when it began; a forward's peer is answered even where the guest could not begin.
        let host = if self.datagrams.contains(datagram.key) {
            remote.into()
        } else {
            match self.host_address(remote) {
                Ok(host) => host,
                Err(reason) => {
                    let from = self.subnet().gateway();
                    return self.guest.send_unreachable(&Quote::of(datagram.packet), from, reason);
                }
            }
        };
        let (datagrams, _, mut cx) = self.datagrams();
        datagrams.send(datagram, host, &mut cx);
    }

    fn push_dhcp(&mut self, message: &[u8]) {
        let subnet = self.subnet();
        let mut buffer = self.guest.outbox.buffer();
        let Some(reply) = dhcp::answer(message, subnet, &mut buffer[UDP_PAYLOAD..]) else {
            return self.guest.outbox.recycle(buffer);
        };
        let from = (subnet.gateway(), DHCP_SERVER);
        self.guest.outbox.push_udp(buffer, reply.len, from, (reply.to, DHCP_CLIENT));
    }

    fn push_icmp(&mut self, packet: &Ipv4Packet<&[u8]>, bytes: &[u8]) {
        let (message, to, subnet) = (packet.payload(), packet.dst_addr(), self.subnet());
        let Some(ident) = datagram::echo_request_ident(message) else { return };
        if to == subnet.gateway() || to == subnet.dns() {
            return datagram::answer_echo(message, to, &mut self.guest);
        }
        if to.is_broadcast() || to.is_multicast() {
            return;
        }
        let key = datagram::Key::Ping(ident, to);
        self.push_datagram(&Datagram::new(key, message, packet, bytes), SocketAddrV4::new(to, 0));
    }

    /// Where a new connection or datagram of the guest to `remote` really goes, or why nowhere.
    fn host_address(&mut self, remote: SocketAddrV4) -> Result<SocketAddr, Unreachable> {
        let (ip, port, subnet) = (*remote.ip(), remote.port(), self.subnet());
        if ip == subnet.gateway() {
            if self.host_loopback {
                return Ok((Ipv4Addr::LOCALHOST, port).into());
            }
            warn_limited!(
                "the guest asks for port {port} of the host's loopback interface: --net user,host-loopback=on allows that"
            );
            return Err(Unreachable::Port);
        }
        if ip == subnet.dns() {
            let server = if port == DNS_PORT { self.resolver.next(&[], self.now) } else { None };
            return server.ok_or(Unreachable::Port);
        }
        if subnet.contains(ip) {
            return Err(Unreachable::Host);
        }
        match self.forbidden(ip) {
            None => Ok(remote.into()),
            Some(why) => {
                warn_limited!("the guest asks for {ip}, {why}: refused");
                Err(Unreachable::Prohibited)
            }
        }
    }

    /// Why the guest may not reach `ip`, if it may not.
    fn forbidden(&mut self, ip: Ipv4Addr) -> Option<&'static str> {
        match Class::of(ip) {
            Class::NotUnicast => return Some("which is no address of a host"),
            Class::Loopback => return Some("which is the host's loopback interface"),
            Class::LinkLocal => return Some("which is link-local or a metadata service"),
            Class::Lan if !self.lan => return Some("which is private, with lan=off"),
            Class::Lan | Class::Internet => {}
        }
        // Where there is no route the attempt itself says so.
        if host_net::is_own_address(ip).unwrap_or(false) {
            return Some("which is the host's own address");
        }
        (!self.lan && self.host_networks.contain(ip, self.now))
            .then_some("which is on a network of the host, with lan=off")
    }

    /// Takes connections that wait at the forwards.
    fn accept(&mut self) {
        let (registry, subnet) = (self.poll.registry(), self.guest.subnet());
        for forward in &mut self.listeners {
            while forward.ready && self.tcp.has_room(&self.guest) && self.guest.outbox.has_room() {
                let (stream, peer) = match forward.listener.accept() {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of descriptors, say: the next round tries again.
                        forward.ready = error.kind() != ErrorKind::WouldBlock;
                        break;
                    }
                };
                let key = tcp::Key {
                    guest_port: forward.guest_port,
                    remote: datagram::as_guest_sees(peer, subnet),
                };
                if let Err(error) = self.tcp.accept(stream, key, &mut self.guest, registry) {
                    warn_limited!("connection from {peer} to guest port {}: {error}", forward.guest_port);
                }
            }
        }
    }

    fn datagrams(&mut self) -> (&mut Datagrams, &mut DnsRelay, Cx<'_>) {
        let cx = Cx {
            guest: &mut self.guest,
            registry: self.poll.registry(),
            now: self.now,
            resolver: &mut self.resolver,
        };
        (&mut self.datagrams, &mut self.dns, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flow that begins after a long silence must not look as old as the silence.
    #[test]
    fn the_clock_is_read_after_each_wait() {
        let mut stack = Stack::new(&NetOptions::default()).unwrap();
        let Some(long_ago) = Instant::now().checked_sub(Duration::from_secs(300)) else { return };
        stack.now = long_ago;
        stack.wait(Some(Duration::ZERO)).unwrap();
        assert!(stack.now.duration_since(long_ago) >= Duration::from_secs(300));
    }
}
