//! A driver that breaks the rules of DMA, one that comes too early, one that cannot be served, and sleep: from inside the guest's kernel
//! (`guest/module/tests/misuse.c`), in a slot of two functions. Each mistake is counted, said once, and takes nothing of anybody else's.

use crate::case::{Case, Group, HOST_OF_DMA};
use crate::cases::passthrough::class;
use crate::guest::dma::{DEBUGFS, LATER, MODULE, Stats, domains};
use crate::guest::function::GuestFunction;
use crate::guest::{Guest, busybox, kernel_log, load_needs_of, wait_for};
use crate::host::{Assigned, Host, Kernel, Port};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::stress::{RUN, STRESS, bind};

const STEP: Duration = Duration::from_secs(300);
const MEMORY_MIB: u64 = 1024;
/// PCI's command register, and the bit that lets a function do DMA.
const COMMAND: usize = 4;
const BUS_MASTER: u8 = 1 << 2;
/// A CPU's timer is never away for more than this part of the time in which it maps a long list. With interrupts off it was for nearly all of it.
const AWAY: u64 = 2;

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "dma-mac-misuse",
        about: "mistaken unmappings, drivers too early or refused, bus master left on, sleep and hibernation",
        limit_s: 600,
        group: Group::Test,
        host_kernel: HOST_OF_DMA,
        host,
        guest,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Several])?;
    let spec = host.guest(Kernel::V6_12).devices(&assigned).cpus(2).memory_mib(MEMORY_MIB).arg(LATER, 1);
    let mut vm = host.start(&spec)?;
    let parts = vm.note("parts", STEP)?.as_u64().context("a number of parts")?;
    for _ in 0..parts {
        let part = vm.note("part", STEP)?;
        let name = part["name"].as_str().unwrap_or("?");
        let result = part["fault"].as_str().map_or(Ok(()), |fault| Err(anyhow::anyhow!("{fault}")));
        host.part(name, result);
    }
    vm.finish(STEP)?;
    // Fails if the IOMMU has seen a fault in all that time.
    assigned.release()?;
    Ok(None)
}

/// The two functions of the slot.
struct Slot {
    first: GuestFunction,
    second: GuestFunction,
}

type Part = fn(&Guest, &Slot) -> Result<()>;

const PARTS: [(&str, Part); 7] = [
    ("picked-up", picked_up),
    ("mistakes", mistakes),
    ("long-list", long_list),
    ("asleep", asleep),
    ("bus-master", bus_master),
    ("hibernation", hibernation),
    ("refused", refused),
];

fn guest(guest: &mut Guest) -> Result<()> {
    guest.check_dma_myself();
    let slot = Slot { first: GuestFunction::the(class::AHCI)?, second: GuestFunction::the(class::HDA)? };
    guest.note("parts", PARTS.len() + 1);
    let tell = |name: &str, result: Result<()>| {
        let fault = result.err().map(|error| format!("{error:#}"));
        guest.note("part", serde_json::json!({ "name": name, "fault": fault }));
    };
    for (name, part) in PARTS {
        tell(name, part(guest, &slot));
    }
    tell("unloaded", end(guest));
    Ok(())
}

/// Loads the stress module; a shy one does nothing about DMA in its probe.
fn stress(shy: bool) -> Result<()> {
    let file = load_needs_of(STRESS)?;
    busybox(&["insmod", &file, if shy { "shy=1" } else { "shy=0" }]).map(drop)
}

fn module() -> Result<()> {
    let file = load_needs_of(MODULE)?;
    busybox(&["insmod", &file]).map(drop)
}

fn unserved() -> Result<String> {
    let path = "/sys/module/outboard_dma/parameters/unserved";
    Ok(fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?.trim().to_owned())
}

fn said(what: &str) -> Result<bool> {
    Ok(busybox(&["dmesg"])?.contains(what))
}

fn stats() -> Result<Stats> {
    Stats::read(&domains()?[0])
}

/// A driver from before the module holds the slot: another function's driver is told at once that there is no DMA, and fails in peace.
fn refused(guest: &Guest, slot: &Slot) -> Result<()> {
    guest.unload(STRESS)?;
    guest.unload(MODULE)?;
    // Or the driver takes it as soon as it is there.
    fs::write(slot.first.folder().join("driver_override"), "none")?;
    stress(false)?;
    bind(&slot.second, STRESS)?;
    module()?;
    ensure!(unserved()? == format!("{} {STRESS}", slot.second.address), "not served: {}", unserved()?);
    fs::write(slot.first.folder().join("driver_override"), STRESS)?;
    let place = Path::new("/sys/bus/pci/drivers").join(STRESS).join("bind");
    ensure!(
        fs::write(&place, &slot.first.address).is_err(),
        "a driver that is not served could begin with DMA"
    );
    ensure!(said("no DMA for its driver, which will fail: another function")?, "nothing is said of it");
    slot.second.unbind()?;
    // Behind the failed probe and the driver from before both work.
    fs::write(&place, &slot.first.address).context("it is not served afterwards")?;
    run("clusters 100")?;
    ensure!(unserved()?.is_empty(), "not served: {}", unserved()?);
    slot.first.unbind()?;
    let left = stats()?;
    for key in ["live", "leaks", "mapped_windows", "used_windows"] {
        ensure!(left.value(key)? == 0, "{key} without a driver:\n{}", left.text);
    }
    guest.unload(MODULE)?;
    guest.unload(STRESS)
}

