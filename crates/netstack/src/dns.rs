use crate::datagram::Cx;
use crate::frame::UDP_PAYLOAD;
use crate::guest::Guest;
use crate::host_net;
use crate::stack::Source;
use mio::net::UdpSocket;
use mio::{Interest, Registry};
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Guest ports with queries at a time; the one that was idle longest gives way.
const MAX_FLOWS: usize = 256;
/// Queries of one guest port that wait for an answer; the oldest gives way.
const MAX_QUERIES: usize = 16;
/// How long a server may take before the next one is asked too.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the port of a guest is kept without traffic (RFC 4787, REQ-5a).
const IDLE: Duration = Duration::from_secs(20);
/// The largest payload of a UDP datagram over IPv4, in bytes.
const MAX_PAYLOAD: usize = 65507;

/// DNS messages (RFC 1035, section 4.1.1).
const HEADER: usize = 12;
const DNS_PORT: u16 = 53;
/// In the third byte: this is a response.
const RESPONSE: u8 = 0x80;
/// In the fourth byte: recursion is available, and the response code for a failure of the server.
const RECURSION_AVAILABLE: u8 = 0x80;
const SERVER_FAILURE: u8 = 2;

/// Relays the guest's DNS queries over UDP to the host's resolvers, one after the other.
pub(crate) struct DnsRelay {
    flows: Slab<Flow>,
    by_port: HashMap<u16, usize>,
    /// Flows with something to receive; each is in here at most once.
    readable: VecDeque<usize>,
    /// When queries have waited long enough or flows are idle.
    next_check: Option<Instant>,
}

/// The queries from one port of the guest.
struct Flow {
    guest_port: u16,
    /// A socket for each server that was asked, connected to it.
    upstream: Vec<(SocketAddr, UdpSocket)>,
    queries: VecDeque<Query>,
    last_used: Instant,
    queued: bool,
}

/// A query that was not answered yet.
struct Query {
    message: Vec<u8>,
    /// The servers it was sent to, the last one last.
    tried: Vec<SocketAddr>,
    /// How many of those refused it.
    refused: usize,
    /// When the next server has its turn; `None` when there is no other.
    next_try: Option<Instant>,
}

impl Query {
    fn id(&self) -> &[u8] {
        &self.message[..2]
    }
}

impl DnsRelay {
    pub(crate) fn new() -> Self {
        Self { flows: Slab::new(), by_port: HashMap::new(), readable: VecDeque::new(), next_check: None }
    }

    /// Forgets all queries.
    pub(crate) fn reset(&mut self) {
        *self = Self::new();
    }

    pub(crate) fn has_runnable(&self) -> bool {
        !self.readable.is_empty()
    }

    pub(crate) fn next_check(&self) -> Option<Instant> {
        self.next_check
    }

