//! DHCP, DNS, UDP and ping through the stack.

use crate::guest::{Guest, pattern};
use outboard_netstack::address::{DNS, GATEWAY, GUEST};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{dhcpv4, icmp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::thread;

/// A server on the host's loopback that answers `count` datagrams with what `answer` makes of them.
fn udp_server(count: usize, answer: fn(&[u8]) -> Vec<u8>) -> (u16, thread::JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let thread = thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        for _ in 0..count {
            let (n, from) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(&answer(&buffer[..n]), from).unwrap();
        }
    });
    (port, thread)
}

#[test]
fn dhcp_gives_the_guest_its_address() {
    let mut guest = Guest::new("user");
    guest.interface.update_ip_addrs(|a| a.clear());
    guest.interface.routes_mut().remove_default_ipv4_route();
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let config = guest.until("lease", |g| match g.sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
        Some(dhcpv4::Event::Configured(config)) => Some((config.address, config.router, config.dns_servers)),
        _ => None,
    });
    assert_eq!((config.0.address(), config.0.prefix_len(), config.1), (GUEST, 24, Some(GATEWAY)));
    assert_eq!(config.2[..], [DNS]);
}

#[test]
fn datagrams_of_every_size_come_back() {
    let (port, thread) = udp_server(5, |data| data.iter().map(|b| !b).collect());
    let mut guest = Guest::new("user");
    let handle = guest.udp_socket(5000);
    // 65,492 is the most that fits the link's MTU. smoltcp's guest does not fragment; `fragments.rs` has larger ones.
    for size in [0, 1, 1472, 9000, 65_492] {
        let data = pattern(size, size as u64);
        guest.udp(handle).send_slice(&data, (GATEWAY, port)).unwrap();
        let (answer, from) = guest.receive_udp(handle);
        assert!(answer.iter().map(|b| !b).eq(data.iter().copied()), "size {size}");
        assert_eq!(from, (GATEWAY, port).into());
    }
    thread.join().unwrap();
}

#[test]
fn a_udp_forward_carries_both_ways_for_several_clients() {
    let mut guest = Guest::new("user,forward=udp:127.0.0.1:0:53");
    let address = guest.stack.forwards()[0].host;
    let handle = guest.udp_socket(53);
    let clients: Vec<_> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (i, client) in clients.iter().enumerate() {
        client.send_to(&[i as u8], address).unwrap();
    }
    for _ in &clients {
        let (data, from) = guest.receive_udp(handle);
        assert_eq!(from.port, clients[usize::from(data[0])].local_addr().unwrap().port());
        guest.udp(handle).send_slice(&[data[0], data[0]], from).unwrap();
    }
    for (i, client) in clients.iter().enumerate() {
        client.set_nonblocking(true).unwrap();
        let mut buffer = [0; 16];
        let n = guest.until("answer", |_| client.recv(&mut buffer).ok());
        assert_eq!(buffer[..n], [i as u8, i as u8]);
    }
}

#[test]
fn dns_is_relayed_with_several_queries_in_flight() {
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = resolver.local_addr().unwrap();
    let thread = thread::spawn(move || {
        let mut queries = Vec::new();
        for _ in 0..10 {
            let mut buffer = [0; 512];
            let (n, from) = resolver.recv_from(&mut buffer).unwrap();
            queries.push((buffer[..n].to_vec(), from));
        }
        // Answered only when all are there, last one first.
        for (query, from) in queries.iter().rev() {
            resolver.send_to(query, from).unwrap();
        }
    });
    let mut guest = Guest::new(&format!("user,dns={address},host-loopback=off"));
    let handles: Vec<_> = (0..10).map(|i| guest.udp_socket(6000 + i)).collect();
    for (i, handle) in handles.iter().enumerate() {
        guest.udp(*handle).send_slice(&[i as u8; 40], (DNS, 53)).unwrap();
    }
    for (i, handle) in handles.iter().enumerate() {
        assert_eq!(guest.receive_udp(*handle), (vec![i as u8; 40], (DNS, 53).into()));
    }
    thread.join().unwrap();
}

#[test]
fn dns_over_tcp_is_relayed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::new(&format!("user,dns={}", listener.local_addr().unwrap()));
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut query = Vec::new();
        stream.read_to_end(&mut query).unwrap();
        stream.write_all(&query).unwrap();
    });
    let handle = guest.connect(DNS, 53);
    guest.until("connect", |g| g.tcp(handle).may_send().then_some(()));
    assert_eq!(guest.exchange(handle, b"query"), b"query");
    thread.join().unwrap();
}

#[test]
fn the_gateway_answers_pings() {
    let mut guest = Guest::new("user");
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 8192]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(77)).unwrap();
    let handle = guest.sockets.add(socket);
    for target in [GATEWAY, DNS] {
        let request = Icmpv4Repr::EchoRequest { ident: 77, seq_no: 3, data: &[5; 1400] };
        let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
        let room = socket.send(request.buffer_len(), target.into()).unwrap();
        request.emit(&mut Icmpv4Packet::new_unchecked(room), &ChecksumCapabilities::default());
        let (answer, from) = guest.until("echo reply", |g| {
            let received = g.sockets.get_mut::<icmp::Socket>(handle).recv().ok();
            received.map(|(data, from)| (data.to_vec(), from))
        });
        assert_eq!(from, target.into());
        let packet = Icmpv4Packet::new_checked(&answer[..]).unwrap();
        let reply = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap();
        assert_eq!(reply, Icmpv4Repr::EchoReply { ident: 77, seq_no: 3, data: &[5; 1400] });
    }
}
