//! The module under a load that no driver makes, from inside the guest's kernel (`guest/module/tests/stress.c`), at a Mac's limits and at small
//! ones; then its end: leaks, unbinding, unloading, and a disk that works after all that.

use crate::case::{Case, Group, HOST_OF_DMA};
use crate::data::Pattern;
use crate::guest::Guest;
use crate::guest::disk::GuestDisk;
use crate::guest::dma::{DEBUGFS, MODULE, Stats, domains};
use crate::guest::dma_trace::{self, Events, check_windows};
use crate::guest::function::GuestFunction;
use crate::guest::kernel_log;
use crate::host::{Assigned, Dma, Host, Kernel, Port};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(900);
const CPUS: u32 = 4;
const MEMORY_MIB: u64 = 2048;
pub(super) const NVME_CLASS: u32 = 0x01_0802;
pub(super) const STRESS: &str = "outboard_stress";
pub(super) const RUN: &str = "/sys/kernel/debug/outboard_stress/run";
const GRANULE: u64 = 16 << 10;
/// Bus addresses of a Mac (dart-and-dma 3.1).
const WINDOW: std::ops::Range<u64> = 0x8000_0000..0xe000_0000;
/// Codes of `enum odma_failure` for want of room.
const NO_ROOM: [u64; 4] = [2, 3, 4, 6];

/// Steps of each vCPU that give mappings up and ask for others while all of the host's room is in use.
const PRESSES: u32 = 24;
/// What a command's report shows of the module's statistics: by how much it changed.
const COUNTED: [&str; 3] = ["exits", "waits", "host_returning"];

pub(super) fn cases() -> Vec<Case> {
    let case = |name, about| Case {
        name,
        about,
        limit_s: 1800,
        host_kernel: HOST_OF_DMA,
        group: Group::Test,
        host,
        guest,
    };
    vec![
        case("dma-mac-stress", "the module under load from 4 vCPUs in every context, at a Mac's limits"),
        case("dma-tight-stress", "the same at 24 MiB in 666 mappings"),
    ]
}

fn host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let spec = host.guest(Kernel::V6_12).devices(&assigned).cpus(CPUS).memory_mib(MEMORY_MIB);
    let mut vm = host.start(&spec)?;
    loop {
        let (name, text) = match vm.note("stress", STEP)? {
            serde_json::Value::Array(pair) if pair.len() == 2 => (pair[0].clone(), pair[1].clone()),
            _ => break,
        };
        let text = text.as_str().unwrap_or_default().replace('\n', ", ");
        host.log(format!("{}: {}", name.as_str().unwrap_or_default(), text.trim_end_matches(", ")));
    }
    vm.finish(STEP)?;
    // Nothing is pinned any more, and the IOMMU saw no fault.
    assigned.release()?;
    Ok(None)
}

fn guest(guest: &mut Guest) -> Result<()> {
    guest.check_dma_myself();
    guest.need(STRESS)?;
    let function = GuestFunction::the(NVME_CLASS)?;
    bind(&function, STRESS)?;
    if Dma::of(guest.arg("case")?) == Dma::Tight {
        tight(guest, &function)?
    } else {
        full(guest)?
    }
    nothing_is_left(&function)?;
    traced(guest, &function, "clusters 1000")?;
    traced(guest, &function, "mixed 3")?;
    refuses_to_go(guest)?;
    kernel_log::check(Path::new(DEBUGFS))?;
    leaks(guest, &function)?;
    guest.unload(STRESS)?;
    guest.unload(MODULE)?;
    guest.need(MODULE)?;
    works_again(guest, &function)?;
    // A kernel with DMA_API_DEBUG says of the forgotten mappings what our module says.
    let mut faults = kernel_log::faults(Path::new(DEBUGFS))?;
    faults.retain(|fault| !fault.contains("dma_debug_device_change"));
    ensure!(faults.is_empty(), "the kernel found faults: {faults:?}");
    guest.note("stress", "end");
    Ok(())
}

