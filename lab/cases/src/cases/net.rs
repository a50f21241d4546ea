//! The user-mode network.

use crate::case::{Case, Group, GuestHalf, HOST, HostHalf};
use crate::data::Pattern;
use crate::guest::{Guest, busybox, net};
use crate::host::{DNS_ANSWER, DNS_NAME, Host, Kernel, dns_server, web_server};
use anyhow::{Context, Result, bail, ensure};
use std::net::Ipv4Addr;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_secs(300);
/// Bytes of the large transfers.
const LARGE: u64 = 64 << 20;
/// Parallel connections, and bytes over each.
const MANY: u64 = 200;
const EACH: u64 = 256 << 10;
/// Where the guest serves, and the emulated host's port that leads there.
const GUEST_PORT: u16 = 8080;
const HOST_PORT: u16 = 18080;

pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, host: HostHalf, guest: GuestHalf| Case {
        name,
        about,
        limit_s: 900,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest,
    };
    vec![
        case(
            "net-download",
            "64 MiB from a web server on the emulated host, checksums equal",
            download_host,
            download_guest,
        ),
        case(
            "net-forward",
            "64 MiB from the guest through a forwarded port, checksums equal",
            forward_host,
            forward_guest,
        ),
        case("net-dns", "names through the relay, and the gateway answers a ping", dns_host, dns_guest),
        case("net-200", "200 connections at the same time", many_host, many_guest),
    ]
}

fn download_host(host: &Host) -> Result<Option<String>> {
    let port = web_server(Ipv4Addr::LOCALHOST, 0)?.port();
    let mut vm = host.start(&host.guest(Kernel::V6_12).cpus(2).net().arg("port", port))?;
    let took = vm.note("sha256", STEP)?;
    ensure!(took == Pattern(21).sha256(LARGE).as_str(), "the guest's checksum of 64 MiB is {took}");
    vm.finish(STEP)?;
    Ok(None)
}

fn download_guest(guest: &mut Guest) -> Result<()> {
    let lease = net::up(guest)?;
    let port = u16::try_from(guest.number("port")?)?;
    guest.note("sha256", net::download(&lease.router, port, 21, LARGE)?);
    Ok(())
}

fn forward_host(host: &Host) -> Result<Option<String>> {
    let mut vm =
        host.start(&host.guest(Kernel::V6_12).cpus(2).forward(HOST_PORT, GUEST_PORT).arg("stop", "input"))?;
    vm.note("serving", STEP)?;
    let start = Instant::now();
    let sum = net::download("127.0.0.1", HOST_PORT, 22, LARGE)?;
    host.log(format!("64 MiB in {:.1} s", start.elapsed().as_secs_f64()));
    ensure!(sum == Pattern(22).sha256(LARGE), "the checksum of what the guest sent is {sum}");
    vm.type_text("stop\n")?;
    vm.finish(STEP)?;
    Ok(None)
}

fn forward_guest(guest: &mut Guest) -> Result<()> {
    net::up(guest)?;
    web_server(Ipv4Addr::UNSPECIFIED, GUEST_PORT)?;
    guest.note("serving", true);
    guest.read_line()?;
    Ok(())
}

fn dns_host(host: &Host) -> Result<Option<String>> {
    dns_server()?;
    let mut vm = host.start(&host.guest(Kernel::V6_12).net())?;
    vm.finish(STEP)?;
    Ok(None)
}

fn dns_guest(guest: &mut Guest) -> Result<()> {
    let lease = net::up(guest)?;
    let answer = busybox(&["nslookup", "-type=a", DNS_NAME, &lease.dns])?;
    ensure!(answer.contains(&DNS_ANSWER.to_string()), "nslookup of {DNS_NAME} says: {answer}");
    if let Ok(answer) = busybox(&["nslookup", "-type=a", "unknown.lab.test", &lease.dns]) {
        bail!("nslookup of an unknown name succeeded: {answer}");
    }
    busybox(&["ping", "-c", "3", "-W", "5", &lease.router]).context("the gateway does not answer")?;
    Ok(())
}

fn many_host(host: &Host) -> Result<Option<String>> {
    let port = web_server(Ipv4Addr::LOCALHOST, 0)?.port();
    let mut vm = host.start(&host.guest(Kernel::V6_12).cpus(2).net().arg("port", port))?;
    vm.finish(STEP)?;
    Ok(None)
}

fn many_guest(guest: &mut Guest) -> Result<()> {
    let lease = net::up(guest)?;
    let port = u16::try_from(guest.number("port")?)?;
    // Nobody asks for anything before all 200 are connected.
    let connected = Barrier::new(usize::try_from(MANY)?);
    thread::scope(|scope| {
        let one = |seed| {
            let (connected, router) = (&connected, lease.router.as_str());
            thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, move || -> Result<()> {
                let stream = net::connect(router, port);
                connected.wait();
                net::request_checked(&mut stream?, seed, EACH).with_context(|| format!("connection {seed}"))
            })
        };
        let threads: Vec<_> = (0..MANY).map(one).collect::<std::io::Result<_>>()?;
        threads.into_iter().try_for_each(|thread| thread.join().expect("no connection panics"))
    })
}
