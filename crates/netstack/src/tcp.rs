use crate::flow::{Flow, Next, Open, Phase, Syn};
use crate::guest::{Guest, Quote, Unreachable};
use crate::stack::Source;
use crate::window::{BUFFER_SIZES, Segment};
use mio::net::TcpStream;
use mio::{Interest, Registry};
use outboard_bus::warn_limited;
use slab::Slab;
use smoltcp::iface::SocketSet;
use smoltcp::time::{Duration, Instant};
use socket2::{SockRef, TcpKeepalive};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, SocketAddrV4};

/// Connections at a time. Further ones take the place of those that one side has closed or nobody uses; without such they
/// are refused.
pub(crate) const MAX_FLOWS: usize = 1024;
/// What all buffers together may take before flows get the least: 1,024 flows stay below 128 MiB.
const BUFFER_BUDGET: usize = 64 << 20;
/// How long a connection may be silent: one that stands, and one that is half closed (RFC 5382, REQ-5).
const ESTABLISHED_IDLE: Duration = Duration::from_secs(2 * 60 * 60 + 4 * 60);
const TRANSITORY_IDLE: Duration = Duration::from_secs(4 * 60);
/// How often such are looked for.
const SWEEP: Duration = Duration::from_secs(30);
/// When the host asks a silent peer if it is still there, and how often after that: the guest's own questions are answered
/// here and never reach it.
const KEEPALIVE: std::time::Duration = std::time::Duration::from_secs(10 * 60);
const KEEPALIVE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(60);
/// First of the ports that a forwarded connection seems to come from (RFC 6335, section 6).
const FIRST_EPHEMERAL: u16 = 49152;

/// Which connection: the guest's port and the other side as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) guest_port: u16,
    pub(crate) remote: SocketAddrV4,
}

/// TCP connections between guest and host.
pub(crate) struct TcpFlows {
    flows: Slab<Flow>,
    by_key: HashMap<Key, usize>,
    /// Flows that may be able to make progress; each is in here at most once.
    runnable: VecDeque<usize>,
    /// When flows with nothing else to do must be looked at.
    deadlines: BTreeSet<(Instant, usize)>,
    /// Bytes of all flows' buffers.
    buffered: usize,
    next_port: u16,
    /// When silent flows are looked for.
    next_sweep: Option<Instant>,
}

impl TcpFlows {
    pub(crate) fn new() -> Self {
        Self {
            flows: Slab::new(),
            by_key: HashMap::new(),
            runnable: VecDeque::new(),
            deadlines: BTreeSet::new(),
            buffered: 0,
            next_port: FIRST_EPHEMERAL,
            next_sweep: None,
        }
    }

    /// Breaks every connection.
    pub(crate) fn reset(&mut self) {
        for flow in self.flows.drain() {
            abort_host(&flow.host);
        }
        *self = Self::new();
    }

    /// Whether one more connection can be taken, if need be in the place of another.
    pub(crate) fn has_room(&self, guest: &Guest) -> bool {
        self.flows.len() < MAX_FLOWS || self.least_useful(guest.now).is_some()
    }

    /// The flow that gives way first: of the half-closed ones the one that was silent longest, otherwise the same of those
    /// that have been silent for some time.
    fn least_useful(&self, now: Instant) -> Option<usize> {
        let gives_way = |flow: &Flow| flow.is_half_closed() || now - flow.last_active >= TRANSITORY_IDLE;
        let candidates = self.flows.iter().filter(|(_, flow)| gives_way(flow));
        candidates.min_by_key(|(_, flow)| (!flow.is_half_closed(), flow.last_active)).map(|(id, _)| id)
    }

    /// Breaks a flow to make room for another where the table is full.
    fn make_room(&mut self, guest: &mut Guest) {
        if self.flows.len() < MAX_FLOWS {
            return;
        }
        let Some(id) = self.least_useful(guest.now) else { return };
        warn_limited!("{MAX_FLOWS} connections are open: the one to {} gives way", self.flows[id].key.remote);
        if self.flows[id].guest_has_ended() {
            // The guest has said all it had to say, and most forget such a connection after a minute. Whatever it sends
            // after all is answered with RST.
            self.remove(id, true);
        } else {
            self.break_flow(id, guest);
        }
    }

    pub(crate) fn has_runnable(&self) -> bool {
        !self.runnable.is_empty()
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let timer = self.deadlines.first().map(|d| d.0);
        match (timer, self.next_sweep) {
            (Some(timer), Some(sweep)) => Some(timer.min(sweep)),
            (timer, sweep) => timer.or(sweep),
        }
    }

