//! Disks: formats, flushes, read-only, discard, and what is left after a crash.

use crate::case::{Case, Group, GuestHalf, HOST, HostHalf};
use crate::data::{Aligned, BLOCK, Pattern};
use crate::guest::Guest;
use crate::guest::disk::GuestDisk;
use crate::host::{Disk, Host, Kernel};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_secs(300);
/// Blocks of 256 MiB: what the guest writes with checksums.
const BIG: u64 = (256 << 20) / BLOCK as u64;
/// Size of the disks for that.
const BIG_MIB: u64 = 320;

pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, host: HostHalf, guest: GuestHalf| Case {
        name,
        about,
        limit_s: 1200,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest,
    };
    vec![
        case("disk-raw", "256 MiB written to a raw disk, verified after a reboot", raw_host, big_guest),
        case("disk-qcow2", "the same on qcow2; qemu-img finds no fault", qcow2_host, big_guest),
        case(
            "disk-backing",
            "qcow2 over a qcow2 base: reads through, writes only on top",
            backing_host,
            backing_guest,
        ),
        case("disk-readonly", "a read-only disk says so, and stays as it is", readonly_host, readonly_guest),
        case(
            "disk-discard",
            "discarded blocks read as zeros and give their space back",
            discard_host,
            discard_guest,
        ),
        case(
            "disk-several",
            "three disks in their order, each with its own size and content",
            several_host,
            several_guest,
        ),
        case(
            "disk-kill",
            "the process killed 20 times in the middle of writes: nothing flushed is lost",
            kill_host,
            kill_guest,
        ),
    ]
}

fn raw_host(host: &Host) -> Result<Option<String>> {
    let image = host.raw_image("big.raw", BIG_MIB)?;
    run_big(host, Disk::raw(&image))?;
    check_file(&image, Pattern(1), BIG)?;
    Ok(None)
}

fn qcow2_host(host: &Host) -> Result<Option<String>> {
    let image = create_qcow2(host, "big.qcow2", BIG_MIB)?;
    run_big(host, Disk::qcow2(&image))?;
    host.qemu_img(&["check", path(&image)?]).context("after a clean power-off")?;
    Ok(None)
}

/// Two boots of one process: the first writes and reboots, the second verifies.
fn run_big(host: &Host, disk: Disk) -> Result<()> {
    let mut vm = host.start(&host.guest(Kernel::V6_12).cpus(2).disk(disk))?;
    vm.init()?;
    vm.note("written", STEP)?;
    vm.init().context("after the guest's reboot")?;
    vm.note("verified", STEP)?;
    vm.finish(STEP)
}

fn big_guest(guest: &mut Guest) -> Result<()> {
    let disk = GuestDisk::open(guest, "vda", true)?;
    // Behind the data: whether it has been written.
    let marker = BIG + 1;
    if Pattern(99).first_difference(marker, disk.read_block(marker)?.get()).is_some() {
        disk.write_pattern(Pattern(1), 0, BIG)?;
        disk.write_pattern(Pattern(99), marker, 1)?;
        disk.flush()?;
        guest.note("written", true);
        return guest.reboot();
    }
    disk.check_pattern(Pattern(1), 0, BIG)?;
    guest.note("verified", true);
    Ok(())
}

const BACKED: u64 = (64 << 20) / BLOCK as u64;

fn backing_host(host: &Host) -> Result<Option<String>> {
    let raw = host.raw_image("base.raw", 64)?;
    fill_file(&raw, Pattern(5), BACKED)?;
    let base = host.scratch("base.qcow2");
    host.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", path(&raw)?, path(&base)?])?;
    let before = fs::read(&base)?;
    let top = host.scratch("top.qcow2");
    host.qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", path(&base)?, path(&top)?])?;
    let mut vm = host.start(&host.guest(Kernel::V6_12).disk(Disk::qcow2(&top).over(&base)))?;
    vm.finish(STEP)?;
    drop(vm);
    ensure!(fs::read(&base)? == before, "the base image has changed");
    host.qemu_img(&["check", path(&top)?])?;
    let flat = host.scratch("flat.raw");
    host.qemu_img(&["convert", "-O", "raw", path(&top)?, path(&flat)?])?;
    let flat = File::open(&flat)?;
    for start in (0..BACKED).step_by(64) {
        for (pattern, first, count) in MIXED {
            (first..first + count).try_for_each(|index| check_file_at(&flat, pattern, start + index))?;
        }
    }
    Ok(None)
}