    pub(crate) fn ready(&mut self, id: usize) {
        if let Some(flow) = self.flows.get_mut(id)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.readable.push_back(id);
        }
    }

    /// Takes a query from `guest_port`.
    pub(crate) fn send(&mut self, guest_port: u16, message: &[u8], cx: &mut Cx<'_>) {
        if message.len() < HEADER {
            return;
        }
        let id = match self.by_port.get(&guest_port) {
            Some(&id) => id,
            None => self.open(guest_port, cx.now),
        };
        let flow = &mut self.flows[id];
        flow.last_used = cx.now;
        // The guest asks again: so does the relay, from the first server on.
        flow.queries.retain(|query| query.id() != &message[..2]);
        if flow.queries.len() >= MAX_QUERIES {
            flow.queries.pop_front();
        }
        let mut query = Query { message: message.to_vec(), tried: Vec::new(), refused: 0, next_try: None };
        if flow.ask(id, &mut query, cx) {
            flow.queries.push_back(query);
        }
        self.check_at(cx.now + PATIENCE);
    }

    fn open(&mut self, guest_port: u16, now: Instant) -> usize {
        if self.flows.len() >= MAX_FLOWS
            && let Some((oldest, _)) = self.flows.iter().min_by_key(|(_, flow)| flow.last_used)
        {
            self.remove(oldest);
        }
        let id = self.flows.insert(Flow {
            guest_port,
            upstream: Vec::new(),
            queries: VecDeque::new(),
            last_used: now,
            queued: false,
        });
        self.by_port.insert(guest_port, id);
        id
    }

    fn remove(&mut self, id: usize) {
        let flow = self.flows.remove(id);
        self.by_port.remove(&flow.guest_port);
        if flow.queued {
            self.readable.retain(|readable| *readable != id);
        }
    }

    fn check_at(&mut self, time: Instant) {
        self.next_check = Some(self.next_check.map_or(time, |next| next.min(time)));
    }

    /// Passes answers on while the guest takes frames, asks the next servers, and closes what is idle.
    pub(crate) fn run(&mut self, cx: &mut Cx<'_>) {
        if self.next_check.is_some_and(|time| time <= cx.now) {
            self.check(cx);
        }
        while cx.guest.outbox.has_room() {
            let Some(id) = self.readable.pop_front() else { return };
            let flow = &mut self.flows[id];
            flow.queued = flow.receive(id, cx);
            if flow.queued {
                self.readable.push_back(id);
            }
        }
    }

    fn check(&mut self, cx: &mut Cx<'_>) {
        self.next_check = None;
        let ids: Vec<usize> = self.flows.iter().map(|(id, _)| id).collect();
        for id in ids {
            let flow = &mut self.flows[id];
            if cx.now.duration_since(flow.last_used) >= IDLE {
                self.remove(id);
                continue;
            }
            flow.ask_again(id, |query, now| query.next_try.is_some_and(|time| time <= now), cx);
            let retries = flow.queries.iter().filter_map(|query| query.next_try).min();
            let next = retries.map_or(flow.last_used + IDLE, |retry| retry.min(flow.last_used + IDLE));
            self.check_at(next);
        }
    }
}

impl Flow {
    /// Sends `query` to the next server that takes it; `false` if it is over because none does.
    fn ask(&mut self, id: usize, query: &mut Query, cx: &mut Cx<'_>) -> bool {
        while let Some(server) = cx.resolver.next(&query.tried, cx.now) {
            query.tried.push(server);
            let sent = self.upstream(id, server, cx.registry).and_then(|socket| socket.send(&query.message));
            match sent {
                Err(error) if error.kind() != ErrorKind::WouldBlock => {
                    cx.resolver.failed(server, cx.now);
                    query.refused += 1;
                }
                // What a full socket drops the server leaves unanswered.
                _ => {
                    query.next_try = Some(cx.now + PATIENCE);
                    return true;
                }
            }
        }
        query.next_try = None;
        if query.refused < query.tried.len() {
            return true;
        }
        fail(&query.message, self.guest_port, cx.guest);
        false
    }

    /// Asks the next server for each query that is `due`.
    fn ask_again(&mut self, id: usize, due: impl Fn(&Query, Instant) -> bool, cx: &mut Cx<'_>) {
        for _ in 0..self.queries.len() {
            let Some(mut query) = self.queries.pop_front() else { return };
            if !due(&query, cx.now) || self.ask(id, &mut query, cx) {
                self.queries.push_back(query);
            }
        }
    }

    /// The socket for `server`.
    fn upstream(&mut self, id: usize, server: SocketAddr, registry: &Registry) -> io::Result<&UdpSocket> {
        let at = match self.upstream.iter().position(|(address, _)| *address == server) {
            Some(at) => at,
            None => {
                let mut socket = UdpSocket::bind(host_net::any_port_for(server))?;
                socket.connect(server)?;
                registry.register(&mut socket, Source::Dns(id).token(), Interest::READABLE)?;
                self.upstream.push((server, socket));
                self.upstream.len() - 1
            }
        };
        Ok(&self.upstream[at].1)
    }