    /// Takes a TCP segment of a known connection from the guest; `false` if it belongs to none.
    pub(crate) fn receive(&mut self, key: Key, packet: &[u8], segment: Segment, guest: &mut Guest) -> bool {
        let Some(&id) = self.by_key.get(&key) else { return false };
        self.flows[id].last_active = guest.now;
        match &mut self.flows[id].phase {
            Phase::Connecting(_) if segment.rst => self.remove(id, false),
            // A repeated SYN: the answer comes when the host has answered.
            Phase::Connecting(_) => {}
            Phase::Open(open) => {
                open.receive(packet, segment, guest);
                self.enqueue(id);
            }
        }
        true
    }

    /// Starts a connection to `host` for the guest's `syn`.
    pub(crate) fn connect(
        &mut self,
        key: Key,
        syn: Syn,
        host: SocketAddr,
        guest: &mut Guest,
        registry: &Registry,
    ) {
        self.make_room(guest);
        let connected =
            TcpStream::connect(host).and_then(|stream| self.insert(key, stream, guest.now, registry));
        match connected {
            Ok(id) => self.flows[id].phase = Phase::Connecting(syn),
            Err(error) => refuse(&syn.packet, &error, key, guest),
        }
    }

    /// Starts a connection into the guest for one that came in at a forward. `key` has the guest's port and the address
    /// that the guest shall see; the port is chosen here.
    pub(crate) fn accept(
        &mut self,
        stream: TcpStream,
        mut key: Key,
        guest: &mut Guest,
        registry: &Registry,
    ) -> io::Result<()> {
        self.make_room(guest);
        key.remote.set_port(self.free_port(key));
        let address = guest.subnet().guest();
        let mut open = Open::new(buffer_size(self.buffered));
        open.socket()
            .connect(guest.context(), (address, key.guest_port), key.remote)
            .map_err(|e| io::Error::other(format!("cannot start a connection to the guest: {e}")))?;
        self.buffered += open.buffers;
        match self.insert(key, stream, guest.now, registry) {
            Ok(id) => {
                self.flows[id].phase = Phase::Open(open);
                self.enqueue(id);
                Ok(())
            }
            Err(error) => {
                self.buffered -= open.buffers;
                Err(error)
            }
        }
    }

    /// The host's side of flow `id` is ready.
    pub(crate) fn host_ready(&mut self, id: usize, event: &mio::event::Event) {
        // An event may be for an earlier flow with the same number; at worst a system call is made in vain.
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.readable |= event.is_readable() || event.is_error();
        flow.writable |= event.is_writable() || event.is_error();
        flow.host_closing |= event.is_read_closed() || event.is_error();
        self.enqueue(id);
    }

    /// Moves data until nothing more can move; `true` if that is because the guest does not take its frames.
    pub(crate) fn run(&mut self, guest: &mut Guest) {
        if self.next_sweep.is_some_and(|time| time <= guest.now) {
            self.sweep(guest);
        }
        while let Some(&(deadline, id)) = self.deadlines.first() {
            if deadline > guest.now {
                break;
            }
            self.deadlines.pop_first();
            self.flows[id].deadline = None;
            self.enqueue(id);
        }
        let mut turns = self.runnable.len();
        while turns > 0 && guest.outbox.has_room() {
            turns -= 1;
            let Some(id) = self.runnable.pop_front() else { break };
            self.flows[id].queued = false;
            self.run_one(id, guest);
        }
    }

    fn run_one(&mut self, id: usize, guest: &mut Guest) {
        if let Phase::Connecting(_) = self.flows[id].phase {
            self.check_connected(id, guest);
            return;
        }
        let flow = &mut self.flows[id];
        let next = flow.pump(guest);
        match next {
            Next::Finished => self.remove(id, false),
            Next::Broken => self.break_flow(id, guest),
            Next::Blocked => self.enqueue(id),
            Next::Wait => {
                let Flow { phase: Phase::Open(open), deadline, .. } = &mut self.flows[id] else { return };
                let new = guest.deadline(&open.sockets);
                if *deadline != new {
                    if let Some(old) = deadline.take() {
                        self.deadlines.remove(&(old, id));
                    }
                    if let Some(new) = new {
                        self.deadlines.insert((new, id));
                    }
                    *deadline = new;
                }
            }
        }
    }

