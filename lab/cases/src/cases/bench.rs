//! Outboard beside the distribution's QEMU: the same kernel, initrd, command line and devices, alternating.

use crate::case::{Case, Group, HOST};
use crate::data::{Aligned, BLOCK, Pattern};
use crate::guest::disk::GuestDisk;
use crate::guest::pci::VirtioPci;
use crate::guest::{Guest, net};
use crate::host::{Disk, Host, Kernel, RunningVm, web_server};
use crate::protocol::{Event, Vmm};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_secs(180);
/// Runs on each monitor (the first of both is not counted: it fills the page cache).
const RUNS: u32 = 5;
/// The same, each with and without the jail.
const JAIL_RUNS: u32 = 7;
const MEMORY_MIB: u64 = 512;
const DISK_MIB: u64 = 128;
/// Reads of the trapped register.
const MMIO_READS: u32 = 10_000;
/// Reads of 4 KiB, and of 128 KiB.
const RANDOM_READS: u32 = 3_000;
const SEQUENTIAL: usize = 128 << 10;
/// Bytes of the download.
const DOWNLOAD: u64 = 64 << 20;
/// virtio-rng: both monitors have it, and no driver needs it here.
const ENTROPY: u16 = 4;

/// Metrics that the guest measures, in the order in which it does.
const IN_GUEST: [&str; 4] = ["mmio_round_trip", "blk_rand_read_4k", "blk_seq_read_128k", "net_throughput"];

pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, host| Case {
        name,
        about,
        limit_s: 3600,
        host_kernel: HOST,
        group: Group::Tool,
        host,
        guest,
    };
    vec![
        case("bench-boot", "what `cargo xtask bench boot` runs", against_peer),
        case("bench-jail", "the same work with and without `--jail off`, alternating", against_itself),
    ]
}

/// What the guests need of the host: a disk full of a pattern, and a port to download from.
fn prepare(host: &Host) -> Result<(PathBuf, u16)> {
    let disk = host.scratch("bench.raw");
    let mut bytes = vec![0; (DISK_MIB as usize) << 20];
    Pattern(1).blocks(0, &mut bytes);
    fs::write(&disk, &bytes)?;
    drop(bytes);
    Ok((disk, web_server(Ipv4Addr::LOCALHOST, 0)?.port()))
}

fn against_peer(host: &Host) -> Result<Option<String>> {
    let (disk, port) = prepare(host)?;
    for run in 0..=RUNS {
        for vmm in [Vmm::Qemu, Vmm::Outboard] {
            let samples =
                one_run(host, vmm, &disk, port, &[]).with_context(|| format!("run {run} on {vmm:?}"))?;
            for (metric, value) in samples {
                if run > 0 {
                    host.send(&Event::Sample { metric, vmm, value });
                }
            }
        }
        host.log(format!("round {run} of {RUNS}{}", if run == 0 { " (not counted)" } else { "" }));
    }
    Ok(None)
}

/// Medians of runs in a jail over those of runs without, each metric by itself. Which of both is first changes from round to round.
fn against_itself(host: &Host) -> Result<Option<String>> {
    let (disk, port) = prepare(host)?;
    let mut samples: BTreeMap<String, [Vec<f64>; 2]> = BTreeMap::new();
    for run in 0..=JAIL_RUNS {
        let order = if run % 2 == 0 { ["on", "off"] } else { ["off", "on"] };
        for jail in order {
            let measured = one_run(host, Vmm::Outboard, &disk, port, &["--jail", jail]);
            for (metric, value) in measured.with_context(|| format!("run {run} with --jail {jail}"))? {
                let [on, off] = samples.entry(metric).or_default();
                let of = if jail == "on" { on } else { off };
                of.extend((run > 0).then_some(value));
            }
        }
    }
    for (metric, [on, off]) in samples {
        let (on, off) = (median(on), median(off));
        host.log(format!("{metric:<20} jail on {on:>12.2}, off {off:>12.2}, ratio {:.3}", on / off));
    }
    Ok(None)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A guest from start to end, and what was measured.
fn one_run(host: &Host, vmm: Vmm, disk: &Path, port: u16, extra: &[&str]) -> Result<Vec<(String, f64)>> {
    let mut spec = host
        .guest(Kernel::V6_12)
        .memory_mib(MEMORY_MIB)
        .disk(Disk::raw(disk))
        .net()
        .arg("port", port)
        .extra(extra);
    spec.vmm = vmm;
    let mut vm = host.start(&spec)?;
    let (to_init, _) = vm.init()?;
    let mut samples = vec![("time_to_init".to_owned(), to_init.as_secs_f64() * 1000.0)];
    for metric in IN_GUEST {
        let value = vm.note(metric, STEP)?.as_f64().context("a measurement is a number")?;
        samples.push((metric.to_owned(), value));
    }
    // After all the work, with whatever it made the process allocate.
    vm.note("resting", STEP)?;
    samples.push(("extra_memory".to_owned(), extra_memory(&vm)?));
    vm.type_text("go\n")?;
    vm.finish(STEP)?;
    Ok(samples)
}

/// MiB that the process has resident, less its mapping of the guest's memory.
fn extra_memory(vm: &RunningVm) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{}/smaps", vm.pid()))?;
    let kib = extra_kib(&text, MEMORY_MIB << 10).context("smaps shows no mapping of the guest's memory")?;
    Ok(kib as f64 / 1024.0)
}

