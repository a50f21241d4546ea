use crate::address::Subnet;
use crate::frame::{IP_PAYLOAD, Link, Outbox};
use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::time::Instant;
use smoltcp::wire::HardwareAddress;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind};
use std::net::Ipv4Addr;

/// The side that faces the guest: smoltcp's TCP, and the frames that wait for the guest.
///
/// Each TCP flow has a socket set of its own, so that a packet costs the same with one flow and with a thousand.
pub(crate) struct Guest {
    interface: Interface,
    subnet: Subnet,
    pub(crate) outbox: Outbox,
    started: std::time::Instant,
    /// Time since `started`, as of the last [`Guest::tick`].
    pub(crate) now: Instant,
}

/// Why a packet of the guest was not delivered: the code of an ICMP "destination unreachable" message (RFC 792, RFC 1812
/// section 5.2.7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreachable {
    Network,
    Host,
    Port,
    /// It is larger than this, in bytes, and may not be cut (RFC 1191).
    FragmentationNeeded(u16),
    /// The user of the host does not allow it.
    Prohibited,
}

impl Unreachable {
    fn code(self) -> u8 {
        match self {
            Self::Network => 0,
            Self::Host => 1,
            Self::Port => 3,
            Self::FragmentationNeeded(_) => 4,
            Self::Prohibited => 13,
        }
    }

    /// What `error` of a socket that sends for the guest means; `None` for what a network does not report.
    pub(crate) fn from_error(error: &io::Error) -> Option<Self> {
        match error.kind() {
            ErrorKind::ConnectionRefused => Some(Self::Port),
            ErrorKind::HostUnreachable => Some(Self::Host),
            ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => Some(Self::Network),
            ErrorKind::PermissionDenied => Some(Self::Prohibited),
            _ => None,
        }
    }
}

/// ICMP messages (RFC 792).
const ICMP_HEADER: usize = 8;
const DESTINATION_UNREACHABLE: u8 = 3;
/// The longest IPv4 header, and how much of the payload an ICMP error quotes (RFC 792).
const MAX_IPV4_HEADER: usize = 60;
const QUOTED_PAYLOAD: usize = 8;

/// The part of a guest's packet by which its sender recognises it in an ICMP error.
#[derive(Clone)]
pub(crate) struct Quote {
    bytes: [u8; MAX_IPV4_HEADER + QUOTED_PAYLOAD],
    len: usize,
}

impl Quote {
    /// Of a whole IPv4 packet.
    pub(crate) fn of(packet: &[u8]) -> Self {
        let header = packet.first().map_or(0, |first| usize::from(first & 0xf) * 4);
        let len = packet.len().min(header + QUOTED_PAYLOAD);
        let mut bytes = [0; MAX_IPV4_HEADER + QUOTED_PAYLOAD];
        bytes[..len].copy_from_slice(&packet[..len]);
        Self { bytes, len }
    }
}

impl Guest {
    pub(crate) fn new(mac: [u8; 6], subnet: Subnet) -> Self {
        let mut outbox = Outbox::new(mac, subnet);
        let interface = interface(&mut outbox);
        Self { interface, subnet, outbox, started: std::time::Instant::now(), now: Instant::ZERO }
    }

    pub(crate) fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// Forgets everything about the guest but its configured address.
    pub(crate) fn reset(&mut self, mac: [u8; 6]) {
        let Self { interface: old_interface, subnet: _, outbox, started: _, now: _ } = self;
        outbox.clear();
        outbox.guest_mac = mac;
        outbox.partial_checksums = false;
        *old_interface = interface(outbox);
    }

    /// Takes the time; done once for each round of work, because the clock costs a system call on some hosts.
    pub(crate) fn tick(&mut self) -> std::time::Instant {
        let now = std::time::Instant::now();
        self.now = Instant::from_micros(now.duration_since(self.started).as_micros() as i64);
        now
    }

    /// Gives an IP packet to `sockets`; a TCP segment that none of them takes is answered with RST.
    pub(crate) fn receive(&mut self, packet: &[u8], sockets: &mut SocketSet<'_>) {
        let mut link = Link { receive: Some(packet), outbox: &mut self.outbox };
        self.interface.poll_ingress_single(self.now, &mut link, sockets);
    }

    /// Sends what `sockets` have for the guest; `false` if room ran out first.
    pub(crate) fn send(&mut self, sockets: &mut SocketSet<'_>) -> bool {
        while self.outbox.has_room() {
            let mut link = Link { receive: None, outbox: &mut self.outbox };
            if self.interface.poll_egress(self.now, &mut link, sockets) == PollResult::None {
                return true;
            }
        }
        false
    }

    /// When `sockets` want [`Guest::send`] next.
    pub(crate) fn deadline(&mut self, sockets: &SocketSet<'_>) -> Option<Instant> {
        self.interface.poll_at(self.now, sockets)
    }

    pub(crate) fn context(&mut self) -> &mut smoltcp::iface::Context {
        self.interface.context()
    }

    /// Tells the guest that its packet `original` could not be delivered, in the name of `from`.
    pub(crate) fn send_unreachable(&mut self, original: &Quote, from: Ipv4Addr, reason: Unreachable) {
        let quoted = &original.bytes[..original.len];
        let mut buffer = self.outbox.buffer();
        let icmp = &mut buffer[IP_PAYLOAD..IP_PAYLOAD + ICMP_HEADER + quoted.len()];
        icmp[..ICMP_HEADER].fill(0);
        icmp[0] = DESTINATION_UNREACHABLE;
        icmp[1] = reason.code();
        if let Unreachable::FragmentationNeeded(mtu) = reason {
            icmp[6..8].copy_from_slice(&mtu.to_be_bytes());
        }
        icmp[ICMP_HEADER..].copy_from_slice(quoted);
        let len = ICMP_HEADER + quoted.len();
        self.outbox.push_icmp(buffer, len, from, self.subnet.guest());
    }
}

fn interface(outbox: &mut Outbox) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    // Seeds initial sequence numbers, which must not be guessable. RandomState's keys come from the system's random source.
    config.random_seed = RandomState::new().build_hasher().finish();
    let mut interface = Interface::new(config, &mut Link { receive: None, outbox }, Instant::ZERO);
    // The stack is whoever the guest wants to talk to.
    interface.set_any_ip(true);
    interface
}