    /// Looks whether the host's side of a guest's connection stands by now, and answers the guest's SYN if so.
    fn check_connected(&mut self, id: usize, guest: &mut Guest) {
        let flow = &mut self.flows[id];
        if !flow.writable {
            return;
        }
        let Phase::Connecting(syn) = &mut flow.phase else { return };
        let error = match flow.host.take_error() {
            Ok(None) => flow.host.peer_addr().err(),
            Ok(Some(error)) | Err(error) => Some(error),
        };
        let (key, syn) = match error {
            Some(error) if error.kind() == ErrorKind::NotConnected => {
                flow.writable = false;
                return;
            }
            Some(error) => {
                let (key, syn) = (flow.key, std::mem::take(syn));
                self.remove(id, false);
                refuse(&syn.packet, &error, key, guest);
                return;
            }
            None => (flow.key, std::mem::take(syn)),
        };
        let mut open = Open::new(buffer_size(self.buffered));
        // Fails for port 0 only; the SYN then meets no socket and is answered with RST.
        let _ = open.socket().listen(key.remote);
        open.receive(&syn.packet, syn.segment, guest);
        self.buffered += open.buffers;
        self.flows[id].phase = Phase::Open(open);
        self.enqueue(id);
    }

    /// Ends a flow so that both sides see a broken connection.
    fn break_flow(&mut self, id: usize, guest: &mut Guest) {
        if let Phase::Open(open) = &mut self.flows[id].phase {
            open.socket().abort();
            guest.send(&mut open.sockets);
        }
        self.remove(id, true);
    }

    /// Ends what was silent for too long.
    fn sweep(&mut self, guest: &mut Guest) {
        let over = |flow: &Flow| {
            let limit = if flow.is_half_closed() { TRANSITORY_IDLE } else { ESTABLISHED_IDLE };
            guest.now - flow.last_active >= limit
        };
        let ids: Vec<usize> = self.flows.iter().filter(|(_, flow)| over(flow)).map(|(id, _)| id).collect();
        for id in ids {
            self.break_flow(id, guest);
        }
        self.next_sweep = (!self.flows.is_empty()).then_some(guest.now + SWEEP);
    }

    fn insert(
        &mut self,
        key: Key,
        mut host: TcpStream,
        now: Instant,
        registry: &Registry,
    ) -> io::Result<usize> {
        // Small writes must not wait for the peer's acknowledgement: the guest has decided already what to send when.
        let _ = host.set_nodelay(true);
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE_INTERVAL);
        // Without it a peer that vanished is noticed only when the connection has been silent for too long.
        let _ = SockRef::from(&host).set_tcp_keepalive(&keepalive);
        let entry = self.flows.vacant_entry();
        let id = entry.key();
        registry.register(&mut host, Source::Tcp(id).token(), Interest::READABLE | Interest::WRITABLE)?;
        entry.insert(Flow {
            key,
            host,
            phase: Phase::Connecting(Syn::default()),
            last_active: now,
            queued: false,
            deadline: None,
            readable: false,
            writable: false,
            host_closing: false,
        });
        self.by_key.insert(key, id);
        self.next_sweep.get_or_insert(now + SWEEP);
        Ok(id)
    }

    fn remove(&mut self, id: usize, abort: bool) {
        let flow = self.flows.remove(id);
        if abort {
            abort_host(&flow.host);
        }
        self.by_key.remove(&flow.key);
        if flow.queued {
            self.runnable.retain(|r| *r != id);
        }
        if let Some(deadline) = flow.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        if let Phase::Open(open) = flow.phase {
            self.buffered -= open.buffers;
        }
    }

    fn enqueue(&mut self, id: usize) {
        let flow = &mut self.flows[id];
        if !flow.queued {
            flow.queued = true;
            self.runnable.push_back(id);
        }
    }

    /// A port that no connection to the same guest port uses. There are more ports than flows, so one is free.
    fn free_port(&mut self, mut key: Key) -> u16 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_EPHEMERAL);
            key.remote.set_port(port);
            if !self.by_key.contains_key(&key) {
                return port;
            }
        }
    }
}

/// Size of each of a new flow's two buffers, given the bytes of all others: they get smaller as flows get many.
fn buffer_size(buffered: usize) -> usize {
    let share = BUFFER_BUDGET.saturating_sub(buffered) / 32;
    let fits = BUFFER_SIZES.into_iter().find(|size| *size <= share);
    fits.unwrap_or(BUFFER_SIZES[BUFFER_SIZES.len() - 1])
}

/// Makes the host's peer see a broken connection instead of an orderly end.
fn abort_host(host: &TcpStream) {
    // Without it the peer sees an end of stream, which is all that is lost if the system refuses.
    let _ = SockRef::from(host).set_linger(Some(std::time::Duration::ZERO));
}

