//! How a guest's DMA ends: the driver goes and comes back, the kernel crashes, is replaced by another, the process is killed. Nothing stays mapped,
//! and the next guest finds a disk that works.

use crate::case::{Case, Group, GuestHalf, HOST_OF_DMA, HostHalf};
use crate::data::{BLOCK, Pattern};
use crate::guest::disk::GuestDisk;
use crate::guest::dma::{Stats, domains};
use crate::guest::function::GuestFunction;
use crate::guest::{Guest, kexec, load_module, wait_for};
use crate::host::{Assigned, Disk, ExitKind, GuestSpec, Host, Kernel, Port};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(super) const STEP: Duration = Duration::from_secs(300);
const NVME_CLASS: u32 = 0x01_0802;
pub(super) const PATTERN: Pattern = Pattern(90);
/// Blocks written and checked: 4 MiB.
pub(super) const BLOCKS: u64 = (4 << 20) / BLOCK as u64;
const REBINDS: u32 = 5;
const KILLS: u32 = 3;
/// Where an Outboard guest's RAM starts (ARCHITECTURE.md), and how much the guest of the kexec case has.
pub(super) const RAM: u64 = 0x4000_0000;
const KEXEC_MIB: u64 = 1024;
/// Exit status of a guest whose kernel panicked.
pub(super) const PANICKED: ExitKind = ExitKind::Code(3);

pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, host: HostHalf, guest: GuestHalf| Case {
        name,
        about,
        limit_s: 900,
        host_kernel: HOST_OF_DMA,
        group: Group::Test,
        host,
        guest,
    };
    vec![
        case(
            "dma-mac-rebind",
            "nvme unbound under traffic and bound again: nothing stays mapped in between, bus master is off",
            plain_host,
            rebind,
        ),
        case(
            "dma-mac-6.1",
            "the same on Linux 6.1, which takes the operations away with each driver",
            old_host,
            rebind,
        ),
        case("dma-mac-crash", "the guest's kernel crashes during traffic", crash_host, crash),
        case("dma-mac-kexec", "the guest's kernel starts another one", kexec_host, kexec_guest),
        case("dma-mac-kill", "the process is killed during traffic", kill_host, kill),
    ]
}

fn spec(host: &Host, assigned: &Assigned) -> GuestSpec {
    host.guest(Kernel::V6_12).devices(assigned).cpus(2)
}

fn plain_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    host.start(&spec(host, &assigned))?.finish(STEP)?;
    assigned.release()?;
    Ok(None)
}

fn old_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    host.start(&host.guest(Kernel::V6_1).devices(&assigned).cpus(2))?.finish(STEP)?;
    assigned.release()?;
    Ok(None)
}

/// The disk, and its function, with the driver loaded.
pub(super) fn disk(guest: &mut Guest) -> Result<(GuestDisk, GuestFunction)> {
    guest.need("nvme")?;
    let function = GuestFunction::the(NVME_CLASS)?;
    function.wait_driver("nvme")?;
    Ok((GuestDisk::direct("nvme0n1")?, function))
}

fn rebind(guest: &mut Guest) -> Result<()> {
    let (disk, function) = disk(guest)?;
    disk.write_pattern(PATTERN, 0, BLOCKS)?;
    disk.flush()?;
    drop(disk);
    for _ in 0..REBINDS {
        let reader = GuestDisk::direct("nvme0n1")?;
        let traffic = std::thread::spawn(move || while reader.check_pattern(PATTERN, 0, BLOCKS).is_ok() {});
        std::thread::sleep(Duration::from_millis(200));
        function.unbind()?;
        // The last of its reads fails.
        traffic.join().map_err(|_| anyhow!("the reader panicked"))?;
        let command = fs::read(function.folder().join("config"))?[4];
        ensure!(command & (1 << 2) == 0, "bus master is on without a driver: {command:#x}");
        let stats = Stats::read(&domains()?[0])?;
        for key in ["mapped_windows", "mapped_bytes", "used_windows", "live", "leaks"] {
            ensure!(stats.value(key)? == 0, "{key} without a driver:\n{}", stats.text);
        }
        fs::write("/sys/bus/pci/drivers/nvme/bind", &function.address)?;
        function.wait_driver("nvme")?;
        // The node of before may still be there for a moment, with nothing behind it.
        let disk = wait_for("disk that can be read", Duration::from_secs(30), || {
            let disk = GuestDisk::direct("nvme0n1").ok()?;
            disk.read_block(0).is_ok().then_some(disk)
        })?;
        disk.check_pattern(PATTERN, 0, BLOCKS)?;
    }
    Ok(())
}