    /// Takes one datagram or error from each server's socket; `false` when there was none.
    fn receive(&mut self, id: usize, cx: &mut Cx<'_>) -> bool {
        let mut more = false;
        for index in 0..self.upstream.len() {
            let mut buffer = cx.guest.outbox.buffer();
            let (server, socket) = &self.upstream[index];
            let server = *server;
            match socket.recv(&mut buffer[UDP_PAYLOAD..UDP_PAYLOAD + MAX_PAYLOAD]) {
                Ok(len) => {
                    more = true;
                    self.answer(buffer, len, server, cx);
                }
                Err(error) => {
                    cx.guest.outbox.recycle(buffer);
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
                        continue;
                    }
                    // The server's host or port is not there. The error is taken by having been read.
                    more = true;
                    cx.resolver.failed(server, cx.now);
                    for query in self.queries.iter_mut().filter(|query| query.tried.contains(&server)) {
                        query.refused += 1;
                    }
                    self.ask_again(id, |query, _| query.tried.last() == Some(&server), cx);
                }
            }
        }
        more
    }

    /// Passes the message of `len` bytes in `buffer` on, if it answers a query.
    fn answer(&mut self, buffer: Vec<u8>, len: usize, server: SocketAddr, cx: &mut Cx<'_>) {
        let message = &buffer[UDP_PAYLOAD..UDP_PAYLOAD + len];
        let asked =
            |query: &Query| len >= HEADER && query.id() == &message[..2] && query.tried.contains(&server);
        let Some(at) = self.queries.iter().position(asked) else {
            return cx.guest.outbox.recycle(buffer);
        };
        if let Some(query) = self.queries.remove(at) {
            for slower in query.tried.into_iter().filter(|tried| *tried != server) {
                cx.resolver.failed(slower, cx.now);
            }
        }
        self.last_used = cx.now;
        let subnet = cx.guest.subnet();
        cx.guest.outbox.push_udp(buffer, len, (subnet.dns(), DNS_PORT), (subnet.guest(), self.guest_port));
    }
}

