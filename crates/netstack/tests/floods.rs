//! Floods use up the process's open files on many systems, so they have a process of their own.

#[path = "netstack/frames.rs"]
#[allow(dead_code)] // The other tests use the rest.
mod frames;

use frames::*;
use outboard_netstack::address::{GATEWAY, GUEST};
use smoltcp::wire::TcpControl;
use std::net::{TcpListener, UdpSocket};
use std::time::Duration;

#[test]
fn floods_leave_the_stack_alive() {
    a_syn_flood_fills_the_table_and_no_more();
    a_flood_of_datagrams_reuses_the_table();
}

fn a_syn_flood_fills_the_table_and_no_more() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut stack = stack("user");
    let mut refused = 0;
    for source in 1..4000u16 {
        push(&mut stack, &tcp((GUEST, source), (GATEWAY, port), TcpControl::Syn, b""));
        stack.wait(Some(Duration::ZERO)).unwrap();
        stack.run();
        refused += drain(&mut stack).iter().filter(|p| p[9] == 6 && p[33] & 4 != 0).count();
    }
    // The system's limit on open files may end it sooner than the table does.
    assert!(refused >= 4000 - 1 - 1024, "{refused}");
    assert_alive(&mut stack);
}

fn a_flood_of_datagrams_reuses_the_table() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut stack = stack("user");
    for source in 1..3000u16 {
        push(&mut stack, &udp((GUEST, source), (GATEWAY, port), b"x"));
        stack.run();
    }
    assert_alive(&mut stack);
}