/// A driver from before that has not begun with DMA is served without more ado.
fn picked_up(_: &Guest, slot: &Slot) -> Result<()> {
    stress(true)?;
    bind(&slot.first, STRESS)?;
    module()?;
    ensure!(
        said("served from now on: its driver outboard_stress has mapped nothing yet")?,
        "it is not picked up"
    );
    ensure!(unserved()?.is_empty(), "not served: {}", unserved()?);
    run("clusters 1000")?;
    Ok(())
}

fn run(command: &str) -> Result<String> {
    let result = fs::write(RUN, command);
    let text = fs::read_to_string(RUN)?;
    result.with_context(|| format!("'{command}' failed: {text}"))?;
    ensure!(text.contains("wrong nothing"), "'{command}': {text}");
    Ok(text)
}

/// Runs a command; by how much these counts have changed.
fn changes<const N: usize>(command: &str, keys: [&str; N]) -> Result<[i64; N]> {
    let before = stats()?;
    run(command)?;
    let after = stats()?;
    let mut changed = [0; N];
    for (change, key) in changed.iter_mut().zip(keys) {
        *change = after.value(key)? - before.value(key)?;
    }
    Ok(changed)
}

fn mistakes(_: &Guest, _: &Slot) -> Result<()> {
    const KEYS: [&str; 4] = ["misused", "unknown", "live", "used_windows"];
    for (command, expected) in [
        ("misuse lists", [4, 0, 0, 0]),
        ("misuse length", [1, 0, 0, 0]),
        // The neighbour is still mapped.
        ("misuse twice", [0, 1, 1, 1]),
        ("misuse end", [0, 0, -1, -1]),
        ("misuse free", [1, 1, 0, 0]),
        // Counted again, and not said again.
        ("misuse lists", [4, 0, 0, 0]),
        ("misuse length", [1, 0, 0, 0]),
    ] {
        let seen = changes(command, KEYS)?;
        ensure!(seen == expected, "'{command}' changed {KEYS:?} by {seen:?}, not {expected:?}");
    }
    let log = busybox(&["dmesg"])?;
    for text in
        ["not mapped; nothing is changed", "another length was mapped", "by its", "is freed that the driver"]
    {
        let lines = log.lines().filter(|line| line.contains(text) && line.contains("outboard_stress"));
        ensure!(lines.count() == 1, "'{text}' is not said once");
    }
    Ok(())
}

fn long_list(_: &Guest, _: &Slot) -> Result<()> {
    let text = run("misuse long")?;
    let number = |key: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
        found.with_context(|| format!("no {key} in {text}"))
    };
    let (whole, longest) = (number("whole_us")?, number("longest_us")?);
    ensure!(longest > 0 && longest * AWAY <= whole, "no interrupt for {longest} of {whole} us");
    Ok(())
}

/// The whole way down and up again under a driver that is served; hibernation is refused.
fn asleep(_: &Guest, slot: &Slot) -> Result<()> {
    let Ok(()) = fs::write("/sys/power/pm_test", "platform") else {
        bail!("this kernel cannot test its sleep")
    };
    let slept = fs::write("/sys/power/state", "freeze");
    fs::write("/sys/power/pm_test", "none")?;
    slept.context("the machine does not sleep")?;
    ensure!(!said("the host was reset in the guest's sleep")?, "the mappings are gone");
    run("clusters 1000")?;
    ensure!(fs::write("/sys/power/state", "disk").is_err(), "it hibernates under a driver's mappings");
    ensure!(
        said("cannot hibernate: what its driver has mapped")?,
        "it is not said why it does not hibernate"
    );
    ensure!(slot.first.folder().join("driver").exists(), "the driver is gone");
    Ok(())
}

/// A driver that leaves bus master on: it is off once the driver has gone, and windows go back after that.
fn bus_master(_: &Guest, slot: &Slot) -> Result<()> {
    let config = slot.first.folder().join("config");
    let master = || Ok::<bool, anyhow::Error>(fs::read(&config)?[COMMAND] & BUS_MASTER != 0);
    run("misuse master")?;
    ensure!(master()?, "the driver did not turn it on");
    run("clusters 1000")?;
    slot.first.unbind()?;
    ensure!(!master()?, "bus master is on without a driver");
    let left = stats()?;
    ensure!(left.value("mapped_windows")? == 0, "windows are left:\n{}", left.text);
    Ok(())
}

/// Without a driver that is served its hooks run, and it works afterwards.
fn hibernation(_: &Guest, slot: &Slot) -> Result<()> {
    fs::write("/sys/power/pm_test", "platform").context("this kernel cannot test its hibernation")?;
    let hibernated = fs::write("/sys/power/state", "disk");
    fs::write("/sys/power/pm_test", "none")?;
    hibernated.context("the hooks of hibernation fail")?;
    wait_for("driver after hibernation", STEP, || bind(&slot.first, STRESS).ok())?;
    run("clusters 1000")?;
    slot.first.unbind()
}

/// The module goes, and comes again.
fn end(guest: &Guest) -> Result<()> {
    module()?;
    guest.unload(MODULE)?;
    // The mistakes were made on purpose, and a kernel with DMA_API_DEBUG says so.
    let mut faults = kernel_log::faults(Path::new(DEBUGFS))?;
    faults.retain(|fault| !fault.contains("kernel/dma/debug.c"));
    ensure!(faults.is_empty(), "the kernel found faults: {faults:?}");
    Ok(())
}
