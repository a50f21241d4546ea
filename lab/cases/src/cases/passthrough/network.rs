//! A network between emulated host and guest, over a network card that the guest has.

use super::{STEP, case, class, load, one_guest, positive, pressed};
use crate::case::Case;
use crate::data::Pattern;
use crate::guest::function::GuestFunction;
use crate::guest::pressure::{self, Hog};
use crate::guest::{Guest, busybox, net, wait_for};
use crate::host::{Dma, Host, Port, RunningVm, web_server};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Bytes each way.
const LARGE: u64 = 64 << 20;
const TIGHT: u64 = 8 << 20;
/// The wire has two ends.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const GUEST_PORT: u16 = 8080;
const DOWN: Pattern = Pattern(31);
const UP: Pattern = Pattern(32);

pub(super) fn cases() -> Vec<Case> {
    vec![case(
        "passthrough-e1000e",
        "e1000e on the host's network card: 64 MiB each way between host and guest, checksums equal",
        host,
        guest,
    )]
}

fn host(host: &Host) -> Result<Option<String>> {
    // Without room half of the time it takes long.
    let len = if Dma::of(host.case()) == Dma::Tight { TIGHT } else { LARGE };
    one_guest(
        host,
        &[Port::Network],
        |spec| spec.arg("len", len),
        |vm| {
            both_ways(host, vm, len)?;
            pressed(host, vm)?;
            positive(vm, "interrupts").map(drop)
        },
    )
}

/// The emulated host's end of the wire, with an address. It is up only while the other end is: what is sent to a card that is not set up stays
/// in the wire and blocks the sender.
pub(in crate::cases) struct Wire {
    card: String,
}

impl Wire {
    pub(super) fn up(host: &Host) -> Result<Self> {
        host.need("virtio_net")?;
        let card = wait_for("network card of the emulated host", Duration::from_secs(20), || {
            let cards = fs::read_dir("/sys/class/net").ok()?.flatten();
            cards.filter_map(|entry| entry.file_name().into_string().ok()).find(|name| {
                let driver = fs::read_link(format!("/sys/class/net/{name}/device/driver"));
                driver.is_ok_and(|link| link.ends_with("virtio_net"))
            })
        })?;
        let wire = Self { card };
        busybox(&["ip", "addr", "add", &format!("{HOST}/24"), "dev", &wire.card])?;
        busybox(&["ip", "link", "set", &wire.card, "up"])?;
        Ok(wire)
    }

    /// The PCI function of the card.
    pub(super) fn function(&self) -> Result<String> {
        // The virtio device is below it.
        let device = fs::canonicalize(format!("/sys/class/net/{}/device/..", self.card))?;
        device
            .file_name()
            .and_then(|name| Some(name.to_str()?.to_owned()))
            .context("the card is no PCI function")
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // A failure here shows in the next case that needs the wire.
        let _ = busybox(&["ip", "link", "set", &self.card, "down"]);
        let _ = busybox(&["ip", "addr", "flush", "dev", &self.card]);
    }
}

/// Waits for the guest's checksum of `len` bytes from here, and fetches as many from there.
pub(in crate::cases) fn both_ways(host: &Host, vm: &mut RunningVm, len: u64) -> Result<()> {
    vm.note("card", STEP)?;
    let wire = Wire::up(host)?;
    vm.type_text(&format!("{}\n", web_server(HOST, 0)?.port()))?;
    let seen = vm.note("downloaded", STEP)?;
    ensure!(seen == DOWN.sha256(len).as_str(), "the guest's checksum of what the host sent is {seen}");
    vm.note("serving", STEP)?;
    let start = Instant::now();
    let sum = net::download(&GUEST.to_string(), GUEST_PORT, UP.0, len)?;
    host.log(format!("{} MiB from the guest in {:.1} s", len >> 20, start.elapsed().as_secs_f64()));
    ensure!(sum == UP.sha256(len), "the checksum of what the guest sent is {sum}");
    drop(wire);
    vm.type_text("stop\n")
}

fn guest(guest: &mut Guest) -> Result<()> {
    load(guest, &["e1000e"])?;
    let function = GuestFunction::the(class::ETHERNET)?;
    function.wait_driver("e1000e")?;
    guest_end(guest, &function)?;
    guest.note("interrupts", function.interrupt_count()?);
    Ok(())
}

/// The guest's part of [`both_ways`].
pub(in crate::cases) fn guest_end(guest: &Guest, function: &GuestFunction) -> Result<()> {
    let card = up(function)?;
    // In the tight lane: TCP repeats what the card could not take; all of it arrives, and right.
    let hog = pressure::wanted(guest)?.then(|| Hog::start(function, pressure::ROOM_FOR_TCP)).transpose()?;
    let len = guest.number("len")?;
    guest.note("card", card);
    let port = guest.read_line()?.parse().context("the host half sent no port")?;
    guest.note("downloaded", net::download(&HOST.to_string(), port, DOWN.0, len)?);
    web_server(Ipv4Addr::UNSPECIFIED, GUEST_PORT)?;
    guest.note("serving", true);
    guest.read_line()?;
    hog.map_or(Ok(()), |hog| hog.end(guest, 0))
}

/// Brings the card up; its name.
pub(super) fn up(function: &GuestFunction) -> Result<String> {
    let card = function.interface()?;
    busybox(&["ip", "addr", "add", &format!("{GUEST}/24"), "dev", &card])?;
    busybox(&["ip", "link", "set", &card, "up"])?;
    let carrier = format!("/sys/class/net/{card}/carrier");
    wait_for("link", Duration::from_secs(30), || {
        (fs::read_to_string(&carrier).ok()?.trim() == "1").then_some(())
    })
    .with_context(|| format!("{card} at {}", function.address))?;
    Ok(card)
}
