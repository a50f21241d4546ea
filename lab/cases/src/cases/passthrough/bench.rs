//! What `cargo xtask bench passthrough` runs: Outboard's passthrough beside the `vfio-pci` of the distribution's QEMU, with the same
//! device, guest and command line, alternating.

use super::{STEP, class, guest_with};
use crate::case::{Case, Group, HOST_OF_DMA};
use crate::data::{Aligned, BLOCK, Pattern};
use crate::guest::Guest;
use crate::guest::disk::GuestDisk;
use crate::guest::function::GuestFunction;
use crate::guest::nvme_ioctl::Controller;
use crate::guest::pci::Registers;
use crate::host::{Assigned, Host, OneCpu, Port};
use crate::protocol::{Event, Vmm};
use anyhow::{Context, Result, ensure};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Instant;

/// Runs on each monitor (the first of both is not counted).
const RUNS: u32 = 5;
/// Times that each metric is measured in a run; the middle one counts, so that what the machine does beside is left out.
const BATCHES: usize = 5;
/// Threads that read at the same time, and reads of each: four commands are under way at a time.
const THREADS: u64 = 4;
const RANDOM_READS: u64 = 300;
/// Bytes of a sequential read.
const SEQUENTIAL: usize = 128 << 10;
/// Commands that have nothing to do but to interrupt.
const ROUND_TRIPS: u32 = 600;
/// Reads of a register.
const REGISTER_READS: u32 = 2_000;
/// NVMe's Version register (NVM Express 1.4, 3.1.2): it never changes.
const VERSION: usize = 8;

/// What the guest measures, in this order.
const METRICS: [&str; 5] =
    ["irq_round_trip", "nvme_rand_read_4k", "nvme_seq_read_128k", "bar_read_mapped", "bar_read_trapped"];

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "bench-passthrough",
        about: "what `cargo xtask bench passthrough` runs",
        limit_s: 3600,
        host_kernel: HOST_OF_DMA,
        group: Group::Tool,
        host,
        guest,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    host.plug_nvme()?;
    // The pluggable one has its MSI-X table away from the other registers, which are mapped into the guest; the other has both in
    // one page of 16 KiB, which Outboard traps.
    let assigned = Assigned::bind_pluggable(&[Port::Pluggable, Port::Nvme])?;
    // Otherwise luck decides by more than the monitors differ (docs/lab.md).
    let _both_alike = OneCpu::new()?;
    for run in 0..=RUNS {
        // Who is first changes, so that a machine that gets slower or faster favours neither.
        let both = if run % 2 == 0 { [Vmm::Qemu, Vmm::Outboard] } else { [Vmm::Outboard, Vmm::Qemu] };
        for vmm in both {
            one_run(host, vmm, &assigned, run > 0).with_context(|| format!("run {run} on {vmm:?}"))?;
        }
        host.log(format!("round {run} of {RUNS}{}", if run == 0 { " (not counted)" } else { "" }));
    }
    assigned.release()?;
    host.unplug_nvme()?;
    Ok(None)
}

fn one_run(host: &Host, vmm: Vmm, assigned: &Assigned, counted: bool) -> Result<()> {
    let mut spec = guest_with(host, assigned);
    spec.vmm = vmm;
    let mut vm = host.start(&spec)?;
    for metric in METRICS {
        let value = vm.note(metric, STEP)?.as_f64().context("a measurement is a number")?;
        if counted {
            host.send(&Event::Sample { metric: metric.to_owned(), vmm, value });
        }
    }
    vm.finish(STEP)
}

fn guest(guest: &mut Guest) -> Result<()> {
    guest.need("nvme")?;
    let functions = GuestFunction::of_class(class::NVME)?;
    let [mapped, trapped] = &functions[..] else {
        anyhow::bail!("two NVMe disks are wanted, not {functions:?}")
    };
    for function in &functions {
        function.wait_driver("nvme")?;
    }
    let name = mapped.disk()?;
    let (controller, disk) = (Controller::of_disk(&name)?, GuestDisk::direct(&name)?);
    guest.note(METRICS[0], middle(|_| round_trip(&controller))?);
    guest.note(METRICS[1], middle(|batch| random_reads(&disk, batch))?);
    guest.note(METRICS[2], middle(|_| sequential_reads(&disk))?);
    drop((controller, disk));
    for (metric, function) in METRICS[3..].iter().zip([mapped, trapped]) {
        let registers = function.take_registers(0)?;
        guest.note(metric, middle(|_| register_read(&registers))?);
    }
    Ok(())
}

/// Measures [`BATCHES`] times; the middle one.
fn middle(measure: impl FnMut(usize) -> Result<f64>) -> Result<f64> {
    let mut values = (0..BATCHES).map(measure).collect::<Result<Vec<f64>>>()?;
    values.sort_by(f64::total_cmp);
    Ok(values[BATCHES / 2])
}

/// Nanoseconds for a command of the admin queue that moves no data, from the driver's entry to its return: one doorbell is written, one
/// interrupt comes back, and the vCPU has nothing else to do meanwhile.
fn round_trip(controller: &Controller) -> Result<f64> {
    controller.get_feature()?;
    let start = Instant::now();
    for _ in 0..ROUND_TRIPS {
        controller.get_feature()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(ROUND_TRIPS))
}

/// Reads of 4 KiB per second, at random places.
fn random_reads(disk: &GuestDisk, batch: usize) -> Result<f64> {
    let blocks = disk.len()? / BLOCK as u64;
    let one = |seed: u64| -> Result<()> {
        let mut buffer = Aligned::new(BLOCK);
        let mut places = vec![0; 8 * RANDOM_READS as usize];
        Pattern(seed).block(0, &mut places);
        for place in places.chunks_exact(8) {
            let place = u64::from_le_bytes(place.try_into().expect("8 bytes")) % blocks;
            disk.file().read_exact_at(buffer.get_mut(), place * BLOCK as u64)?;
        }
        Ok(())
    };
    let start = Instant::now();
    thread::scope(|scope| {
        let seeds = (0..THREADS).map(|thread| batch as u64 * THREADS + thread);
        let threads: Vec<_> = seeds.map(|seed| scope.spawn(move || one(seed))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no thread panics"))
    })?;
    Ok((THREADS * RANDOM_READS) as f64 / start.elapsed().as_secs_f64())
}

/// MiB per second of reads of 128 KiB, one after the other, from one end to the other.
fn sequential_reads(disk: &GuestDisk) -> Result<f64> {
    let mut buffer = Aligned::new(SEQUENTIAL);
    let len = disk.len()?;
    let start = Instant::now();
    for offset in (0..len).step_by(SEQUENTIAL) {
        disk.file().read_exact_at(buffer.get_mut(), offset)?;
    }
    Ok(len as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64())
}

/// Nanoseconds for a read of a register that means nothing to the device.
fn register_read(registers: &Registers) -> Result<f64> {
    let version: u32 = registers.read(VERSION);
    ensure!(version >> 16 == 1, "the version register holds {version:#x}");
    let start = Instant::now();
    for _ in 0..REGISTER_READS {
        ensure!(registers.read::<u32>(VERSION) == version, "the version register has changed");
    }
    Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(REGISTER_READS))
}
