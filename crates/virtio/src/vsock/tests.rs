use super::connection::BUFFER;
use super::packet::{HOST_CID, NO_BOTH, NO_SEND, STREAM, op};
use super::*;
use crate::testing::Driver;
use proptest::prelude::*;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use tempfile::TempDir;

const CID: u64 = 3;
/// Linux's receive buffers.
const BUFFER_SIZE: u32 = 4096;

/// A guest's side of the device: the test driver, with receive buffers always there.
struct Guest {
    driver: Driver,
    /// Address of each receive buffer and of the spare transmit area, by the head of its chain.
    buffers: Vec<(u16, u64)>,
    outgoing: u64,
    directory: TempDir,
}

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let device = Vsock::new("vsock0", CID, &directory.path().join("v.sock")).unwrap();
        let mut guest =
            Self { driver: Driver::new(Box::new(device)), buffers: Vec::new(), outgoing: 0, directory };
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.buffers.clear();
        self.driver.start(u64::MAX, 64);
        self.outgoing = self.driver.alloc((HEADER + 2 * MAX_PAYLOAD) as u64);
        for _ in 0..32 {
            let address = self.driver.alloc(BUFFER_SIZE.into());
            self.give(address);
        }
        self.driver.kick(RECEIVE);
    }

    fn give(&mut self, address: u64) {
        let head = self.driver.add(RECEIVE, &[(address, BUFFER_SIZE, true)]);
        self.buffers.push((head, address));
    }

    fn path(&self, port: Option<u32>) -> std::path::PathBuf {
        self.directory.path().join(port.map_or("v.sock".to_owned(), |p| format!("v.sock_{p}")))
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        let memory = &self.driver.memory;
        vm_memory::Bytes::write_slice(memory, bytes, vm_memory::GuestAddress(self.outgoing)).unwrap();
        self.driver.add(TRANSMIT, &[(self.outgoing, bytes.len() as u32, false)]);
        self.driver.kick(TRANSMIT);
        assert_eq!(self.driver.wait_used(TRANSMIT).1, 0);
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        self.send_raw(&[&header.to_bytes()[..], data].concat());
    }

    fn take(&mut self, head: u16, written: u32) -> (Header, Vec<u8>) {
        let at = self.buffers.iter().position(|b| b.0 == head).expect("a buffer that was given");
        let (_, address) = self.buffers.remove(at);
        let bytes = self.driver.get(address, written as usize);
        self.give(address);
        self.driver.kick(RECEIVE);
        let (header, data) = bytes.split_first_chunk::<HEADER>().expect("a whole header");
        let header = Header::from_bytes(header);
        assert_eq!((header.dst_cid, header.len as usize), (CID, data.len()));
        (header, data.to_vec())
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, written) = self.driver.wait_used(RECEIVE);
        self.take(head, written)
    }

    /// The next packet, which must be of this operation.
    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!((header.op, header.kind, header.src_cid), (op, STREAM, HOST_CID), "{header:?}");
        (header, data)
    }

    /// A program of the host connects to `port` of the guest, which takes it; the host's port.
    fn connect_from_host(&mut self, port: u32) -> (BufReader<UnixStream>, u32) {
        let mut stream = UnixStream::connect(self.path(None)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        self.send(packet(op::RESPONSE, port, request.src_port), b"");
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port));
        (stream, request.src_port)
    }

    /// The guest connects from `port` to a listening program of the host at port 5000.
    fn connect_to_host(&mut self, port: u32, listener: &UnixListener) -> UnixStream {
        self.send(packet(op::REQUEST, port, 5000), b"");
        let (response, _) = self.expect(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port, response.buf_alloc), (5000, port, BUFFER));
        listener.accept().unwrap().0
    }
}

/// A packet of the guest, which has a buffer of 64 KiB.
fn packet(op: u16, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: STREAM,
        op,
        buf_alloc: 65536,
        ..Header::default()
    }
}

fn rw(guest_port: u32, host_port: u32, data: &[u8]) -> Header {
    Header { len: data.len() as u32, ..packet(op::RW, guest_port, host_port) }
}

#[test]
fn configuration_is_the_context_identifier() {
    let guest = Guest::new();
    assert_eq!(guest.driver.read(0x2000, outboard_bus::Width::B4), CID);
    assert_eq!(guest.driver.read(0x2004, outboard_bus::Width::B4), 0);
}

