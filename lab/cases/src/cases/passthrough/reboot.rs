//! A guest that reboots with its devices, and what is left on the emulated host after it.

use super::{STEP, case, class, guest_with, load, positive};
use crate::case::Case;
use crate::data::{Aligned, BLOCK, Pattern};
use crate::guest::Guest;
use crate::guest::disk::GuestDisk;
use crate::guest::function::{GuestFunction, lspci};
use crate::host::{Assigned, Host, Port, driver_of};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::time::{SystemTime, UNIX_EPOCH};

const REBOOTS: u64 = 5;
/// Blocks that each boot writes anew.
const BLOCKS: u64 = 256;
/// Where the data, and the first boot's `lspci`, are; block 0 says how far it has come.
const DATA: u64 = 16;
const DUMP: u64 = 2048;

pub(super) fn cases() -> Vec<Case> {
    vec![case(
        "passthrough-reboot",
        "five reboots in one process: the disk works, lspci shows the same; nothing is left on the host",
        host,
        guest,
    )]
}

fn host(host: &Host) -> Result<Option<String>> {
    // So that the host's own driver takes the disk back at the end.
    host.need("nvme")?;
    let assigned = Assigned::bind(&[Port::Nvme, Port::Several])?;
    let function = assigned.slots()[0].functions[0].clone();
    // Block 0 of the disk has what earlier runs left; this tells them apart.
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    let mut vm = host.start(&guest_with(host, &assigned).arg("run", run))?;
    let pid = vm.pid();
    for boot in 0..=REBOOTS {
        let what = || format!("boot {boot}");
        vm.init().with_context(what)?;
        let seen = vm.note("boot", STEP).with_context(what)?;
        ensure!(seen == boot, "boot {boot} found itself to be number {seen}");
        positive(&mut vm, "interrupts").with_context(what)?;
        vm.note("lspci", STEP).with_context(what)?;
    }
    ensure!(vm.pid() == pid, "the process has changed");
    vm.finish(STEP)?;
    assigned.release()?;
    ensure!(driver_of(&function).as_deref() == Some("nvme"), "the host's driver did not take the disk back");
    GuestDisk::direct("nvme0n1")?
        .check_pattern(Pattern(run ^ REBOOTS), DATA, BLOCKS)
        .context("on the host")?;
    Ok(None)
}

fn guest(guest: &mut Guest) -> Result<()> {
    load(guest, &["nvme"])?;
    let function = GuestFunction::the(class::NVME)?;
    function.wait_driver("nvme")?;
    let disk = GuestDisk::direct("nvme0n1")?;
    let run = guest.number("run")?;
    let head = disk.read_block(0)?;
    let [seen, last, len] =
        [0, 8, 16].map(|at| u64::from_le_bytes(head.get()[at..at + 8].try_into().expect("8 bytes")));
    let boot = if seen == run { last + 1 } else { 0 };
    guest.note("boot", boot);
    if boot > 0 {
        disk.check_pattern(Pattern(run ^ last), DATA, BLOCKS).context("what the boot before wrote")?;
    }
    disk.write_pattern(Pattern(run ^ boot), DATA, BLOCKS)?;
    disk.flush()?;
    disk.check_pattern(Pattern(run ^ boot), DATA, BLOCKS)?;
    guest.note("interrupts", function.interrupt_count()?);
    let shown = lspci(&["-vvvxxxx"])?;
    let len = if boot == 0 { keep(&disk, &shown)? } else { compare(&disk, len, &shown)? };
    guest.note("lspci", json!({ "bytes": len }));
    write_head(&disk, [run, boot, len])?;
    if boot < REBOOTS { guest.reboot() } else { Ok(()) }
}

fn write_head(disk: &GuestDisk, words: [u64; 3]) -> Result<()> {
    let mut head = Aligned::new(BLOCK);
    for (bytes, word) in head.get_mut().chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    disk.write_block(0, &head)?;
    disk.flush()
}

/// Writes `text` to the disk; its length.
fn keep(disk: &GuestDisk, text: &str) -> Result<u64> {
    for (index, bytes) in (DUMP..).zip(text.as_bytes().chunks(BLOCK)) {
        let mut block = Aligned::new(BLOCK);
        block.get_mut()[..bytes.len()].copy_from_slice(bytes);
        disk.write_block(index, &block)?;
    }
    Ok(text.len() as u64)
}

/// Compares `text` with what [`keep`] wrote; its length.
fn compare(disk: &GuestDisk, len: u64, text: &str) -> Result<u64> {
    let mut kept = Vec::new();
    for index in (DUMP..).take(usize::try_from(len.min(1 << 20))?.div_ceil(BLOCK)) {
        kept.extend_from_slice(disk.read_block(index)?.get());
    }
    kept.truncate(usize::try_from(len)?);
    let kept = String::from_utf8(kept).context("the disk does not hold the first boot's lspci")?;
    if kept == text {
        return Ok(len);
    }
    let differs = kept.lines().zip(text.lines()).filter(|(old, new)| old != new).take(8);
    let differs: Vec<_> = differs.map(|(old, new)| format!("'{old}' became '{new}'")).collect();
    bail!("lspci shows something else than at the first boot: {} ({len} bytes)", differs.join("; "))
}