/// At a Mac's limits.
fn full(guest: &Guest) -> Result<()> {
    let clusters = run(guest, "clusters 60000")?;
    ensure!(clusters["live"] == 60_000 && clusters["failed"] == 0, "{clusters:?}");
    let scattered = run(guest, &format!("spread {}", 256 << 10))?;
    ensure!(scattered["failed"] == 0 && scattered["live"] > 7_000, "{scattered:?}");
    let coherent = run(guest, "coherent 300")?;
    ensure!(coherent["failed"] == 0, "{coherent:?}");
    let mixed = run(guest, "mixed 30")?;
    check_mixed(&mixed)?;
    ensure!(mixed["failed"] == 0 && mixed["lists_failed"] == 0, "{mixed:?}");
    // More than the host maps. Most of the limit must be reached: by now the space is in pieces. There, what is given up is not free at once:
    // calls wait for it where they may, and are refused where they may not.
    let (limit, piece) = (1536 << 20, 256 << 10);
    let beyond = run(guest, &format!("press {piece} {PRESSES}"))?;
    let reached = beyond["live"] * piece;
    ensure!(beyond["failed"] > 0 && reached <= limit && reached >= limit / 100 * 90, "{beyond:?}");
    ensure!(beyond["host_returning"] > 0 && beyond["waits"] > 0, "nothing was on its way back: {beyond:?}");
    let after = run(guest, "clusters 20000")?;
    ensure!(after["failed"] == 0, "it does not recover: {after:?}");
    Ok(())
}

/// At 24 MiB in 666 mappings: the entries run out first where pages are scattered, the bytes where they are not.
fn tight(guest: &Guest, function: &GuestFunction) -> Result<()> {
    let scattered = run(guest, &format!("spread {}", 256 << 10))?;
    // A window may hold two of them.
    ensure!(scattered["failed"] > 0 && (600..=800).contains(&scattered["live"]), "{scattered:?}");
    let dense = run(guest, &format!("spread {GRANULE}"))?;
    ensure!(dense["failed"] > 0 && dense["live"] >= 666, "{dense:?}");
    let large = run(guest, &format!("fill {}", 1 << 20))?;
    ensure!(large["failed"] > 0 && (20..=24).contains(&large["live"]), "{large:?}");
    check_mixed(&run(guest, "mixed 30")?)?;
    traced(guest, function, &format!("spread {}", 1 << 20))?;
    let after = run(guest, "clusters 1000")?;
    ensure!(after["failed"] == 0, "it does not recover: {after:?}");
    Ok(())
}

fn check_mixed(report: &BTreeMap<String, u64>) -> Result<()> {
    for place in ["in_process", "irqs_off", "in_softirq", "in_hardirq"] {
        ensure!(report[place] > 0, "no step {place}: {report:?}");
    }
    ensure!(report["lists"] > 0 && report["mapped"] > 0, "{report:?}");
    ensure!(report["segments"] < report["entries"], "no neighbours were merged: {report:?}");
    Ok(())
}

/// Runs a command of the stress module, and looks at what it left.
fn run(guest: &Guest, command: &str) -> Result<BTreeMap<String, u64>> {
    let before = Stats::read(&domains()?[0])?;
    let result = fs::write(RUN, command);
    let text = fs::read_to_string(RUN)?;
    let after = Stats::read(&domains()?[0])?;
    let mut text = text;
    for key in COUNTED {
        text.push_str(&format!("{key} {}\n", after.value(key)? - before.value(key)?));
    }
    guest.note("stress", vec![command.to_owned(), text.clone()]);
    result.with_context(|| format!("'{command}' failed: {text}"))?;
    let numbers = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)));
    let report: BTreeMap<String, u64> = numbers.collect();
    for key in [
        "live",
        "used_windows",
        "used_bytes",
        "slack_bytes",
        "unknown",
        "misused",
        "lost",
        "leaks",
        "host_refused",
    ] {
        ensure!(after.value(key)? == 0, "{key} after '{command}':\n{}", after.text);
    }
    let counted = after.value("failed")? - before.value("failed")?;
    let failed = report["failed"] + report["lists_failed"];
    ensure!(
        counted == i64::try_from(failed)?,
        "{failed} calls failed, {counted} are counted:\n{}",
        after.text
    );
    Ok(report)
}

