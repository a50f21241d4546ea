//! A guest's kernel crashes, and the one that waits in memory for that takes over: with the first one's mappings live, and its device at work.

use super::ends::{BLOCKS, PANICKED, PATTERN, RAM, STEP, as_disks, disk};
use crate::case::{Case, Group, HOST_OF_DMA};
use crate::data::Pattern;
use crate::guest::{Guest, kexec, load_module};
use crate::host::{Assigned, Disk, Host, Kernel, Port};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MIB: u64 = 1024;
/// What the first kernel keeps for the second, and what stands there on the second one's command line, of the same length.
const KEEP: (&str, &str) = ("crashkernel=384M", "maxcpus=1       ");
/// Tells the kernels apart.
const WHICH: (&str, &str) = ("lab.which=first", "lab.which=crash");

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "dma-mac-kdump",
        about: "the guest's kernel crashes during traffic, and its crash kernel works the same disk",
        limit_s: 900,
        group: Group::Test,
        host_kernel: HOST_OF_DMA,
        host,
        guest,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    let spec = host.guest(Kernel::V6_12).devices(&assigned).cpus(2).memory_mib(MIB).arg("run", run);
    let [(kernel, kernel_len), (initrd, initrd_len)] = as_disks(host, &spec)?;
    let spec = spec.disk(Disk::raw(kernel).read_only()).disk(Disk::raw(initrd).read_only());
    let spec = spec.arg("kernel", kernel_len).arg("initrd", initrd_len).append(KEEP.0).append(WHICH.0);
    let mut vm = host.start(&spec)?;
    vm.init()?;
    vm.note("first", STEP)?;
    vm.init().context("after the crash")?;
    vm.note("second", STEP)?;
    // It switches off in good order, and a panic it was all the same.
    let exit = vm.exit(STEP)?;
    ensure!(exit == PANICKED, "{exit:?} instead of {PANICKED:?}; {}", vm.stderr());
    vm.check_dma()?;
    assigned.release()?;
    Ok(None)
}

fn guest(guest: &mut Guest) -> Result<()> {
    let (disk, _) = disk(guest)?;
    let run = Pattern(guest.number("run")?);
    if guest.arg("which")? == "crash" {
        disk.check_pattern(run, 0, BLOCKS)?;
        disk.write_pattern(PATTERN, 0, BLOCKS)?;
        disk.check_pattern(PATTERN, 0, BLOCKS)?;
        guest.note("second", true);
        return Ok(());
    }
    disk.write_pattern(run, 0, BLOCKS)?;
    disk.flush()?;
    // Built in from some kernel on.
    load_module("virtio_pci")?;
    guest.need("virtio_blk")?;
    let kernel = kexec::read("vda", guest.number("kernel")?)?;
    let initrd = kexec::read("vdb", guest.number("initrd")?)?;
    kexec::load_for_crash(&kernel, &initrd, &(RAM..RAM + (MIB << 20)), &[KEEP, WHICH])?;
    guest.note("first", true);
    // Reads are under way when the kernel goes, into memory that is the first kernel's.
    std::thread::spawn(move || while disk.check_pattern(run, 0, BLOCKS).is_ok() {});
    std::thread::sleep(Duration::from_millis(300));
    fs::write("/proc/sys/kernel/sysrq", "1")?;
    fs::write("/proc/sysrq-trigger", "c")?;
    bail!("the kernel survived its crash")
}
