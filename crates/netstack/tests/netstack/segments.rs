//! TCP segments made by hand, such as no sane guest sends.

use crate::frames::*;
use outboard_netstack::Stack;
use smoltcp::wire::{TcpControl, TcpPacket};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// A connection that stands: the guest's end as the segment that would come next, and the host's.
fn connected(stack: &mut Stack) -> (Segment<'static>, TcpStream) {
    let (listener, to) = server();
    let base = syn(5555, to);
    let isn = open(stack, base).unwrap();
    let base = Segment { control: TcpControl::None, seq: 1001, ack: Some(isn + 1), scale: None, ..base };
    push(stack, &base.packet());
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    (base, stream)
}

/// Whether the connection still stands, seen from the host: data comes through to the guest, and no RST.
fn reaches_guest(stack: &mut Stack, stream: &mut TcpStream) -> bool {
    drain(stack);
    stream.write_all(b"still there").unwrap();
    let packets = answers(stack, Duration::from_secs(5));
    let segments = packets.iter().filter(|packet| packet[9] == 6);
    segments.clone().count() > 0
        && segments.into_iter().all(|packet| !TcpPacket::new_checked(&packet[20..]).unwrap().rst())
}

#[test]
fn nothing_that_follows_the_end_of_the_stream_reaches_the_host() {
    let mut stack = stack("user");
    let (base, mut stream) = connected(&mut stack);
    push(&mut stack, &Segment { control: TcpControl::Fin, data: b"last", ..base }.packet());
    // Behind the FIN: in order, and so far away that sequence numbers wrap.
    for seq in [1006, 1006 + (1 << 30), 1006 + (1 << 31) - 1, 1006 + (1 << 31)] {
        push(&mut stack, &Segment { seq, data: b"too late", ..base }.packet());
    }
    stack.run();
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert_eq!(received, b"last");
    assert!(reaches_guest(&mut stack, &mut stream));
}

#[test]
fn an_end_behind_more_than_the_window_is_not_believed() {
    let mut stack = stack("user");
    let (base, mut stream) = connected(&mut stack);
    // Eight segments in order, then one that overruns the buffer and ends the stream.
    let data = vec![b'x'; 65_000];
    for i in 0..9 {
        let control = if i == 8 { TcpControl::Fin } else { TcpControl::None };
        push(&mut stack, &Segment { control, seq: 1001 + i * 65_000, data: &data, ..base }.packet());
    }
    let mut received = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        stack.run();
        drain(&mut stack);
        match stream.read(&mut buffer) {
            Ok(0) => panic!("an end after {received} bytes of 585,000"),
            Ok(count) => received += count,
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
                break;
            }
        }
    }
    assert!(received > 0 && received < 585_000, "{received}");
    assert!(reaches_guest(&mut stack, &mut stream));
}

/// The guest is the server here, and sends more than the buffer holds together with its SYN|ACK.
#[test]
fn a_served_guest_that_overruns_the_window_does_no_harm() {
    let mut stack = stack("user,forward=127.0.0.1:0:80");
    let _client = TcpStream::connect(stack.forwards()[0].host).unwrap();
    let packets = answers(&mut stack, Duration::from_secs(5));
    let asked = TcpPacket::new_checked(&packets[0][20..]).unwrap();
    let isn = asked.seq_number().0.cast_unsigned();
    let to = (outboard_netstack::address::GATEWAY, asked.src_port());
    let answer = Segment { ack: Some(isn.wrapping_add(1)), ..syn(80, to) };
    push(&mut stack, &answer.packet());
    let data = vec![b'x'; 65_000];
    for i in 0..10 {
        let segment =
            Segment { control: TcpControl::None, seq: 1001 + i * 65_000, scale: None, data: &data, ..answer };
        push(&mut stack, &segment.packet());
    }
    assert_alive(&mut stack);
}