/// Writes and checks without end, after telling that it has begun.
fn traffic(guest: &Guest, disk: &GuestDisk) -> Result<()> {
    for round in 0.. {
        disk.write_pattern(Pattern(round), 0, BLOCKS)?;
        disk.check_pattern(Pattern(round), 0, BLOCKS)?;
        if round == 0 {
            guest.note("traffic", true);
        }
    }
    Ok(())
}

fn crash_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let mut vm = host.start(&spec(host, &assigned).arg("crash", 1))?;
    vm.note("traffic", STEP)?;
    let exit = vm.exit(STEP)?;
    ensure!(exit == PANICKED, "{exit:?} instead of {PANICKED:?}; {}", vm.stderr());
    ensure!(vm.stderr().contains("says through its DMA device"), "the module said nothing: {}", vm.stderr());
    vm.check_dma()?;
    host.start(&spec(host, &assigned).arg("crash", 0))?.finish(STEP)?;
    assigned.release()?;
    Ok(None)
}

fn crash(guest: &mut Guest) -> Result<()> {
    let (disk, _) = disk(guest)?;
    if guest.number("crash")? == 0 {
        disk.write_pattern(PATTERN, 0, BLOCKS)?;
        return disk.check_pattern(PATTERN, 0, BLOCKS);
    }
    std::thread::spawn(|| -> Result<()> {
        std::thread::sleep(Duration::from_secs(4));
        fs::write("/proc/sys/kernel/sysrq", "1")?;
        fs::write("/proc/sysrq-trigger", "c")?;
        Ok(())
    });
    traffic(guest, &disk)?;
    bail!("the kernel survived its crash")
}

/// Copies of the kernel and of the initramfs as disks: whole blocks.
pub(super) fn as_disks(host: &Host, spec: &GuestSpec) -> Result<[(PathBuf, usize); 2]> {
    let copy = |from: &PathBuf, name: &str| -> Result<(PathBuf, usize)> {
        let mut bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let len = bytes.len();
        bytes.resize(len.next_multiple_of(BLOCK), 0);
        let to = host.scratch(name);
        fs::write(&to, bytes)?;
        Ok((to, len))
    };
    Ok([copy(&spec.kernel, "kernel.raw")?, copy(&spec.initrd, "initrd.raw")?])
}

fn kexec_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    // 6.12 falls over in its own kexec_load where the CPU has 48 bits of addresses and it was built for 52 (trans_pgd_create_copy).
    let spec = host.guest(Kernel::V6_1).devices(&assigned).cpus(2).memory_mib(KEXEC_MIB).arg("run", run);
    let [(kernel, kernel_len), (initrd, initrd_len)] = as_disks(host, &spec)?;
    let spec = spec.disk(Disk::raw(kernel).read_only()).disk(Disk::raw(initrd).read_only());
    let spec = spec.arg("kernel", kernel_len).arg("initrd", initrd_len);
    let mut vm = host.start(&spec)?;
    vm.init()?;
    vm.note("first", STEP)?;
    vm.init().context("after kexec")?;
    vm.note("second", STEP)?;
    vm.finish(STEP)?;
    assigned.release()?;
    Ok(None)
}

fn kexec_guest(guest: &mut Guest) -> Result<()> {
    let (disk, _) = disk(guest)?;
    // Both kernels have the same command line; the disk tells them apart.
    let run = Pattern(guest.number("run")?);
    if disk.check_pattern(run, 0, BLOCKS).is_ok() {
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
    kexec::load(&kernel, &initrd, RAM, KEXEC_MIB << 20)?;
    guest.note("first", true);
    // Reads are under way when the kernel goes.
    std::thread::spawn(move || while disk.check_pattern(run, 0, BLOCKS).is_ok() {});
    std::thread::sleep(Duration::from_millis(300));
    kexec::go()
}

fn kill_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    for kill in 0..KILLS {
        let mut vm = host.start(&spec(host, &assigned))?;
        vm.note("traffic", STEP).with_context(|| format!("boot {kill}"))?;
        std::thread::sleep(Duration::from_millis(u64::from(200 + 300 * kill)));
        vm.kill()?;
    }
    // Fails if anything is still pinned or mapped, or if a device wrote where it may not.
    assigned.release()?;
    Ok(None)
}

fn kill(guest: &mut Guest) -> Result<()> {
    let (disk, _) = disk(guest)?;
    traffic(guest, &disk)
}