/// Of each 64 blocks: pattern, first, count. The guest writes a whole cluster of 64 KiB, and a part of one.
const MIXED: [(Pattern, u64, u64); 4] =
    [(Pattern(6), 0, 16), (Pattern(5), 16, 24), (Pattern(6), 40, 1), (Pattern(5), 41, 23)];

fn backing_guest(guest: &mut Guest) -> Result<()> {
    let disk = GuestDisk::open(guest, "vda", true)?;
    disk.check_pattern(Pattern(5), 0, BACKED).context("through to the base")?;
    let starts =
        || (0..BACKED).step_by(64).flat_map(|start| MIXED.map(|(p, first, count)| (p, start + first, count)));
    for (pattern, first, count) in starts().filter(|(pattern, ..)| pattern.0 == 6) {
        disk.write_pattern(pattern, first, count)?;
    }
    disk.flush()?;
    starts().try_for_each(|(pattern, first, count)| disk.check_pattern(pattern, first, count))
}

fn readonly_host(host: &Host) -> Result<Option<String>> {
    let image = host.raw_image("ro.raw", 16)?;
    fill_file(&image, Pattern(3), 4096)?;
    // Outboard must not need to write to it either.
    let mut permissions = fs::metadata(&image)?.permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&image, permissions)?;
    let mut vm = host.start(&host.guest(Kernel::V6_12).disk(Disk::raw(&image).read_only()))?;
    vm.finish(STEP)?;
    check_file(&image, Pattern(3), 4096)?;
    Ok(None)
}

fn readonly_guest(guest: &mut Guest) -> Result<()> {
    let disk = GuestDisk::open(guest, "vda", false)?;
    ensure!(disk.attribute("ro")? == "1", "the kernel takes the disk for writable");
    disk.check_pattern(Pattern(3), 0, 4096)?;
    if let Ok(writable) = GuestDisk::open(guest, "vda", true)
        && writable.write_pattern(Pattern(4), 0, 1).is_ok()
    {
        bail!("a write to a read-only disk succeeded");
    }
    disk.check_pattern(Pattern(3), 0, 1)
}

const DISCARD: u64 = (64 << 20) / BLOCK as u64;

fn discard_host(host: &Host) -> Result<Option<String>> {
    let image = host.raw_image("discard.raw", 64)?;
    let mut vm = host.start(&host.guest(Kernel::V6_12).disk(Disk::raw(&image)))?;
    vm.note("written", STEP)?;
    let full = fs::metadata(&image)?.blocks() * 512;
    vm.type_text("discard\n")?;
    vm.note("discarded", STEP)?;
    let rest = fs::metadata(&image)?.blocks() * 512;
    vm.finish(STEP)?;
    ensure!(full >= 64 << 20, "64 MiB written, but the image occupies {full} bytes");
    ensure!(rest <= 34 << 20, "half was discarded, but the image still occupies {rest} of {full} bytes");
    Ok(None)
}

fn discard_guest(guest: &mut Guest) -> Result<()> {
    let disk = GuestDisk::open(guest, "vda", true)?;
    disk.write_pattern(Pattern(8), 0, DISCARD)?;
    disk.flush()?;
    guest.note("written", true);
    guest.read_line()?;
    disk.discard(0, DISCARD / 2)?;
    disk.flush()?;
    guest.note("discarded", true);
    for index in (0..DISCARD / 2).step_by(97) {
        ensure!(disk.read_block(index)?.get().iter().all(|byte| *byte == 0), "block {index} is not zero");
    }
    disk.check_pattern(Pattern(8), DISCARD / 2, DISCARD / 2)?;
    disk.write_zeroes(DISCARD / 2, 256)?;
    for index in DISCARD / 2..DISCARD / 2 + 256 {
        ensure!(disk.read_block(index)?.get().iter().all(|byte| *byte == 0), "block {index} is not zeroed");
    }
    disk.check_pattern(Pattern(8), DISCARD / 2 + 256, 256)
}

/// Disk, MiB, seed.
const SEVERAL: [(&str, u64, u64); 3] = [("vda", 16, 11), ("vdb", 24, 12), ("vdc", 32, 13)];

fn several_host(host: &Host) -> Result<Option<String>> {
    let mut spec = host.guest(Kernel::V6_12);
    for (name, mib, seed) in SEVERAL {
        let image = host.raw_image(name, mib)?;
        fill_file(&image, Pattern(seed), 256)?;
        spec = spec.disk(Disk::raw(image));
    }
    host.start(&spec)?.finish(STEP)?;
    Ok(None)
}

