use super::*;
use crate::testing::Driver;
use std::net::{TcpListener, UdpSocket};

const ALL: u64 = u64::MAX;
const ROUTER_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// A guest's side of the card: the test driver with receive buffers of one size.
struct Guest {
    driver: Driver,
    /// Address and size of each receive buffer, by the head of its chain.
    buffers: Vec<(u16, u64, u32)>,
}

impl Guest {
    fn new(features: u64, queue_size: u16) -> Self {
        let net = Net::new("net0", &"user,host-loopback=on".parse().unwrap()).unwrap();
        let mut driver = Driver::new(Box::new(net));
        driver.start(features, queue_size);
        Self { driver, buffers: Vec::new() }
    }

    fn give_buffers(&mut self, count: usize, size: u32) {
        for _ in 0..count {
            let address = self.driver.alloc(u64::from(size));
            let head = self.driver.add(RECEIVE, &[(address, size, true)]);
            self.buffers.push((head, address, size));
        }
        self.driver.kick(RECEIVE);
    }

    /// Sends `frame` in two buffers, the header apart as Linux does without `VIRTIO_F_ANY_LAYOUT`.
    fn send(&mut self, flags: u8, frame: &[u8]) {
        let mut header = [0; HEADER];
        header[0] = flags;
        let (header, data) = (self.driver.put(&header), self.driver.put(frame));
        self.driver.add(TRANSMIT, &[(header, HEADER as u32, false), (data, frame.len() as u32, false)]);
        self.driver.kick(TRANSMIT);
        assert_eq!(self.driver.wait_used(TRANSMIT).1, 0);
    }

    fn used_buffer(&mut self) -> Vec<u8> {
        let (head, written) = self.driver.wait_used(RECEIVE);
        let at = self.buffers.iter().position(|b| b.0 == head).expect("a buffer that was given");
        let (_, address, size) = self.buffers.remove(at);
        assert!(written <= size);
        self.driver.get(address, written as usize)
    }

    /// The next frame with its header, and how many buffers it took.
    fn receive(&mut self) -> (Vec<u8>, Vec<u8>, u16) {
        let mut bytes = self.used_buffer();
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            // Visible together with the first one, without waiting.
            let (head, written) =
                self.driver.poll_used(RECEIVE).expect("all buffers of a frame come at once");
            let at = self.buffers.iter().position(|b| b.0 == head).unwrap();
            let (_, address, _) = self.buffers.remove(at);
            bytes.extend(self.driver.get(address, written as usize));
        }
        let frame = bytes.split_off(HEADER);
        (bytes, frame, count)
    }
}

#[test]
fn a_card_whose_network_has_failed_has_no_link() {
    let net = Net::new("net0", &"user".parse().unwrap()).unwrap();
    let health = net.health().clone();
    let mut driver = Driver::new(Box::new(net));
    driver.start(ALL, 256);
    let status = |driver: &Driver| driver.read(0x2000 + 6, outboard_bus::Width::B2) as u16;
    assert_eq!(status(&driver), LINK_UP);
    health.fail("an assertion of the stack".into());
    driver.reset();
    assert_eq!(status(&driver), LINK_DOWN);
}

fn frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&ROUTER_MAC[..], &GUEST_MAC, &ethertype.to_be_bytes(), payload].concat()
}

/// Who has 10.0.2.2?
fn arp_request() -> Vec<u8> {
    let fixed = [0, 1, 8, 0, 6, 4, 0, 1];
    frame(0x0806, &[&fixed[..], &GUEST_MAC, &[10, 0, 2, 15], &[0; 6], &[10, 0, 2, 2]].concat())
}

fn sum(data: &[u8]) -> u16 {
    let words = data.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b)));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = ((20 + payload.len()) as u16).to_be_bytes();
    let mut header = [0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2];
    let checksum = (!sum(&header)).to_be_bytes();
    header[10..12].copy_from_slice(&checksum);
    frame(0x0800, &[&header[..], payload].concat())
}

