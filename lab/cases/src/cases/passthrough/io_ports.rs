//! I/O ports: a network card whose driver resets it through them, and a SATA controller that shows its registers there too.

use super::{case, class, load, one_guest, positive};
use crate::case::Case;
use crate::guest::function::GuestFunction;
use crate::guest::pci::{PAGE, Registers};
use crate::guest::{Guest, busybox, wait_for};
use crate::host::{Host, Port};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// The card's I/O BAR (82540EM: an address and a data register).
const CARD_BAR: u32 = 1;
/// The SATA controller's BARs: its index and data registers in I/O space at these offsets (QEMU's ich9-ahci), its registers in memory.
const INDEX_BAR: u32 = 4;
const INDEX: u64 = 0x10;
const DATA: u64 = 0x14;
const MEMORY_BAR: u8 = 5;
/// AHCI's registers of capabilities and of its version (AHCI 1.3.1, 3.1.1 and 3.1.5), which never change.
const FIXED_REGISTERS: [u32; 2] = [0x00, 0x10];
/// The emulator's network for the card: its gateway answers pings.
const GATEWAY: &str = "10.0.2.2";
const GUEST: &str = "10.0.2.15/24";

pub(super) fn cases() -> Vec<Case> {
    vec![case(
        "passthrough-io-ports",
        "e1000 on a card that it resets through I/O ports: link, pings; a SATA controller's index and data registers there, at each width",
        host,
        guest,
    )]
}

fn host(host: &Host) -> Result<Option<String>> {
    one_guest(
        host,
        &[Port::IoPorts, Port::Sata],
        |spec| spec,
        |vm| {
            positive(vm, "interrupts")?;
            positive(vm, "registers").map(drop)
        },
    )
}

fn guest(guest: &mut Guest) -> Result<()> {
    load(guest, &["e1000"])?;
    let card = GuestFunction::the(class::ETHERNET)?;
    card.wait_driver("e1000")?;
    ports(&card, CARD_BAR)?;
    ping(&card)?;
    guest.note("interrupts", card.interrupt_count()?);
    let sata = GuestFunction::the(class::AHCI)?;
    fs::write(sata.folder().join("enable"), "1").context("the SATA controller cannot be enabled")?;
    let ports = ports(&sata, INDEX_BAR)?;
    let memory = Registers::of_bar(&sata.folder(), MEMORY_BAR, PAGE)?;
    for register in FIXED_REGISTERS {
        check_register(&ports, register, memory.read(register as usize))?;
    }
    guest.note("registers", FIXED_REGISTERS.len());
    Ok(())
}

/// The I/O ports of BAR `index`, which sysfs reads and writes at 1, 2 and 4 bytes.
fn ports(function: &GuestFunction, index: u32) -> Result<File> {
    let path = function.folder().join(format!("resource{index}"));
    let ports = OpenOptions::new().read(true).write(true).open(&path);
    ports.with_context(|| format!("no I/O ports at {}", path.display()))
}

/// Brings the card up, and pings through it.
fn ping(card: &GuestFunction) -> Result<()> {
    let name = card.interface()?;
    busybox(&["ip", "addr", "add", GUEST, "dev", &name])?;
    busybox(&["ip", "link", "set", &name, "up"])?;
    let carrier = format!("/sys/class/net/{name}/carrier");
    wait_for("link", Duration::from_secs(30), || {
        (fs::read_to_string(&carrier).ok()?.trim() == "1").then_some(())
    })?;
    busybox(&["ping", "-c", "3", "-W", "10", GATEWAY]).map(drop)
}

/// Reads AHCI's `register` through index and data, at each width: all have to agree with `expected`.
fn check_register(ports: &File, register: u32, expected: u32) -> Result<()> {
    ports.write_all_at(&register.to_le_bytes(), INDEX)?;
    let mut index = [0; 4];
    ports.read_exact_at(&mut index, INDEX)?;
    ensure!(u32::from_le_bytes(index) == register, "the index register reads {index:x?}");
    for width in [4, 2, 1] {
        let mut bytes = [0; 4];
        ports.read_exact_at(&mut bytes[..width], DATA)?;
        ensure!(
            bytes[..width] == expected.to_le_bytes()[..width],
            "register {register:#x}: {expected:#x} in memory, {bytes:x?} by {width} bytes from I/O ports"
        );
    }
    Ok(())
}
