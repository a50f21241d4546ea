//! Devices that cannot be given to a guest: each refusal says what is wrong and what to do.

use super::case;
use super::network::Wire;
use crate::case::Case;
use crate::cases::bad_input::{CANNOT, Mistake, USAGE, try_it};
use crate::guest::disk::GuestDisk;
use crate::guest::{busybox, wait_for};
use crate::host::{Assigned, ExitKind, Host, Kernel, Port, describe, driver_of, outboard, outboard_path};
use anyhow::{Result, bail, ensure};
use std::fs;
use std::process::Command;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(120);

pub(super) fn cases() -> Vec<Case> {
    vec![case(
        "passthrough-errors",
        "every device that a guest cannot have: message, next step, status, nothing left behind",
        host,
        |guest| {
            guest.note("ready", true);
            guest.read_line().map(drop)
        },
    )]
}

fn host(host: &Host) -> Result<Option<String>> {
    for module in ["nvme", "ahci", "virtio_net"] {
        host.need(module)?;
    }
    let slot = |port: Port| port.slot();
    let nvme = slot(Port::Nvme)?;
    let sound = format!("{}.1", slot(Port::Several)?);
    let bridge = format!("0000:00:{:02x}.0", Port::Nvme.device());
    let unprotected = slot(Port::Unprotected)?;
    wait_driver(&format!("{}.0", slot(Port::Several)?), "ahci")?;
    wait_driver(&format!("{nvme}.0"), "nvme")?;
    refused(host, "unknown", "77:00", CANNOT, &["77:00", "outboard devices"]);
    refused(host, "no-address", "7700", USAGE, &["7700", "BUS:DEVICE.FUNCTION", "--help"]);
    refused(host, "bridge", &bridge, CANNOT, &["bridge", "behind it"]);
    refused(host, "not-bound", &nvme, CANNOT, &["nvme has it", "outboard devices bind"]);
    refused(
        host,
        "large-bar",
        "simulated:large-bar",
        CANNOT,
        &["64-bit PCIe window", "resource2_resize", "fewer devices"],
    );
    refused(host, "no-simulated", "simulated:none", USAGE, &["rtx5090", "--help"]);
    host.part("bind-group-shared", not_bound(&sound, &["shares IOMMU group", "(driver ahci)"]));
    host.part("group-shared", group_shared(&slot(Port::Several)?));
    host.part("bind-unknown", not_bound("77:00", &["77:00", "outboard devices"]));
    host.part("no-iommu", no_iommu(&unprotected));
    host.part("own-disk", own_disk(&nvme));
    host.part("own-network", own_network(host));
    host.part("busy", busy(host));
    Ok(None)
}

fn wait_driver(function: &str, driver: &str) -> Result<()> {
    wait_for(&format!("driver {driver} of the emulated host"), Duration::from_secs(20), || {
        (driver_of(function).as_deref() == Some(driver)).then_some(())
    })
}

fn refused(host: &Host, name: &'static str, device: &str, status: ExitKind, says: &[&'static str]) {
    host.part(name, run_refused(name, device, status, says));
}

fn run_refused(name: &'static str, device: &str, status: ExitKind, says: &[&'static str]) -> Result<()> {
    try_it(&Mistake { name, args: vec!["--device".into(), device.into()], status, says: says.to_vec() })
}

/// `outboard devices bind` refuses, and nothing has another driver afterwards.
fn not_bound(device: &str, says: &[&str]) -> Result<()> {
    let before = drivers()?;
    let output = Command::new(outboard_path()).args(["devices", "bind", device]).output()?;
    ensure!(output.status.code() == Some(1), "{}", describe(&output));
    let said = String::from_utf8_lossy(&output.stderr);
    for wanted in says {
        ensure!(said.contains(wanted), "the message does not have '{wanted}': {said}");
    }
    let after = drivers()?;
    ensure!(before == after, "drivers have changed from {before:?} to {after:?}");
    Ok(())
}

/// Each function of the emulated host with its driver and its override.
fn drivers() -> Result<Vec<(String, Option<String>, String)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/sys/bus/pci/devices")?.flatten() {
        let function = entry.file_name().to_string_lossy().into_owned();
        let chosen = fs::read_to_string(entry.path().join("driver_override"))?;
        all.push((function.clone(), driver_of(&function), chosen));
    }
    all.sort();
    Ok(all)
}

/// A function whose sibling, in the same group, went back to the host's driver.
fn group_shared(slot: &str) -> Result<()> {
    let (disk, sound) = (format!("{slot}.0"), format!("{slot}.1"));
    outboard(&["devices", "bind", slot])?;
    outboard(&["devices", "release", &disk])?;
    let says = ["shares IOMMU group", "(driver ahci)", "bind these too"];
    let result = run_refused("group-shared", &sound, CANNOT, &says);
    outboard(&["devices", "release", &sound])?;
    result
}

/// A device that no IOMMU stands in front of. Where the kernel tells that only to a driver, binding finds it out.
fn no_iommu(slot: &str) -> Result<()> {
    run_refused("no-iommu", slot, CANNOT, &["not bound", "outboard devices bind"])?;
    not_bound(slot, &["no IOMMU", "firmware"])
}

/// A disk that the emulated host uses.
fn own_disk(slot: &str) -> Result<()> {
    let disk = "/dev/nvme0n1";
    busybox(&["mkswap", disk])?;
    busybox(&["swapon", disk])?;
    let result = not_bound(slot, &["disk of this host", "nvme0n1", "swap"])
        .and_then(|()| run_refused("own-disk", slot, CANNOT, &["disk of this host", "nvme0n1"]));
    busybox(&["swapoff", disk])?;
    result
}

/// The network card that the emulated host uses.
fn own_network(host: &Host) -> Result<()> {
    let wire = Wire::up(host)?;
    not_bound(&wire.function()?, &["this host's network", "take the interface down"])
}

/// A device that another guest has.
fn busy(host: &Host) -> Result<()> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let slot = assigned.slots()[0].slot.clone();
    let mut vm = host.start(&host.guest(Kernel::V6_12).memory_mib(256).devices(&assigned))?;
    vm.note("ready", STEP)?;
    let says = ["in use by another process", "stop that virtual machine"];
    run_refused("busy", &slot, CANNOT, &says)?;
    let output = Command::new(outboard_path()).args(["devices", "release", &slot]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && says.iter().all(|text| said.contains(text)),
        "{}",
        describe(&output)
    );
    vm.type_text("go\n")?;
    vm.finish(STEP)?;
    assigned.release()?;
    // It was not disturbed.
    if outboard(&["devices", "release", &slot]).is_ok() {
        bail!("a device that was given back could be given back again");
    }
    wait_driver(&format!("{slot}.0"), "nvme")?;
    GuestDisk::direct("nvme0n1")?.read_block(0).map(drop)
}