/// Runs a command with the module's trace events on. They, its statistics and what the driver saw tell the same.
fn traced(guest: &Guest, function: &GuestFunction, command: &str) -> Result<()> {
    let before = Stats::read(&domains()?[0])?;
    dma_trace::start()?;
    let report = run(guest, command);
    let events = dma_trace::stop()?;
    let (report, after) = (report?, Stats::read(&domains()?[0])?);
    let changed =
        |key: &str| Ok::<u64, anyhow::Error>(u64::try_from(after.value(key)? - before.value(key)?)?);
    let Events { maps, unmaps, lists, list_unmaps, failures, rings } = events;
    ensure!(!maps.is_empty() && !rings.is_empty(), "'{command}' left no events");
    let (entries, segments): (Vec<u64>, Vec<u64>) = lists.into_iter().unzip();
    let hits = maps.iter().filter(|map| map.hit).count();
    let get = |key: &str| report.get(key).copied().unwrap_or(0);
    let mut same = vec![
        ("mappings", maps.len() as u64, report["mapped"]),
        ("lists", entries.len() as u64, get("lists")),
        ("entries of lists", entries.iter().sum(), get("entries")),
        ("segments of lists", segments.iter().sum(), get("segments")),
        ("failures", failures.len() as u64, report["failed"] + report["lists_failed"]),
        ("exits", rings.len() as u64, changed("exits")?),
        ("entries sent", rings.iter().sum(), changed("entries_sent")?),
    ];
    if entries.is_empty() && failures.is_empty() {
        same.push(("hits", hits as u64, changed("hits")?));
        same.push(("misses", (maps.len() - hits) as u64, changed("misses")?));
    }
    for (what, traced, counted) in same {
        ensure!(traced == counted, "{what}: {traced} events, {counted} counted, in '{command}'");
    }
    ensure!(failures.iter().all(|code| NO_ROOM.contains(code)), "{failures:?}");
    let sorted = |mut values: Vec<(u64, u64)>| {
        values.sort_unstable();
        values
    };
    for map in &maps {
        let place = WINDOW.contains(&map.bus) && WINDOW.contains(&(map.bus + map.len - 1));
        let same_place = (map.bus ^ map.phys) % GRANULE == 0 && map.len > 0;
        ensure!(map.device == function.address && place && same_place, "{map:x?}");
    }
    let mapped = sorted(maps.iter().map(|map| (map.bus, map.len)).collect());
    ensure!(mapped == sorted(unmaps), "what was mapped is not what was unmapped, in '{command}'");
    let [entries, list_unmaps] =
        [entries, list_unmaps].map(|list| sorted(list.into_iter().map(|n| (n, 0)).collect()));
    ensure!(entries == list_unmaps, "lists mapped are not those unmapped, in '{command}'");
    ensure!(check_windows(&domains()?[0])? == (0, 0), "mappings are left in the list of windows");
    Ok(())
}

/// Without a driver there are no windows, and the list of them is empty.
fn nothing_is_left(function: &GuestFunction) -> Result<()> {
    function.unbind()?;
    let folder = &domains()?[0];
    check_windows(folder)?;
    let stats = Stats::read(folder)?;
    ensure!(stats.value("mapped_windows")? == 0, "windows are left:\n{}", stats.text);
    bind(function, STRESS)
}

/// While a driver is bound the module stays.
fn refuses_to_go(guest: &Guest) -> Result<()> {
    match guest.unload(MODULE) {
        Ok(()) => bail!("the module could be unloaded while a driver used it"),
        Err(_) => Ok(()),
    }
}

/// What a driver forgets is counted when it goes, and stays mapped until the module goes.
fn leaks(guest: &Guest, function: &GuestFunction) -> Result<()> {
    const LEAKED: i64 = 100;
    fs::write(RUN, format!("leak {LEAKED}"))?;
    ensure!(
        check_windows(&domains()?[0])? == (LEAKED as u64, 4096 * LEAKED as u64),
        "other mappings than those made"
    );
    function.unbind()?;
    let stats = Stats::read(&domains()?[0])?;
    guest.note("stress", vec!["unbound".to_owned(), stats.text.clone()]);
    ensure!(stats.value("leaks")? == LEAKED, "leaks:\n{}", stats.text);
    let (mapped, used) = (stats.value("mapped_windows")?, stats.value("used_windows")?);
    ensure!(mapped == used && used > 0, "idle windows are left:\n{}", stats.text);
    check_windows(&domains()?[0])?;
    Ok(())
}

fn works_again(guest: &mut Guest, function: &GuestFunction) -> Result<()> {
    fs::write(function.folder().join("driver_override"), "\n")?;
    guest.need("nvme")?;
    fs::write("/sys/bus/pci/drivers_probe", &function.address)?;
    function.wait_driver("nvme")?;
    let disk = GuestDisk::direct("nvme0n1")?;
    disk.write_pattern(Pattern(4711), 0, 512)?;
    disk.flush()?;
    disk.check_pattern(Pattern(4711), 0, 512)?;
    let stats = Stats::read(&domains()?[0])?;
    ensure!(stats.value("maps")? > 0 && stats.value("failures")? == 0, "{}", stats.text);
    Ok(())
}

pub(super) fn bind(function: &GuestFunction, driver: &str) -> Result<()> {
    fs::write(function.folder().join("driver_override"), driver)?;
    let place = Path::new("/sys/bus/pci/drivers").join(driver).join("bind");
    if !function.folder().join("driver").exists() {
        fs::write(place, &function.address).with_context(|| format!("cannot bind {driver}"))?;
    }
    function.wait_driver(driver)
}