/// The sum of all `Rss` less that of mappings as large as the guest's memory (`ram_kib`), if there is one.
fn extra_kib(smaps: &str, ram_kib: u64) -> Option<u64> {
    let (mut extra, mut size, mut found) = (0, 0, false);
    for line in smaps.lines() {
        let value = |name: &str| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
        if let Some(kib) = value("Size:") {
            size = kib;
        } else if let Some(kib) = value("Rss:") {
            if size >= ram_kib {
                found = true;
            } else {
                extra += kib;
            }
        }
    }
    found.then_some(extra)
}

fn guest(guest: &mut Guest) -> Result<()> {
    guest.note("mmio_round_trip", mmio_round_trip()?);
    let disk = GuestDisk::open(guest, "vda", false)?;
    guest.note("blk_rand_read_4k", random_reads(&disk)?);
    guest.note("blk_seq_read_128k", sequential_reads(&disk)?);
    let lease = net::up(guest)?;
    let port = u16::try_from(guest.number("port")?)?;
    let start = Instant::now();
    let got = net::fetch(&lease.router, port, 1, DOWNLOAD, |_| ())?;
    ensure!(got == DOWNLOAD, "the download ended after {got} bytes");
    guest.note("net_throughput", mib_per_second(DOWNLOAD, start));
    guest.note("resting", true);
    guest.read_line()?;
    Ok(())
}

/// Nanoseconds for one read of `device_feature_select` in a virtio device's common configuration: a register in a BAR that
/// every monitor has and none can map into the guest.
fn mmio_round_trip() -> Result<f64> {
    let device = VirtioPci::find(ENTROPY)?;
    device.unbind()?;
    let registers = device.map(device.block(1)?.0)?;
    let start = Instant::now();
    for _ in 0..MMIO_READS {
        let _: u32 = registers.read(0);
    }
    Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(MMIO_READS))
}

/// Reads of 4 KiB at random places, one after the other, per second.
fn random_reads(disk: &GuestDisk) -> Result<f64> {
    let mut buffer = Aligned::new(BLOCK);
    let blocks = disk.len()? / BLOCK as u64;
    let mut places = vec![0; 8 * RANDOM_READS as usize];
    Pattern(3).block(0, &mut places);
    let start = Instant::now();
    for place in places.chunks_exact(8) {
        let place = u64::from_le_bytes(place.try_into().expect("8 bytes")) % blocks;
        disk.file().read_exact_at(buffer.get_mut(), place * BLOCK as u64)?;
    }
    Ok(f64::from(RANDOM_READS) / start.elapsed().as_secs_f64())
}

/// MiB per second of reads of 128 KiB from one end to the other.
fn sequential_reads(disk: &GuestDisk) -> Result<f64> {
    let mut buffer = Aligned::new(SEQUENTIAL);
    let len = disk.len()?;
    let start = Instant::now();
    for offset in (0..len).step_by(SEQUENTIAL) {
        disk.file().read_exact_at(buffer.get_mut(), offset)?;
    }
    Ok(mib_per_second(len, start))
}

fn mib_per_second(bytes: u64, start: Instant) -> f64 {
    bytes as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_no_extra_memory() {
        let smaps = "00400000-00500000 r-xp 00000000 00:01 1 /lab/bin/outboard\nSize:  1024 kB\nRss:  700 kB\n\
                     7f0000000000-7f0020000000 rw-s 00000000 00:01 2 /memfd:ram\nSize: 524288 kB\nRss: 90000 kB\n\
                     7f1000000000-7f1000001000 rw-p 00000000 00:00 0\nSize: 4 kB\nRss: 4 kB\n";
        assert_eq!(extra_kib(smaps, 512 << 10), Some(704));
        assert_eq!(extra_kib(smaps, 1 << 20), None, "no mapping is that large");
    }
}