/// Answers `query` with "server failure": so the guest's programs need not wait for what will not come.
fn fail(query: &[u8], guest_port: u16, guest: &mut Guest) {
    let mut buffer = guest.outbox.buffer();
    let message = &mut buffer[UDP_PAYLOAD..UDP_PAYLOAD + query.len()];
    message.copy_from_slice(query);
    message[2] |= RESPONSE;
    message[3] = RECURSION_AVAILABLE | SERVER_FAILURE;
    let subnet = guest.subnet();
    guest.outbox.push_udp(buffer, query.len(), (subnet.dns(), DNS_PORT), (subnet.guest(), guest_port));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Subnet;
    use crate::resolver::Resolver;
    use mio::Poll;

    const PORT: u16 = 5000;

    /// A relay, what it needs, and servers on the host's loopback.
    struct Bench {
        relay: DnsRelay,
        guest: Guest,
        poll: Poll,
        resolver: Resolver,
        now: Instant,
    }

    fn server() -> (std::net::UdpSocket, SocketAddr) {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    /// An address where nobody listens.
    fn refusing() -> SocketAddr {
        server().1
    }

    fn query(id: u8) -> Vec<u8> {
        let mut message = vec![0; HEADER + 5];
        message[1] = id;
        message
    }

    impl Bench {
        fn new(servers: &[SocketAddr]) -> Self {
            Self {
                relay: DnsRelay::new(),
                guest: Guest::new([2, 0, 0, 0, 0, 1], Subnet::DEFAULT),
                poll: Poll::new().unwrap(),
                resolver: Resolver::of(servers),
                now: Instant::now(),
            }
        }

        fn with(&mut self, act: impl FnOnce(&mut DnsRelay, &mut Cx<'_>)) {
            let cx = &mut Cx {
                guest: &mut self.guest,
                registry: self.poll.registry(),
                now: self.now,
                resolver: &mut self.resolver,
            };
            act(&mut self.relay, cx);
        }

        fn ask(&mut self, message: &[u8]) {
            self.with(|relay, cx| relay.send(PORT, message, cx));
        }

        fn run(&mut self) {
            self.with(|relay, cx| relay.run(cx));
        }

        /// Waits for sockets as the stack does, and gives the relay its turn.
        fn wait_and_run(&mut self) {
            let mut events = mio::Events::with_capacity(8);
            self.poll.poll(&mut events, Some(Duration::from_secs(10))).unwrap();
            assert!(!events.is_empty(), "nothing came");
            let ids: Vec<usize> = self.relay.flows.iter().map(|(id, _)| id).collect();
            ids.into_iter().for_each(|id| self.relay.ready(id));
            self.run();
        }

        /// The DNS messages that wait for the guest.
        fn answers(&mut self) -> Vec<Vec<u8>> {
            let mut answers = Vec::new();
            while let Some(frame) = self.guest.outbox.front() {
                answers.push(frame.bytes()[UDP_PAYLOAD..].to_vec());
                self.guest.outbox.pop();
            }
            answers
        }
    }

    #[test]
    fn a_silent_server_is_followed_by_the_next_after_a_second() {
        let ((first, first_address), (second, second_address)) = (server(), server());
        let mut bench = Bench::new(&[first_address, second_address]);
        // Two at once from one port, as resolvers ask for IPv4 and IPv6 addresses.
        bench.ask(&query(1));
        bench.ask(&query(2));
        let mut buffer = [0; 100];
        assert!(first.recv(&mut buffer).is_ok() && first.recv(&mut buffer).is_ok());
        let asks_again = bench.relay.next_check().unwrap();
        assert_eq!(asks_again, bench.now + PATIENCE);
        second.set_nonblocking(true).unwrap();
        bench.run();
        assert!(second.recv(&mut buffer).is_err(), "too early");

        bench.now = asks_again;
        bench.run();
        second.set_nonblocking(false).unwrap();
        for _ in 0..2 {
            let (len, from) = second.recv_from(&mut buffer).unwrap();
            second.send_to(&buffer[..len], from).unwrap();
        }
        let mut answers = Vec::new();
        while answers.len() < 2 {
            bench.wait_and_run();
            answers.extend(bench.answers());
        }
        answers.sort();
        assert_eq!(answers, [query(1), query(2)]);
        // The silent one has lost its place for now.
        assert_eq!(bench.resolver.next(&[], bench.now), Some(second_address));
    }

    #[test]
    fn a_server_that_refuses_is_followed_by_the_next_at_once() {
        let (second, second_address) = server();
        let mut bench = Bench::new(&[refusing(), second_address]);
        bench.ask(&query(1));
        bench.wait_and_run();
        let mut buffer = [0; 100];
        let (len, from) = second.recv_from(&mut buffer).unwrap();
        second.send_to(&buffer[..len], from).unwrap();
        bench.wait_and_run();
        assert_eq!(bench.answers(), [query(1)]);
    }

    #[test]
    fn where_every_server_refuses_the_guest_is_told() {
        let mut bench = Bench::new(&[refusing(), refusing()]);
        bench.ask(&query(7));
        let mut answers = Vec::new();
        while answers.is_empty() {
            bench.wait_and_run();
            answers = bench.answers();
        }
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0][..4], [0, 7, RESPONSE, RECURSION_AVAILABLE | SERVER_FAILURE]);
        // Idle: the port is forgotten, so the next query begins anew.
        bench.now += IDLE;
        bench.run();
        assert!(bench.relay.flows.is_empty());
    }

    #[test]
    fn answers_to_nothing_are_dropped_and_tables_bounded() {
        let (server, address) = server();
        let mut bench = Bench::new(&[address]);
        bench.ask(&query(1));
        let mut buffer = [0; 100];
        let (_, from) = server.recv_from(&mut buffer).unwrap();
        for message in [&query(2)[..], &query(1)[..5], &[]] {
            server.send_to(message, from).unwrap();
        }
        bench.wait_and_run();
        assert!(bench.answers().is_empty());
        for id in 0..200 {
            bench.ask(&query(id));
        }
        assert_eq!(bench.relay.flows[0].queries.len(), MAX_QUERIES);
        for port in 1..1000 {
            bench.with(|relay, cx| relay.send(port, &query(1), cx));
        }
        assert_eq!(bench.relay.flows.len(), MAX_FLOWS);
    }
}
