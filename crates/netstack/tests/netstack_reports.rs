//! Faults that users of networks like this one reported, as tests.

#[path = "netstack/frames.rs"]
#[allow(dead_code)]
mod frames;

use frames::*;
use outboard_netstack::address::{GATEWAY, GUEST};
use smoltcp::wire::TcpControl;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

/// SYN with a window scale, then ten full segments in order before the stack has its turn (a card takes up to 64 frames in
/// one go): more than the receive buffer, though within what the window of the SYN|ACK stands for once it is scaled.
#[test]
fn a_guest_that_overruns_the_receive_window_does_no_harm() {
    let (_listener, to) = server();
    let mut stack = stack("user");
    let base = syn(5555, to);
    let isn = open(&mut stack, base).unwrap();
    let data = vec![b'x'; 65_000];
    for i in 0..10 {
        let seq = 1001 + i * data.len() as u32;
        let segment =
            Segment { control: TcpControl::None, seq, ack: Some(isn + 1), scale: None, data: &data, ..base };
        push(&mut stack, &segment.packet());
    }
    assert_alive(&mut stack);
}

/// Five datagrams, 0.3 s apart, to a port of the host where nobody listens.
#[test]
fn a_closed_udp_port_of_the_host_is_reported() {
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut stack = stack("user");
    let mut unreachable = 0;
    for _ in 0..5 {
        push(&mut stack, &udp((GUEST, 9), (GATEWAY, port), b"x"));
        let packets = answers(&mut stack, Duration::from_millis(300));
        unreachable += packets.iter().filter(|p| (p[9], p[20], p[21]) == (1, 3, 3)).count();
    }
    assert!(unreachable > 0, "no ICMP port unreachable");
}

/// TCP is told by ICMP that there is no route; a datagram and a ping are not. Needs a host without routes:
/// `unshare -n` around the test program, as root. Does nothing elsewhere.
#[test]
fn a_host_without_a_route_is_reported_for_datagrams_too() {
    let nowhere: Ipv4Addr = [192, 0, 2, 1].into();
    let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
    if probe.connect((nowhere, 80)).is_ok() {
        return eprintln!("skipped: this host has a route");
    }
    let mut stack = stack("user");
    for packet in [udp((GUEST, 9), (nowhere, 80), b"hello"), ping(nowhere)] {
        push(&mut stack, &packet);
        let packets = answers(&mut stack, Duration::from_millis(300));
        assert!(
            packets.iter().any(|p| (p[9], p[20]) == (1, 3)),
            "no ICMP unreachable for protocol {}",
            packet[9]
        );
    }
}

/// The guest has closed each connection (and Linux forgets such a one after 60 s); the server never closes its end.
#[test]
fn connections_that_the_guest_has_left_do_not_fill_the_table_for_ever() {
    let (listener, to) = server();
    let mut stack = stack("user");
    let mut kept = Vec::new();
    for port in 2000..3100 {
        let base = syn(port, to);
        let Some(isn) = open(&mut stack, base) else {
            panic!("connection {} is refused, though the guest has closed all before it", kept.len());
        };
        kept.push(listener.accept().unwrap());
        let fin = Segment { control: TcpControl::Fin, seq: 1001, ack: Some(isn + 1), scale: None, ..base };
        push(&mut stack, &fin.packet());
        answers(&mut stack, Duration::from_millis(50));
    }
}