/// Passes a failed connection attempt on to the guest.
fn refuse(syn: &[u8], error: &io::Error, key: Key, guest: &mut Guest) {
    match (error.kind(), Unreachable::from_error(error)) {
        // The guest repeats its SYN until it gives up, as it would on a real network.
        (ErrorKind::TimedOut, _) => {}
        (_, Some(reason @ (Unreachable::Host | Unreachable::Network))) => {
            guest.send_unreachable(&Quote::of(syn), guest.subnet().gateway(), reason);
        }
        (ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset, _) => reject(syn, guest),
        _ => {
            warn_limited!("no connection to {} for the guest: {error}", key.remote);
            reject(syn, guest);
        }
    }
}

/// Answers a TCP segment with RST, unless it is one itself.
pub(crate) fn reject(packet: &[u8], guest: &mut Guest) {
    guest.receive(packet, &mut SocketSet::new(Vec::new()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Subnet;

    #[test]
    fn buffers_stay_within_bounds_however_many_flows() {
        let mut buffered = 0;
        let mut sizes = Vec::new();
        for _ in 0..MAX_FLOWS {
            sizes.push(buffer_size(buffered));
            buffered += 2 * sizes[sizes.len() - 1];
        }
        assert_eq!((sizes[0], sizes[MAX_FLOWS - 1]), (BUFFER_SIZES[0], BUFFER_SIZES[4]));
        assert!(sizes.is_sorted_by(|a, b| a >= b));
        assert!(buffered < 128 << 20, "{buffered}");
    }

    /// A table with `count` connections into a guest that answers nothing, and what it needs.
    fn table(count: usize) -> (TcpFlows, Guest, mio::Poll, std::net::TcpListener) {
        let (mut flows, poll) = (TcpFlows::new(), mio::Poll::new().unwrap());
        let mut guest = Guest::new([2, 0, 0, 0, 0, 1], Subnet::DEFAULT);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for _ in 0..count {
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let key = Key { guest_port: 80, remote: SocketAddrV4::new(Subnet::DEFAULT.gateway(), 0) };
            flows.accept(stream, key, &mut guest, poll.registry()).unwrap();
        }
        (flows, guest, poll, listener)
    }

    fn half_close(flow: &mut Flow) {
        let Phase::Open(open) = &mut flow.phase else { panic!("accepted connections are open") };
        open.host_told = true;
    }

    /// The flows that are left once `silence` has passed since the table was filled.
    fn left_after(flows: &mut TcpFlows, guest: &mut Guest, silence: Duration) -> Vec<usize> {
        guest.now = Instant::ZERO + silence;
        flows.sweep(guest);
        flows.flows.iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn silent_connections_end_after_the_times_of_rfc_5382() {
        let (mut flows, mut guest, _poll, _listener) = table(2);
        half_close(&mut flows.flows[1]);
        let second = Duration::from_secs(1);
        assert_eq!(left_after(&mut flows, &mut guest, TRANSITORY_IDLE - second), [0, 1]);
        assert_eq!(left_after(&mut flows, &mut guest, TRANSITORY_IDLE), [0]);
        assert_eq!(left_after(&mut flows, &mut guest, ESTABLISHED_IDLE - second), [0]);
        assert!(flows.next_deadline().is_some());
        assert_eq!(left_after(&mut flows, &mut guest, ESTABLISHED_IDLE), []);
        assert!(flows.by_key.is_empty() && flows.buffered == 0);
    }

    #[test]
    fn half_closed_connections_give_way_first_and_those_in_use_never() {
        let (mut flows, _guest, _poll, _listener) = table(4);
        let soon = Instant::ZERO + Duration::from_secs(1);
        assert_eq!(flows.least_useful(soon), None, "all in use");
        for (id, millis) in [(0, 0), (1, 700), (2, 300), (3, 500)] {
            flows.flows[id].last_active = Instant::from_millis(millis);
        }
        half_close(&mut flows.flows[1]);
        half_close(&mut flows.flows[3]);
        assert_eq!(flows.least_useful(soon), Some(3), "half closed, and silent longest");
        assert_eq!(flows.least_useful(soon + TRANSITORY_IDLE), Some(3));
        flows.remove(3, true);
        flows.remove(1, true);
        assert_eq!(flows.least_useful(soon), None);
        assert_eq!(flows.least_useful(soon + TRANSITORY_IDLE), Some(0), "silent for some time");
    }

    #[test]
    fn silent_peers_of_the_host_are_asked_if_they_are_there() {
        let (flows, _guest, _poll, _listener) = table(1);
        let socket = SockRef::from(&flows.flows[0].host);
        assert!(socket.keepalive().unwrap());
    }
}
