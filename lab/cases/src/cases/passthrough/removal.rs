//! A disk that goes while the guest reads from it, and comes back.

use super::{STEP, case, class, guest_with};
use crate::case::Case;
use crate::data::{BLOCK, Pattern};
use crate::guest::disk::GuestDisk;
use crate::guest::function::GuestFunction;
use crate::guest::{Guest, wait_for};
use crate::host::{Assigned, Dma, Host, PLUGGABLE, Port, RunningVm, describe, outboard, outboard_path};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::Seek;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// Name of the virtual machine.
const NAME: &str = "removal";
const PATTERN: Pattern = Pattern(91);
/// Blocks with the pattern: 4 MiB.
const BLOCKS: u64 = (4 << 20) / BLOCK as u64;
/// Most time until a guest's kernel, or the emulated host's, has noticed.
const NOTICE: Duration = Duration::from_secs(90);

pub(super) fn cases() -> Vec<Case> {
    vec![case(
        "passthrough-removal",
        "the disk is asked back while dd reads it; the guest lives on; removed and added in good order, data intact",
        host,
        guest,
    )]
}

fn host(host: &Host) -> Result<Option<String>> {
    host.plug_nvme()?;
    let assigned = Assigned::bind_pluggable(&[Port::Pluggable])?;
    let slot = assigned.slots()[0].slot.clone();
    let mut vm = host.start(&guest_with(host, &assigned).cpus(2).extra(&["--name", NAME]))?;
    vm.note("verified", STEP)?;
    expect(&slot, "on")?;
    // The emulated host's kernel asks for it: the button beside its slot was pressed.
    lose(host, &mut vm, &slot, "asked back", || {
        let said = host.monitor(&format!("device_del {}", PLUGGABLE.1))?;
        ensure!(said.is_empty(), "device_del: {said}");
        Ok(())
    })?;
    give_back(host, &mut vm, &slot)?;
    orderly(host, &mut vm, &slot)?;
    vm.finish(STEP)?;
    assigned.release()?;
    host.unplug_nvme()?;
    Ok(None)
}

/// Takes the disk away while `dd` reads it, and looks at what everybody makes of it.
fn lose(
    host: &Host,
    vm: &mut RunningVm,
    slot: &str,
    how: &str,
    take: impl FnOnce() -> Result<()>,
) -> Result<()> {
    vm.type_text("read\n")?;
    vm.note("reading", STEP)?;
    take()?;
    let said = vm.note("dd", STEP).with_context(|| format!("{how}: dd goes on"))?;
    host.log(format!("{how}: the guest's dd says {said}"));
    ensure!(said.as_str().is_some_and(|said| said.contains("error")), "{how}: dd says {said}");
    vm.note("gone", STEP).with_context(|| format!("{how}: the guest still has it"))?;
    ensure!(vm.try_exit()?.is_none(), "{how}: outboard has ended");
    wait_for("end of the disk on the emulated host", NOTICE, || {
        Port::Pluggable.functions().is_err().then_some(())
    })?;
    let seen = expect(slot, "gone")?;
    ensure!(seen["functions"][0]["lost"].is_string(), "the status does not say why: {seen}");
    let log = vm.stderr();
    ensure!(log.contains(slot), "{how}: the log does not name {slot}: {log}");
    Ok(())
}

/// Plugs the disk in again and adds it to the running guest, which finds its data.
fn give_back(host: &Host, vm: &mut RunningVm, slot: &str) -> Result<()> {
    host.plug_nvme()?;
    ensure!(Port::Pluggable.slot()? == slot, "the disk has another address than before");
    outboard(&["devices", "bind", slot])?;
    add(host, vm, slot)
}

fn add(host: &Host, vm: &mut RunningVm, slot: &str) -> Result<()> {
    vm.type_text("verify\n")?;
    outboard(&["device", "add", NAME, &Dma::of(host.case()).device(slot)])?;
    expect(slot, "on")?;
    vm.note("verified", STEP).context("after it was added")?;
    Ok(())
}