/// A datagram from port 9 to `port` of the gateway, with this in its checksum field.
fn udp(port: u16, checksum: u16, data: &[u8]) -> Vec<u8> {
    let mut header = [0, 9, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[4..6].copy_from_slice(&((8 + data.len()) as u16).to_be_bytes());
    header[6..].copy_from_slice(&checksum.to_be_bytes());
    ipv4(17, &[&header[..], data].concat())
}

#[test]
fn configuration_names_address_link_and_mtu() {
    let net = Net::new("net0", &"user,mac=02:00:00:00:00:07".parse().unwrap()).unwrap();
    assert_eq!(net.config(), [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0xf0, 0xff]);
    assert_eq!(net.queue_sizes(), [RECEIVE_SIZE, TRANSMIT_SIZE]);
}

#[test]
fn the_gateway_answers_arp() {
    let mut guest = Guest::new(ALL, 8);
    guest.give_buffers(1, 1526);
    guest.send(0, &arp_request());
    let (header, answer, count) = guest.receive();
    assert_eq!((header[0], count, answer.len()), (0, 1, 42));
    assert_eq!(answer[..14], [&GUEST_MAC[..], &ROUTER_MAC, &[8, 6]].concat());
    assert_eq!(answer[20..32], [0, 2, 0x52, 0x55, 10, 0, 2, 2, 10, 0, 2, 2]);
}

#[test]
fn frames_of_64_kib_take_several_buffers_that_appear_together() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let data: Vec<u8> = (0..60_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
    let mut guest = Guest::new(ALL, 64);
    // The checksum is left to the device.
    guest.send(NEEDS_CSUM, &udp(port, 0x1234, &data));
    let mut buffer = vec![0; 65536];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert!(buffer[..n] == data);

    server.send_to(&data, from).unwrap();
    // Too few at first: the frame waits for the rest.
    guest.give_buffers(10, 4096);
    guest.give_buffers(10, 4096);
    let (header, frame, count) = guest.receive();
    assert_eq!(usize::from(count), (HEADER + frame.len()).div_ceil(4096));
    assert!(frame[42..] == data);
    // The driver finishes the checksum: from byte 34, to byte 6 from there.
    assert_eq!((header[0], &header[6..10]), (NEEDS_CSUM, &[34, 0, 6, 0][..]));
    let pseudo = [&frame[26..34], &[0, 17], &frame[38..40]].concat();
    assert_eq!(u16::from_be_bytes([frame[40], frame[41]]), sum(&pseudo));
    // Buffers that this frame did not need serve the next one.
    guest.send(0, &arp_request());
    assert_eq!(guest.receive().2, 1);
}

#[test]
fn without_merging_a_frame_that_does_not_fit_is_dropped() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = Guest::new(ALL & !feature::MRG_RXBUF & !feature::GUEST_CSUM, 8);
    guest.give_buffers(2, 1526);
    guest.send(0, &udp(port, 0, b"hello"));
    let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
    server.send_to(&[1; 4000], from).unwrap();
    server.send_to(&[2; 1472], from).unwrap();
    let (header, frame, count) = guest.receive();
    assert_eq!((header[0], count, &frame[42..]), (0, 1, &[2; 1472][..]));
}

#[test]
fn a_queue_too_small_for_a_frame_drops_it_and_goes_on() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = Guest::new(ALL, 4);
    guest.give_buffers(4, 256);
    guest.send(0, &udp(port, 0, b"hello"));
    let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
    server.send_to(&[1; 4000], from).unwrap();
    server.send_to(&[2; 300], from).unwrap();
    let (_, frame, count) = guest.receive();
    assert_eq!((count, &frame[42..]), (2, &[2; 300][..]));
}

#[test]
fn senseless_frames_are_taken_and_dropped() {
    let mut guest = Guest::new(ALL, 16);
    guest.give_buffers(4, 1526);
    let big = guest.driver.alloc(200_000);
    let small = guest.driver.put(&[0xff; 64]);
    for chain in [
        &[(small, 0, false)][..],
        &[(small, 5, false)],
        &[(small, HEADER as u32, false)],
        &[(small, 64, false)],
        &[(big, 200_000, false)],
        &[(small, 64, true)],
    ] {
        guest.driver.add(TRANSMIT, chain);
        guest.driver.kick(TRANSMIT);
        assert_eq!(guest.driver.wait_used(TRANSMIT).1, 0, "{chain:?}");
    }
    guest.send(0, &arp_request());
    assert_eq!(guest.receive().1.len(), 42);
}

#[test]
fn a_buffer_outside_ram_breaks_the_device_until_its_reset() {
    let mut guest = Guest::new(ALL, 8);
    guest.driver.add(TRANSMIT, &[(u64::MAX - 4096, u32::MAX, false)]);
    guest.driver.kick(TRANSMIT);
    guest.driver.wait_broken();
    guest.driver.reset();
    guest.buffers.clear();
    guest.driver.start(ALL, 8);
    guest.give_buffers(1, 1526);
    guest.send(0, &arp_request());
    assert_eq!(guest.receive().1.len(), 42);
}

#[test]
fn resets_with_traffic_under_way() {
    let mut guest = Guest::new(ALL, 32);
    for round in 0..20 {
        guest.give_buffers(round % 4, 1526);
        for _ in 0..8 {
            let data = guest.driver.put(&[&[0; HEADER][..], &arp_request()].concat());
            guest.driver.add(TRANSMIT, &[(data, (HEADER + 42) as u32, false)]);
        }
        guest.driver.kick(TRANSMIT);
        guest.driver.reset();
        guest.buffers.clear();
        guest.driver.start(ALL, 32);
    }
    guest.give_buffers(1, 1526);
    guest.send(0, &arp_request());
    assert_eq!(guest.receive().1.len(), 42);
}

#[test]
fn a_port_in_use_fails_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let options = format!("user,forward={port}:22").parse().unwrap();
    assert!(matches!(Net::new("net0", &options), Err(NetError::Listen { .. })));
}
