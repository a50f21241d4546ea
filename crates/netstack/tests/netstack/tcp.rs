//! TCP through the stack, against servers and clients on the host's loopback.

use crate::guest::{Guest, pattern};
use outboard_netstack::address::{DNS, GATEWAY};
use outboard_netstack::{NetError, NetOptions, Stack};
use smoltcp::socket::tcp::State;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

const MIB: usize = 1 << 20;

fn server() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn forwarded(guest_port: u16) -> (Guest, SocketAddr) {
    let guest = Guest::new(&format!("user,forward=127.0.0.1:0:{guest_port}"));
    let address = guest.stack.forwards()[0].host;
    (guest, address)
}

#[test]
fn download_of_64_mib() {
    let (listener, port) = server();
    let data = pattern(64 * MIB, 1);
    let expected = data.clone();
    let thread = thread::spawn(move || listener.accept().unwrap().0.write_all(&data).unwrap());
    let mut guest = Guest::new("user");
    let handle = guest.connected(port);
    let received = guest.exchange(handle, b"");
    assert!(received == expected, "{} bytes", received.len());
    thread.join().unwrap();
}

#[test]
fn upload_of_64_mib() {
    let (listener, port) = server();
    let data = pattern(64 * MIB, 2);
    let thread = thread::spawn(move || {
        let mut received = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
        received
    });
    let mut guest = Guest::new("user");
    let handle = guest.connected(port);
    guest.exchange(handle, &data);
    let received = thread.join().unwrap();
    assert!(received == data, "{} bytes", received.len());
}

#[test]
fn forward_of_64_mib_each_way() {
    let (mut guest, address) = forwarded(80);
    let handle = guest.listen(80);
    let (up, down) = (pattern(64 * MIB, 3), pattern(64 * MIB, 4));
    let to_send = up.clone();
    let thread = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let mut reader = stream.try_clone().unwrap();
        let reader = thread::spawn(move || {
            let mut received = Vec::new();
            reader.read_to_end(&mut received).unwrap();
            received
        });
        stream.write_all(&to_send).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        reader.join().unwrap()
    });
    guest.until("connection", |g| g.tcp(handle).may_send().then_some(()));
    assert_eq!(guest.tcp(handle).remote_endpoint().unwrap().addr, GATEWAY.into());
    let received = guest.exchange(handle, &down);
    assert!(received == up, "{} bytes", received.len());
    guest.run_until_finished("client", &thread);
    assert!(thread.join().unwrap() == down);
}

#[test]
fn two_hundred_connections_at_once() {
    let (listener, port) = server();
    let thread = thread::spawn(move || {
        let streams: Vec<_> = (0..200).map(|_| listener.accept().unwrap().0).collect();
        let echo = |mut stream: TcpStream| {
            let mut data = Vec::new();
            stream.read_to_end(&mut data).unwrap();
            stream.write_all(&data).unwrap();
        };
        let threads: Vec<_> = streams.into_iter().map(|s| thread::spawn(move || echo(s))).collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
    let mut guest = Guest::new("user");
    let handles: Vec<_> = (0..200).map(|_| guest.connect(GATEWAY, port)).collect();
    // All of them stand before the first one is used.
    guest.until("200 connections", |g| handles.iter().all(|h| g.tcp(*h).may_send()).then_some(()));
    for (i, handle) in handles.iter().enumerate() {
        let data = pattern(20_000, i as u64);
        assert!(guest.exchange(*handle, &data) == data, "connection {i}");
    }
    guest.run_until_finished("server", &thread);
    thread.join().unwrap();
}

#[test]
fn a_thousand_connections_in_a_row() {
    let (listener, port) = server();
    let thread = thread::spawn(move || {
        for _ in 0..1000 {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(&request).unwrap();
        }
    });
    let mut guest = Guest::new("user");
    for i in 0..1000u32 {
        let handle = guest.connected(port);
        assert_eq!(guest.exchange(handle, &i.to_le_bytes()), i.to_le_bytes());
        guest.sockets.remove(handle);
    }
    thread.join().unwrap();
}

#[test]
fn each_side_may_end_first_and_still_receive() {
    // The guest ends first.
    let (listener, port) = server();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        stream.read_to_end(&mut request).unwrap();
        stream.write_all(b"late answer").unwrap();
        request
    });
    let mut guest = Guest::new("user");
    let handle = guest.connected(port);
    assert_eq!(guest.exchange(handle, b"request"), b"late answer");
    assert_eq!(thread.join().unwrap(), b"request");

    // The host ends first.
    let (mut guest, address) = forwarded(7);
    let handle = guest.listen(7);
    let thread = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    });
    guest.until("end of stream", |g| (g.tcp(handle).state() == State::CloseWait).then_some(()));
    guest.exchange(handle, b"late answer");
    guest.run_until_finished("client", &thread);
    assert_eq!(thread.join().unwrap(), b"late answer");
}

