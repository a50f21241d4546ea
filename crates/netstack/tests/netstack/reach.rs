//! Where a guest can get to, and what it is told where it cannot.

use crate::frames::*;
use crate::guest::Guest;
use outboard_netstack::address::{GATEWAY, GUEST};
use outboard_netstack::{NetOptions, Stack};
use smoltcp::wire::{IpProtocol, TcpControl};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

/// ICMP codes of "destination unreachable".
const HOST: u8 = 1;
const PORT: u8 = 3;
const PROHIBITED: u8 = 13;

fn user(text: &str) -> Stack {
    Stack::new(&text.parse::<NetOptions>().unwrap()).unwrap()
}

/// The code with which the guest is told that `packet` of protocol `packet[9]` is not delivered. It must quote the packet, by
/// which the guest finds the socket.
fn told(stack: &mut Stack, packet: &[u8]) -> Option<u8> {
    push(stack, packet);
    let answers = drain(stack);
    let error = answers.iter().find(|answer| (answer[9], answer[20]) == (1, 3))?;
    assert_eq!(error[28..56], packet[..28]);
    Some(error[21])
}

/// Whether a connection to `to` is refused at once.
fn is_reset(stack: &mut Stack, to: (Ipv4Addr, u16)) -> bool {
    push(stack, &tcp((GUEST, 9), to, TcpControl::Syn, b""));
    drain(stack).iter().any(|answer| answer[9] == 6 && answer[33] & 4 != 0)
}

/// An address of this host that other machines know it by, if it has one.
fn own_address() -> Option<Ipv4Addr> {
    let probe = UdpSocket::bind("0.0.0.0:0").ok()?;
    probe.connect("192.0.2.1:9").ok()?;
    match probe.local_addr().ok()?.ip() {
        IpAddr::V4(address) if !address.is_loopback() => Some(address),
        _ => None,
    }
}

#[test]
fn the_hosts_loopback_is_closed_unless_it_is_opened() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut closed = user("user");
    assert!(is_reset(&mut closed, (GATEWAY, port)));
    assert_eq!(told(&mut closed, &udp((GUEST, 9), (GATEWAY, port), b"x")), Some(PORT));
    assert!(listener.accept().is_err());
    assert!(!is_reset(&mut user("user,host-loopback=on"), (GATEWAY, port)));
}

#[test]
fn loopback_link_local_and_metadata_addresses_are_refused_with_a_word() {
    let mut stack = user("user,host-loopback=on");
    for address in ["127.0.0.1", "127.1.2.3", "169.254.169.254", "169.254.1.1", "100.100.100.200", "0.0.0.1"]
    {
        let to: Ipv4Addr = address.parse().unwrap();
        assert!(is_reset(&mut stack, (to, 80)), "{address}");
        assert_eq!(told(&mut stack, &udp((GUEST, 9), (to, 80), b"x")), Some(PROHIBITED), "{address}");
        assert_eq!(told(&mut stack, &ping(to)), Some(PROHIBITED), "{address}");
    }
}

