//! Disks: NVMe with several queues, SATA, a USB stick.

use super::{STEP, case, class, guest_with, load, one_guest, positive, pressed};
use crate::case::Case;
use crate::data::{BLOCK, Pattern};
use crate::guest::Guest;
use crate::guest::disk::{GuestDisk, drop_caches};
use crate::guest::function::GuestFunction;
use crate::guest::pressure;
use crate::host::{Assigned, Host, Port, RunningVm};
use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::json;
use std::thread;

const CPUS: u32 = 2;
/// Blocks that each vCPU writes past the page cache: 8 MiB.
const EACH: u64 = (8 << 20) / BLOCK as u64;
/// Blocks that are written and read through the page cache: 8 MiB, from this one on.
const CACHED_FROM: u64 = 4 * EACH;
const CACHED: u64 = EACH;
const PATTERN: Pattern = Pattern(77);
const CACHED_PATTERN: Pattern = Pattern(78);

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            "passthrough-nvme",
            "nvme on the host's NVMe disk: data, a queue with MSI-X for each vCPU, two processes",
            nvme_host,
            nvme_guest,
        ),
        case(
            "passthrough-ahci",
            "ahci on the host's SATA controller: data through a disk",
            |host| disk_host(host, Port::Sata),
            |guest| disk_guest(guest, "ahci", class::AHCI, &["ahci", "sd_mod"]),
        ),
        case(
            "passthrough-xhci",
            "xhci_hcd on the host's USB controller: data through a stick",
            |host| disk_host(host, Port::Usb),
            |guest| disk_guest(guest, "xhci_hcd", class::XHCI, &["xhci_pci", "usb_storage", "sd_mod"]),
        ),
    ]
}

fn nvme_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let slot = assigned.slots()[0].slot.clone();
    // The second process finds what the first one's guest wrote: the device came back whole.
    for stage in ["write", "check"] {
        let spec = guest_with(host, &assigned).cpus(CPUS).arg("stage", stage);
        let mut vm = host.start(&spec)?;
        check_sum(&mut vm)?;
        let interrupts = positive(&mut vm, "interrupts")?;
        vm.finish(STEP)?;
        host.fact("device", json!({ "address": slot, "driver": "nvme", "interrupts": interrupts }));
    }
    assigned.release()?;
    Ok(None)
}

/// The guest's checksum is that of what it should have written.
fn check_sum(vm: &mut RunningVm) -> Result<()> {
    let wanted = CACHED_PATTERN.sha256_from(CACHED_FROM, CACHED);
    let seen = vm.note("sha256", STEP)?;
    ensure!(seen == wanted.as_str(), "the guest read data with checksum {seen}");
    Ok(())
}

fn nvme_guest(guest: &mut Guest) -> Result<()> {
    guest.need("nvme")?;
    let function = GuestFunction::the(class::NVME)?;
    function.wait_driver("nvme")?;
    let disk = GuestDisk::direct("nvme0n1")?;
    let write = guest.arg("stage")? == "write";
    on_each_cpu(CPUS, |cpu| {
        let first = u64::from(cpu) * EACH;
        if write {
            disk.write_pattern(PATTERN, first, EACH)?;
        }
        disk.check_pattern(PATTERN, first, EACH)
    })?;
    disk.flush()?;
    guest.note("sha256", through_cache("nvme0n1", write)?);
    let interrupts = function.interrupts()?;
    // The admin queue, and one for each vCPU.
    for queue in (0..=CPUS).map(|queue| format!("nvme0q{queue}")) {
        let found = interrupts.iter().find(|(name, _)| *name == queue);
        let (_, count) = found.with_context(|| format!("no interrupt {queue} among {interrupts:?}"))?;
        ensure!(*count > 0, "no interrupt of queue {queue} arrived: {interrupts:?}");
    }
    guest.note("interrupts", function.interrupt_count()?);
    Ok(())
}

/// Runs `work` on each vCPU at the same time.
fn on_each_cpu(cpus: u32, work: impl Fn(u32) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let work = &work;
        let one = |cpu: u32| {
            scope.spawn(move || -> Result<()> {
                let mut set = CpuSet::new();
                set.set(cpu as usize)?;
                sched_setaffinity(Pid::from_raw(0), &set)?;
                work(cpu).with_context(|| format!("on vCPU {cpu}"))
            })
        };
        let threads: Vec<_> = (0..cpus).map(one).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no thread panics"))
    })
}

/// Writes through the page cache if `write`, makes the guest forget, reads back; the checksum of what came.
pub(super) fn through_cache(name: &str, write: bool) -> Result<String> {
    let disk = GuestDisk::cached(name)?;
    if write {
        disk.write_pattern(CACHED_PATTERN, CACHED_FROM, CACHED)?;
        disk.flush()?;
    }
    drop_caches()?;
    disk.sha256(CACHED_FROM, CACHED)
}

fn disk_host(host: &Host, port: Port) -> Result<Option<String>> {
    one_guest(
        host,
        &[port],
        |spec| spec,
        |vm| {
            pressed(host, vm)?;
            check_sum(vm)?;
            positive(vm, "interrupts").map(drop)
        },
    )
}

fn disk_guest(guest: &mut Guest, driver: &str, class: u32, modules: &[&str]) -> Result<()> {
    load(guest, modules)?;
    let function = GuestFunction::the(class)?;
    function.wait_driver(driver)?;
    pressure::on_disk(guest, &function, driver)?;
    guest.note("sha256", exercise_disk(&function)?);
    guest.note("interrupts", function.interrupt_count()?);
    Ok(())
}

/// Data past and through the page cache, there and back; the checksum of the latter.
pub(super) fn exercise_disk(function: &GuestFunction) -> Result<String> {
    let name = function.disk()?;
    let disk = GuestDisk::direct(&name)?;
    disk.write_pattern(PATTERN, 0, EACH)?;
    disk.flush()?;
    disk.check_pattern(PATTERN, 0, EACH)?;
    let sum = through_cache(&name, true)?;
    if disk.len()? < (CACHED_FROM + CACHED) * BLOCK as u64 {
        bail!("{name} is smaller than what was written to it");
    }
    Ok(sum)
}

/// The checksum that [`exercise_disk`] gives.
pub(super) fn wanted_sum() -> String {
    CACHED_PATTERN.sha256_from(CACHED_FROM, CACHED)
}
