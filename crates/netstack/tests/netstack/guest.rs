//! A guest in this process: a second smoltcp on the other end of the stack's link, against real sockets of the host.

use outboard_netstack::{Checksum, Stack};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Address};
use std::collections::VecDeque;
use std::time::Duration;

/// How long anything may take before a test gives up; only a hang gets there.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Default)]
pub struct Wire {
    to_guest: VecDeque<Vec<u8>>,
    from_guest: VecDeque<Vec<u8>>,
}

pub struct Rx(Vec<u8>);
pub struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        Some((Rx(self.to_guest.pop_front()?), Tx(&mut self.from_guest)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.from_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = outboard_netstack::MAX_FRAME;
        capabilities
    }
}

pub struct Guest {
    pub stack: Stack,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    wire: Wire,
    next_port: u16,
}

impl Guest {
    pub fn new(text: &str) -> Self {
        let stack = crate::frames::stack(text);
        let mut wire = Wire::default();
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(stack.mac())));
        config.random_seed = 42;
        let mut interface = Interface::new(config, &mut wire, Instant::now());
        let subnet = stack.subnet();
        interface.update_ip_addrs(|a| a.push(IpCidr::new(subnet.guest().into(), 24)).unwrap());
        interface.routes_mut().add_default_ipv4_route(subnet.gateway()).unwrap();
        Self { stack, interface, sockets: SocketSet::new(Vec::new()), wire, next_port: 1024 }
    }

    /// Moves frames both ways once; waits a little where nothing moved.
    pub fn step(&mut self) {
        self.interface.poll(Instant::now(), &mut self.wire, &mut self.sockets);
        let mut moved = false;
        for frame in self.wire.from_guest.drain(..) {
            self.stack.push(&frame, Checksum::Complete);
            moved = true;
        }
        self.stack.run();
        while let Some(frame) = self.stack.front() {
            self.wire.to_guest.push_back(frame.bytes().to_vec());
            self.stack.pop();
            moved = true;
        }
        let pause = if moved { Duration::ZERO } else { Duration::from_millis(1) };
        self.stack.wait(Some(pause)).unwrap();
    }

    /// Steps until `done` gives something.
    pub fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = std::time::Instant::now();
        loop {
            if let Some(result) = done(self) {
                return result;
            }
            assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
            self.step();
        }
    }

    pub fn run_until_finished<T>(&mut self, what: &str, thread: &std::thread::JoinHandle<T>) {
        self.until(what, |_| thread.is_finished().then_some(()));
    }

    pub fn tcp_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Starts a connection to `port` of `to`.
    pub fn connect(&mut self, to: Ipv4Address, port: u16) -> SocketHandle {
        let handle = self.tcp_socket();
        self.next_port += 1;
        let local = self.next_port;
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket.connect(self.interface.context(), (to, port), local).unwrap();
        handle
    }

    /// A connection to the host's loopback, through the gateway, that stands.
    pub fn connected(&mut self, port: u16) -> SocketHandle {
        let handle = self.connect(self.stack.subnet().gateway(), port);
        self.until("connect", |g| g.tcp(handle).may_send().then_some(()));
        handle
    }

    pub fn listen(&mut self, port: u16) -> SocketHandle {
        let handle = self.tcp_socket();
        self.tcp(handle).listen(port).unwrap();
        handle
    }

    pub fn udp_socket(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 256 << 10]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    pub fn udp(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn receive_udp(&mut self, handle: SocketHandle) -> (Vec<u8>, smoltcp::wire::IpEndpoint) {
        self.until("datagram", |g| {
            g.udp(handle).recv().ok().map(|(data, meta)| (data.to_vec(), meta.endpoint))
        })
    }

    /// Sends all of `data` and receives until the other side ends.
    pub fn exchange(&mut self, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
        let (mut sent, mut received) = (0, Vec::new());
        self.until("exchange", |g| {
            let socket = g.tcp(handle);
            if sent < data.len() && socket.can_send() {
                sent += socket.send_slice(&data[sent..]).unwrap();
                if sent == data.len() {
                    socket.close();
                }
            }
            while socket.can_recv() {
                socket
                    .recv(|bytes| {
                        received.extend_from_slice(bytes);
                        (bytes.len(), ())
                    })
                    .unwrap();
            }
            (sent == data.len() && !socket.may_recv() && !socket.can_recv()).then_some(())
        });
        received
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        bytes.extend_from_slice(&(state >> 11).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