#[test]
fn the_hosts_own_addresses_are_refused() {
    let Some(own) = own_address() else { return eprintln!("skipped: this host has no address") };
    let listener = TcpListener::bind((own, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut stack = user("user,host-loopback=on");
    assert!(is_reset(&mut stack, (own, port)));
    assert_eq!(told(&mut stack, &udp((GUEST, 9), (own, port), b"x")), Some(PROHIBITED));
    assert_eq!(told(&mut stack, &ping(own)), Some(PROHIBITED));
    assert!(listener.accept().is_err());
}

#[test]
fn private_networks_can_be_closed_off() {
    let mut stack = user("user,lan=off");
    for address in ["192.168.77.1", "10.0.3.1", "172.20.0.1", "100.64.0.1"] {
        let to: Ipv4Addr = address.parse().unwrap();
        assert!(is_reset(&mut stack, (to, 80)), "{address}");
        assert_eq!(told(&mut stack, &udp((GUEST, 9), (to, 80), b"x")), Some(PROHIBITED), "{address}");
    }
}

#[test]
fn an_address_of_the_virtual_network_that_nobody_has_is_no_host() {
    let mut stack = user("user");
    let nobody = [10, 0, 2, 99].into();
    assert_eq!(told(&mut stack, &udp((GUEST, 9), (nobody, 80), b"x")), Some(HOST));
    assert_eq!(told(&mut stack, &ping(nobody)), Some(HOST));
    // Nothing answers what went to everybody, or an error follows errors.
    push(&mut stack, &ipv4(GUEST, [224, 0, 0, 251].into(), IpProtocol::Icmp, &ping(nobody)[20..]));
    push(&mut stack, &udp((GUEST, 9), (Ipv4Addr::BROADCAST, 9), b"x"));
    assert!(drain(&mut stack).is_empty());
}

/// A ping that the host lets nobody send (Linux: `net.ipv4.ping_group_range`) must not look like one that got lost.
#[test]
fn a_ping_that_the_host_refuses_to_send_is_reported() {
    use socket2::{Domain, Protocol, Socket, Type};
    if Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4)).is_ok() {
        return eprintln!("skipped: this host sends pings");
    }
    assert_eq!(told(&mut user("user"), &ping([192, 0, 2, 1].into())), Some(PROHIBITED));
}

#[test]
fn a_card_on_another_subnet_works_like_the_first() {
    let mut guest = Guest::new("user,subnet=192.168.77.0/24,forward=127.0.0.1:0:80");
    assert_eq!(guest.stack.subnet().gateway(), Ipv4Addr::new(192, 168, 77, 2));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut data = Vec::new();
        stream.read_to_end(&mut data).unwrap();
        stream.write_all(&data).unwrap();
    });
    let handle = guest.connected(port);
    assert_eq!(guest.exchange(handle, b"there and back"), b"there and back");
    server.join().unwrap();

    let (address, served) = (guest.stack.forwards()[0].host, guest.listen(80));
    let client = thread::spawn(move || {
        let mut data = Vec::new();
        TcpStream::connect(address).unwrap().read_to_end(&mut data).unwrap();
        data
    });
    guest.until("connection", |g| g.tcp(served).may_send().then_some(()));
    guest.exchange(served, b"hello");
    guest.run_until_finished("client", &client);
    assert_eq!(client.join().unwrap(), b"hello");
}

/// With the standard MTU on the loopback interface this process runs once more, in a network of its own.
#[cfg(target_os = "linux")]
#[test]
fn a_datagram_too_large_for_the_path_is_reported_with_the_paths_mtu() {
    const INSIDE: &str = "OUTBOARD_TEST_OWN_NETWORK";
    if std::env::var_os(INSIDE).is_none() {
        let program = std::env::current_exe().unwrap();
        let script = "ip link set lo up mtu 1500 && exec \"$0\" --exact --nocapture \
            reach::a_datagram_too_large_for_the_path_is_reported_with_the_paths_mtu";
        let mut command = std::process::Command::new("unshare");
        command.args(["--map-root-user", "--net", "sh", "-c", script]).arg(program).env(INSIDE, "1");
        let output = match command.output() {
            Ok(output) => output,
            Err(error) => return eprintln!("skipped: unshare: {error}"),
        };
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        if !text.contains("running 1 test") {
            return eprintln!("skipped: no network of its own here: {text}");
        }
        assert!(output.status.success(), "{text}");
        return;
    }
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut stack = user("user,host-loopback=on");
    let mut packet = udp((GUEST, 9), (GATEWAY, server.local_addr().unwrap().port()), &[1; 4000]);
    // May not be cut: smoltcp sets the flag.
    assert!(packet[6] & 0x40 != 0);
    push(&mut stack, &packet);
    let answer = drain(&mut stack).remove(0);
    assert_eq!((answer[9], answer[20], answer[21]), (1, 3, 4), "fragmentation needed");
    assert_eq!(u16::from_be_bytes([answer[26], answer[27]]), 1500);
    // May be cut.
    packet[6] = 0;
    smoltcp::wire::Ipv4Packet::new_unchecked(&mut packet[..]).fill_checksum();
    push(&mut stack, &packet);
    assert_eq!(server.recv(&mut [0; 5000]).unwrap(), 4000);
}