fn several_guest(guest: &mut Guest) -> Result<()> {
    for (name, mib, seed) in SEVERAL {
        let disk = GuestDisk::open(guest, name, true)?;
        ensure!(disk.len()? == mib << 20, "{name} has {} bytes, not {mib} MiB", disk.len()?);
        disk.check_pattern(Pattern(seed), 0, 256)?;
    }
    Ok(())
}

/// Times the process is killed (must-show 3 of the first milestone).
const KILLS: u64 = 20;
/// Blocks between two flushes.
const BATCH: u64 = 16;
/// Most batches of one boot: what must fit on the disk.
const BATCHES: u64 = 256;

fn kill_host(host: &Host) -> Result<Option<String>> {
    let image = create_qcow2(host, "kill.qcow2", 512)?;
    let mut flushed = 0;
    // A different moment each time, from the first flush on; no clock in it, so that a failure can be repeated.
    let mut moment = Aligned::new(BLOCK);
    Pattern(2026).block(0, moment.get_mut());
    for kill in 0..KILLS {
        let spec =
            host.guest(Kernel::V6_12Cloud).memory_mib(256).disk(Disk::qcow2(&image)).arg("flushed", flushed);
        let mut vm = host.start(&spec)?;
        let before = Instant::now();
        flushed = number(&vm.note("flushed", STEP).with_context(|| format!("boot {kill}"))?)?;
        let pause = u64::from(moment.get()[usize::try_from(kill)?]);
        std::thread::sleep(Duration::from_millis(pause));
        vm.kill()?;
        vm.drain();
        for note in vm.notes_so_far("flushed") {
            flushed = flushed.max(number(&note)?);
        }
        let leaks = host.check_qcow2(&image).with_context(|| format!("after kill {kill}"))?;
        let leaks = if leaks { ", some clusters leaked" } else { "" };
        let took = before.elapsed().as_secs_f64();
        host.log(format!("kill {kill}: batch {flushed} was flushed, {took:.1} s{leaks}"));
    }
    let spec =
        host.guest(Kernel::V6_12Cloud).memory_mib(256).disk(Disk::qcow2(&image)).arg("flushed", flushed);
    let mut vm = host.start(&spec.arg("last", 1))?;
    vm.finish(STEP)?;
    host.check_qcow2(&image)?;
    Ok(None)
}

fn kill_guest(guest: &mut Guest) -> Result<()> {
    let flushed = guest.number("flushed")?;
    let disk = GuestDisk::open(guest, "vda", true)?;
    for batch in 1..=flushed {
        let first = place(batch);
        disk.check_pattern(Pattern(batch), first, BATCH)
            .with_context(|| format!("batch {batch} was flushed"))?;
    }
    if guest.arg("last").is_ok() {
        return Ok(());
    }
    for batch in flushed + 1..flushed + BATCHES {
        disk.write_pattern(Pattern(batch), place(batch), BATCH)?;
        disk.flush()?;
        guest.note("flushed", batch);
    }
    bail!("the process was not killed while the guest wrote {BATCHES} batches")
}

/// First block of a batch: far apart and out of order, so that new clusters and tables are allocated all the time.
fn place(batch: u64) -> u64 {
    let slots = (512 << 20) / BLOCK as u64 / BATCH;
    // An odd factor: every slot once before any comes again.
    (batch * 2_049 % slots) * BATCH
}

fn number(value: &serde_json::Value) -> Result<u64> {
    value.as_u64().with_context(|| format!("{value} is no number"))
}

fn create_qcow2(host: &Host, name: &str, mib: u64) -> Result<std::path::PathBuf> {
    let image = host.scratch(name);
    host.qemu_img(&["create", "-q", "-f", "qcow2", path(&image)?, &format!("{mib}M")])?;
    Ok(image)
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("scratch paths are text")
}

fn fill_file(path: &Path, pattern: Pattern, blocks: u64) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    let mut block = [0; BLOCK];
    for index in 0..blocks {
        pattern.block(index, &mut block);
        file.write_all_at(&block, index * BLOCK as u64)?;
    }
    Ok(())
}

fn check_file(path: &Path, pattern: Pattern, blocks: u64) -> Result<()> {
    let file = File::open(path)?;
    (0..blocks).try_for_each(|index| check_file_at(&file, pattern, index))
}

fn check_file_at(file: &File, pattern: Pattern, index: u64) -> Result<()> {
    let mut block = [0; BLOCK];
    file.read_exact_at(&mut block, index * BLOCK as u64)?;
    ensure!(
        pattern.first_difference(index, &block).is_none(),
        "block {index} of the image is not what was written"
    );
    Ok(())
}