#[test]
fn data_both_ways_on_a_connection_of_the_host() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.connect_from_host(1024);
    stream.get_mut().write_all(b"to the guest").unwrap();
    let (header, data) = guest.expect(op::RW);
    assert_eq!((&data[..], header.src_port, header.dst_port), (&b"to the guest"[..], port, 1024));
    guest.send(rw(1024, port, b"to the host"), b"to the host");
    let mut answer = [0; 11];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"to the host");
}

#[test]
fn each_direction_ends_by_itself() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(Some(5000))).unwrap();
    let mut stream = guest.connect_to_host(7, &listener);
    guest.send(rw(7, 5000, b"request"), b"request");
    guest.send(Header { flags: NO_SEND, ..packet(op::SHUTDOWN, 7, 5000) }, b"");
    let mut request = Vec::new();
    stream.read_to_end(&mut request).unwrap();
    assert_eq!(request, b"request");
    stream.write_all(b"late answer").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"late answer");
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags & NO_SEND, NO_SEND);
    guest.send(Header { flags: NO_BOTH, ..packet(op::SHUTDOWN, 7, 5000) }, b"");
    guest.expect(op::RST);
    // Nothing is left: the same ports serve again.
    guest.connect_to_host(7, &listener);
}

#[test]
fn a_program_that_goes_away_is_reported() {
    let mut guest = Guest::new();
    let (stream, port) = guest.connect_from_host(9);
    drop(stream);
    let mut flags = 0;
    while flags != NO_BOTH {
        flags = guest.expect(op::SHUTDOWN).0.flags;
    }
    guest.send(packet(op::RST, 9, port), b"");
    guest.connect_from_host(9);
}

#[test]
fn refusals_both_ways() {
    let mut guest = Guest::new();
    guest.send(packet(op::REQUEST, 7, 4444), b"");
    let (reset, _) = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (4444, 7), "nobody listens there");

    let mut stream = UnixStream::connect(guest.path(None)).unwrap();
    stream.write_all(b"CONNECT 1\n").unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(packet(op::RST, 1, request.src_port), b"");
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    for greeting in [&b"HELLO\n"[..], b"CONNECT x\n", b"CONNECT 4294967296\n", &[b'x'; 100]] {
        let mut stream = UnixStream::connect(guest.path(None)).unwrap();
        // The device may hang up before all is written.
        let _ = stream.write_all(greeting);
        let end = stream.read(&mut [0; 1]);
        assert!(
            matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset),
            "{greeting:?}"
        );
    }
}

#[test]
fn the_guests_credit_limits_what_it_is_sent() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.connect_from_host(5);
    let data: Vec<u8> = (0..200_000u32).map(|i| (i / 3) as u8).collect();
    let to_send = data.clone();
    let writer = std::thread::spawn(move || stream.get_mut().write_all(&to_send).map(|()| stream).unwrap());
    let mut received = Vec::new();
    let mut requests = 0;
    while received.len() < data.len() {
        let (header, part) = guest.receive();
        match header.op {
            op::RW => received.extend(part),
            op::CREDIT_REQUEST => {
                requests += 1;
                assert_eq!(
                    received.len(),
                    (65536 * requests).min(data.len()),
                    "all of the credit and no more"
                );
                let update = Header { fwd_cnt: received.len() as u32, ..packet(op::CREDIT_UPDATE, 5, port) };
                guest.send(update, b"");
            }
            other => panic!("operation {other}"),
        }
    }
    assert!(received == data && requests == 3);
    writer.join().unwrap();
}

#[test]
fn the_guest_is_told_of_room_and_cut_off_without() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(Some(5000))).unwrap();
    let mut stream = guest.connect_to_host(7, &listener);
    // A program that reads: the guest can send for ever on the credit it is told of.
    let chunk = [3; 16384];
    let (mut sent, mut forwarded) = (0u32, 0u32);
    let mut buffer = vec![0; chunk.len()];
    for _ in 0..64 {
        while sent.wrapping_sub(forwarded) + chunk.len() as u32 > BUFFER {
            forwarded = guest.expect(op::CREDIT_UPDATE).0.fwd_cnt;
        }
        guest.send(rw(7, 5000, &chunk), &chunk);
        sent += chunk.len() as u32;
        stream.read_exact(&mut buffer).unwrap();
    }
    // One that does not: the socket's buffer and ours fill, then a guest that goes on is cut off.
    let mut rounds = 0;
    loop {
        guest.send(rw(7, 5000, &chunk), &chunk);
        rounds += 1;
        assert!(rounds < 1000, "no limit");
        let mut ops = Vec::new();
        while let Some((head, written)) = guest.driver.poll_used(RECEIVE) {
            ops.push(guest.take(head, written).0.op);
        }
        if ops.contains(&op::RST) {
            break;
        }
    }
}