/// Out of the guest and into it again, as a user asks for it; in between it is the emulated host's.
fn orderly(host: &Host, vm: &mut RunningVm, slot: &str) -> Result<()> {
    vm.type_text("wait\n")?;
    outboard(&["device", "remove", NAME, slot])?;
    vm.note("gone", STEP).context("after it was removed")?;
    let slots = status()?["slots"].take();
    ensure!(slots[0]["state"] == "empty", "after it was removed the status is {slots}");
    let again = Command::new(outboard_path()).args(["device", "remove", NAME, slot]).output()?;
    ensure!(!again.status.success(), "what is not there was removed: {}", describe(&again));
    outboard(&["devices", "release", slot])?;
    outboard(&["devices", "bind", slot])?;
    add(host, vm, slot)?;
    vm.type_text("end\n")
}

/// What `outboard status` says of the one slot, which must be in `state` and hold `slot`.
fn expect(slot: &str, state: &str) -> Result<Value> {
    let mut status = status()?;
    ensure!(status["state"] == "running", "the status is {status}");
    let seen = status["slots"][0].take();
    ensure!(
        seen["state"] == state && seen["device"] == slot,
        "the status of {slot} is not '{state}' but {seen}"
    );
    Ok(seen)
}

fn status() -> Result<Value> {
    let output = Command::new(outboard_path()).args(["status", NAME, "--json"]).output()?;
    ensure!(output.status.success(), "outboard status: {}", describe(&output));
    serde_json::from_slice(&output.stdout).context("outboard status --json printed something else")
}

/// Does what the host half types.
fn guest(guest: &mut Guest) -> Result<()> {
    guest.need("nvme")?;
    let name = disk()?;
    GuestDisk::direct(&name)?.write_pattern(PATTERN, 0, BLOCKS)?;
    GuestDisk::direct(&name)?.flush()?;
    verify(guest)?;
    loop {
        match guest.read_line()?.as_str() {
            "read" => read_until_gone(guest)?,
            "wait" => wait_gone(guest)?,
            "verify" => verify(guest)?,
            "end" => return Ok(()),
            // The serial console echoes, and may be empty lines.
            "" => {}
            other => bail!("the host half said '{other}'"),
        }
    }
}

/// The disk's name, once it is there.
fn disk() -> Result<String> {
    let function = wait_for("NVMe disk", NOTICE, || GuestFunction::the(class::NVME).ok())?;
    function.wait_driver("nvme")?;
    function.disk()
}

fn verify(guest: &Guest) -> Result<()> {
    let name = disk()?;
    GuestDisk::direct(&name)?.check_pattern(PATTERN, 0, BLOCKS)?;
    guest.note("verified", name);
    Ok(())
}

fn wait_gone(guest: &Guest) -> Result<()> {
    let none = || GuestFunction::of_class(class::NVME).is_ok_and(|found| found.is_empty()).then_some(());
    wait_for("end of the NVMe disk", NOTICE, none)?;
    guest.note("gone", true);
    Ok(())
}

/// `dd` over the whole disk, again and again, until it fails. Its standard input is the disk, open from before and past the page cache, so that nothing but
/// reading can fail, and some read is nearly always under way.
fn read_until_gone(guest: &Guest) -> Result<()> {
    let name = disk()?;
    let disk = GuestDisk::direct(&name)?;
    let (mut input, len) = (disk.file(), disk.len()?);
    let failed = loop {
        input.rewind()?;
        let mut dd = Command::new("/bin/busybox");
        dd.args(["dd", "of=/dev/null", "bs=4k"]).stdin(input.try_clone()?).stderr(Stdio::piped());
        let dd = dd.spawn().context("cannot start dd")?;
        thread::sleep(Duration::from_millis(300));
        guest.note("reading", true);
        let output = dd.wait_with_output()?;
        if !output.status.success() {
            break describe(&output);
        }
        let end = input.stream_position()?;
        ensure!(end == len, "dd ended without an error after {end} bytes: {}", describe(&output));
    };
    guest.note("dd", failed);
    wait_gone(guest)
}