#[test]
fn resets_reach_the_other_side() {
    let (listener, port) = server();
    let mut guest = Guest::new("user");
    let handle = guest.connected(port);
    let (mut stream, _) = listener.accept().unwrap();
    guest.tcp(handle).abort();
    let thread = thread::spawn(move || stream.read(&mut [0; 1]));
    guest.run_until_finished("reset of the host's side", &thread);
    assert_eq!(thread.join().unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);

    let handle = guest.connected(port);
    let (stream, _) = listener.accept().unwrap();
    socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(stream);
    // An orderly end would leave the socket in CLOSE-WAIT.
    guest.until("reset of the guest's side", |g| (g.tcp(handle).state() == State::Closed).then_some(()));
}

#[test]
fn refused_and_forbidden_connections_are_reset() {
    let closed = server().1;
    let mut guest = Guest::new("user");
    // Other addresses of the virtual network do not even answer ARP.
    for (address, port) in [(GATEWAY, closed), (DNS, 80), ([127, 0, 0, 1].into(), closed)] {
        let handle = guest.connect(address, port);
        guest.until("refusal", |g| (!g.tcp(handle).is_open()).then_some(()));
    }
}

#[test]
fn the_hosts_loopback_can_be_closed_off() {
    let (listener, port) = server();
    listener.set_nonblocking(true).unwrap();
    let mut guest = Guest::new("user,host-loopback=off");
    for address in [GATEWAY, [127, 0, 0, 1].into()] {
        let handle = guest.connect(address, port);
        guest.until("refusal", |g| (!g.tcp(handle).is_open()).then_some(()));
    }
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_forward_to_a_closed_guest_port_ends_the_hosts_connection() {
    let (mut guest, address) = forwarded(81);
    let thread = thread::spawn(move || TcpStream::connect(address).unwrap().read(&mut [0; 1]));
    guest.run_until_finished("end of the connection", &thread);
    assert_eq!(thread.join().unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_side_that_does_not_read_stops_the_other_one() {
    // A host that does not read: what the guest can get rid of is bounded by buffers.
    let (listener, port) = server();
    let mut guest = Guest::new("user");
    let handle = guest.connected(port);
    let (stream, _) = listener.accept().unwrap();
    let chunk = pattern(MIB, 9);
    let (mut sent, mut idle) = (0, 0);
    while idle < 300 {
        let n = guest.tcp(handle).send_slice(&chunk).unwrap();
        sent += n;
        idle = if n == 0 { idle + 1 } else { 0 };
        assert!(sent < 64 * MIB, "no back-pressure");
        guest.step();
    }
    drop(stream);

    // A guest that does not read.
    let handle = guest.connected(port);
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    let (mut sent, mut idle) = (0, 0);
    while idle < 300 {
        match stream.write(&chunk) {
            Ok(n) => (sent, idle) = (sent + n, 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                idle += 1;
            }
        }
        assert!(sent < 64 * MIB, "no back-pressure");
        guest.step();
    }
    assert!(guest.tcp(handle).can_recv());
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() {
    let (_listener, port) = server();
    let options: NetOptions = format!("user,forward=127.0.0.1:{port}:22").parse().unwrap();
    let error = Stack::new(&options).map(|_| ()).unwrap_err();
    assert!(matches!(error, NetError::Listen { .. }));
    let text = error.to_string();
    assert!(text.contains(&format!("tcp 127.0.0.1:{port}")), "{text}");
    assert!(
        text.contains("another program has this port") && text.contains("choose another host port"),
        "{text}"
    );
}

#[test]
fn a_guests_reboot_breaks_connections_and_keeps_forwards() {
    let (mut guest, address) = forwarded(22);
    let handle = guest.listen(22);
    let first = thread::spawn(move || TcpStream::connect(address).unwrap().read(&mut [0; 1]));
    guest.until("first connection", |g| g.tcp(handle).may_send().then_some(()));
    guest.stack.reset();
    guest.run_until_finished("end of the first connection", &first);
    assert_eq!(first.join().unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);

    guest.sockets.remove(handle);
    let handle = guest.listen(22);
    let second = thread::spawn(move || {
        let mut data = Vec::new();
        TcpStream::connect(address).unwrap().read_to_end(&mut data).unwrap();
        data
    });
    guest.until("second connection", |g| g.tcp(handle).may_send().then_some(()));
    guest.exchange(handle, b"hello again");
    guest.run_until_finished("second client", &second);
    assert_eq!(second.join().unwrap(), b"hello again");
}