#[test]
fn two_hundred_connections_at_once() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..200).map(|i| guest.connect_from_host(10_000 + i)).collect();
    for (i, (stream, _)) in streams.iter_mut().enumerate() {
        stream.get_mut().write_all(&[i as u8; 100]).unwrap();
    }
    let mut seen = [false; 200];
    for _ in 0..200 {
        let (header, data) = guest.expect(op::RW);
        let i = (header.dst_port - 10_000) as usize;
        assert_eq!((header.src_port, &data[..]), (streams[i].1, &[i as u8; 100][..]));
        assert!(!std::mem::replace(&mut seen[i], true));
    }
}

#[test]
fn a_full_table_refuses() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(Some(5000))).unwrap();
    let streams: Vec<_> =
        (0..MAX_CONNECTIONS as u32).map(|port| guest.connect_to_host(port, &listener)).collect();
    guest.send(packet(op::REQUEST, 99_999, 5000), b"");
    assert_eq!(guest.expect(op::RST).0.dst_port, 99_999);
    drop(streams);
}

#[test]
fn hostile_headers_do_no_harm() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(Some(5000))).unwrap();
    let _stream = guest.connect_to_host(7, &listener);
    for header in [
        Header { len: u32::MAX, ..packet(op::RW, 7, 5000) },
        Header { len: 1, ..packet(op::RW, 7, 5000) },
        Header { src_cid: 99, ..packet(op::RST, 7, 5000) },
        packet(op::RST, 1, 2),
    ] {
        guest.send(header, b"");
    }
    guest.send_raw(b"short");
    guest.send_raw(b"");
    // Each of these is answered with RST.
    for header in [
        Header { dst_cid: 77, ..packet(op::REQUEST, 1, 5000) },
        Header { kind: 2, ..packet(op::REQUEST, 1, 5000) },
        packet(0, 1, 5000),
        packet(0xffff, 1, 5000),
        packet(op::RESPONSE, 1, 5000),
        rw(1, 5000, b""),
        packet(op::CREDIT_REQUEST, 1, 5000),
        // The last one is for the connection that stands.
        packet(op::REQUEST, 7, 5000),
    ] {
        guest.send(header, b"");
        let (reset, _) = guest.receive();
        assert_eq!(
            (reset.op, reset.src_cid, reset.dst_port),
            (op::RST, header.dst_cid, header.src_port),
            "{header:?}"
        );
    }
    guest.connect_to_host(7, &listener);
}

#[test]
fn a_receive_buffer_without_room_for_a_header_breaks_the_device() {
    let mut guest = Guest::new();
    guest.driver.reset();
    guest.driver.start(u64::MAX, 8);
    guest.outgoing = guest.driver.alloc(4096);
    let address = guest.driver.alloc(64);
    guest.driver.add(RECEIVE, &[(address, HEADER as u32 - 1, true)]);
    guest.send(packet(op::REQUEST, 1, 1), b"");
    guest.driver.wait_broken();
}

#[test]
fn a_reset_ends_connections_and_keeps_the_socket() {
    let mut guest = Guest::new();
    let (mut stream, _) = guest.connect_from_host(5);
    guest.driver.reset();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    guest.start();
    guest.connect_from_host(5);
}

