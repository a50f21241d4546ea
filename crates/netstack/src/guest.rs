use crate::frame::{IP_PAYLOAD, Link, Outbox};
use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::time::Instant;
use smoltcp::wire::HardwareAddress;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::Ipv4Addr;

/// The side that faces the guest: smoltcp's TCP, and the frames that wait for the guest.
///
/// Each TCP flow has a socket set of its own, so that a packet costs the same with one flow and with a thousand.
pub(crate) struct Guest {
    interface: Interface,
    pub(crate) outbox: Outbox,
    started: std::time::Instant,
    /// Time since `started`, as of the last [`Guest::tick`].
    pub(crate) now: Instant,
}

/// Code of an ICMP "destination unreachable" message (RFC 792).
#[derive(Clone, Copy)]
pub(crate) enum Unreachable {
    Host = 1,
    Port = 3,
}

impl Guest {
    pub(crate) fn new(mac: [u8; 6]) -> Self {
        let mut outbox = Outbox::new(mac);
        let interface = interface(&mut outbox);
        Self { interface, outbox, started: std::time::Instant::now(), now: Instant::ZERO }
    }

    /// Forgets everything about the guest but its configured address.
    pub(crate) fn reset(&mut self, mac: [u8; 6]) {
        let Self { interface: old_interface, outbox, started: _, now: _ } = self;
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

    /// Tells the guest that its IPv4 packet `original` could not be delivered.
    pub(crate) fn send_unreachable(&mut self, original: &[u8], from: Ipv4Addr, code: Unreachable) {
        // The whole header, at most 60 bytes, and the first eight bytes of the payload (RFC 792).
        let header = usize::from(original[0] & 0xf) * 4;
        let quoted = &original[..original.len().min(header + 8)];
        let mut buffer = self.outbox.buffer();
        let icmp = &mut buffer[IP_PAYLOAD..IP_PAYLOAD + 8 + quoted.len()];
        icmp[..8].copy_from_slice(&[3, code as u8, 0, 0, 0, 0, 0, 0]);
        icmp[8..].copy_from_slice(quoted);
        self.outbox.push_icmp(buffer, 8 + quoted.len(), from, crate::address::GUEST);
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
