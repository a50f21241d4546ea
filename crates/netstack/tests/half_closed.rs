//! A table full of connections that one side has left. In a process of its own, for it needs many of the host's open files.

#[path = "netstack/frames.rs"]
#[allow(dead_code)] // The other tests use the rest.
mod frames;

use frames::*;
use outboard_netstack::Stack;
use smoltcp::wire::{TcpControl, TcpPacket};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// More than the table holds.
const LEFT: u16 = 1100;

/// Opens a connection from `port`, which the guest closes at once if `close` says so and the server never does.
fn left_behind(stack: &mut Stack, port: u16, to: (std::net::Ipv4Addr, u16), close: bool) {
    let base = syn(port, to);
    let isn = open(stack, base).unwrap_or_else(|| panic!("the connection from port {port} is refused"));
    let control = if close { TcpControl::Fin } else { TcpControl::None };
    push(stack, &Segment { control, seq: 1001, ack: Some(isn + 1), scale: None, ..base }.packet());
    answers(stack, Duration::from_millis(if close { 1000 } else { 0 }));
}

#[test]
fn half_closed_connections_give_way_to_new_ones() {
    let (listener, to) = server();
    let mut stack = stack("user");
    let mut kept: Vec<TcpStream> = Vec::new();
    // One that is in use throughout.
    left_behind(&mut stack, 1999, to, false);
    kept.push(listener.accept().unwrap().0);
    for port in 2000..2000 + LEFT {
        left_behind(&mut stack, port, to, true);
        kept.push(listener.accept().unwrap().0);
    }
    let start = Instant::now();
    assert!(open(&mut stack, syn(1000, to)).is_some());
    assert!(start.elapsed() < Duration::from_secs(1), "took {:?}", start.elapsed());

    // What the guest sends on the connection in use still arrives.
    let base = Segment { control: TcpControl::Psh, ..syn(1999, to) };
    push(&mut stack, &Segment { seq: 1001, ack: Some(0), scale: None, data: b"x", ..base }.packet());
    let packets = answers(&mut stack, Duration::from_secs(5));
    let answer = packets.iter().find(|packet| packet[9] == 6).expect("an answer");
    assert!(!TcpPacket::new_checked(&answer[20..]).unwrap().rst(), "the connection in use was given up");
}