#[test]
fn socket_files_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v.sock");
    let first = Vsock::new("vsock0", CID, &path).unwrap();
    assert!(matches!(Vsock::new("vsock1", CID, &path), Err(VsockError::InUse(_))));
    drop(first);
    assert!(!path.exists());
    // What a killed process leaves behind.
    drop(UnixListener::bind(&path).unwrap());
    drop(Vsock::new("vsock0", CID, &path).unwrap());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(Vsock::new("vsock0", CID, &path), Err(VsockError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let missing = directory.path().join("missing/v.sock");
    let error = Vsock::new("vsock0", CID, &missing).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("directory must exist"), "{error}");
    for cid in [0, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(matches!(Vsock::new("vsock0", cid, &missing), Err(VsockError::Cid(_))));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn no_packets_do_harm(packets in proptest::collection::vec(
        (0..9u16, 0..4u32, 0..3u32, 0..4u32, any::<u32>(), any::<u32>(), proptest::collection::vec(any::<u8>(), 0..600)),
        1..60,
    )) {
        let mut guest = Guest::new();
        let listener = UnixListener::bind(guest.path(Some(1))).unwrap();
        listener.set_nonblocking(true).unwrap();
        for (op, guest_port, host_port, flags, buf_alloc, fwd_cnt, data) in packets {
            let header = Header { flags, buf_alloc, fwd_cnt, ..rw(guest_port, host_port, &data) };
            guest.send(Header { op, ..header }, &data);
            while let Some((head, written)) = guest.driver.poll_used(RECEIVE) {
                guest.take(head, written);
            }
            let _ = listener.accept();
        }
        prop_assert!(!guest.driver.is_broken());
    }
}

/// The guest's program closes its socket while the host's is slow. Linux then sends SHUTDOWN and, after 8 s without an answer, RST
/// (VSOCK_CLOSE_TIMEOUT). What the guest had been told was taken must still reach the host's program.
#[test]
fn data_that_was_accepted_outlives_the_guests_reset() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(Some(5000))).unwrap();
    let mut host = guest.connect_to_host(1024, &listener);
    let pause = || std::thread::sleep(std::time::Duration::from_millis(50));
    let (mut sent, mut forwarded) = (0_u32, 0_u32);
    let block = [0x42; 4096];
    // As much as the host's credit allows, until it gives no more.
    loop {
        while sent - forwarded + block.len() as u32 <= BUFFER {
            guest.send(rw(1024, 5000, &block), &block);
            sent += block.len() as u32;
        }
        pause();
        guest.send(packet(op::CREDIT_REQUEST, 1024, 5000), b"");
        pause();
        let before = forwarded;
        while let Some((head, written)) = guest.driver.poll_used(RECEIVE) {
            forwarded = guest.take(head, written).0.fwd_cnt;
        }
        if forwarded == before {
            break;
        }
    }
    guest.send(Header { flags: NO_BOTH, ..packet(op::SHUTDOWN, 1024, 5000) }, b"");
    pause();
    guest.send(packet(op::RST, 1024, 5000), b"");
    pause();
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), sent as usize);
}

/// What `echo text | socat - UNIX:PATH` does: the program is gone before the guest has answered.
#[test]
fn a_program_that_connects_sends_and_closes_at_once_is_served() {
    let mut guest = Guest::new();
    let mut stream = UnixStream::connect(guest.path(None)).unwrap();
    stream.write_all(b"CONNECT 1024\nall that there is").unwrap();
    drop(stream);
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(packet(op::RESPONSE, 1024, request.src_port), b"");
    // A guest's program that speaks first: there is nobody left to hear it.
    guest.send(rw(1024, request.src_port, b"welcome"), b"welcome");
    assert_eq!(guest.expect(op::RW).1, b"all that there is");
    let mut flags = 0;
    while flags != NO_BOTH {
        flags = guest.expect(op::SHUTDOWN).0.flags;
    }
    guest.send(packet(op::RST, 1024, request.src_port), b"");
    guest.connect_from_host(1024);
}

/// A guest that powers off or loses its driver has no RST to send; what it was told is taken counts all the same.
#[test]
fn data_that_was_accepted_outlives_a_reset_of_the_device() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(Some(5000))).unwrap();
    let mut host = guest.connect_to_host(7, &listener);
    let block = [0x17; 16384];
    let mut sent = 0;
    // More than the socket's own buffer takes, so that some is still with the device.
    while sent < 2 * BUFFER as usize {
        guest.send(rw(7, 5000, &block), &block);
        sent += block.len();
    }
    guest.driver.reset();
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), sent);
}

/// The table is full when a program comes; when there is room, it is served without anything else happening first.
#[test]
fn a_program_that_came_when_the_table_was_full_is_served_once_there_is_room() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(Some(5000))).unwrap();
    let streams: Vec<_> =
        (0..MAX_CONNECTIONS as u32).map(|port| guest.connect_to_host(port, &listener)).collect();
    let mut late = UnixStream::connect(guest.path(None)).unwrap();
    late.write_all(b"CONNECT 77\n").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    guest.send(packet(op::RST, 0, 5000), b"");
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 77);
    drop(streams);
}
