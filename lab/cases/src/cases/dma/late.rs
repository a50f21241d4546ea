//! Who comes too late: a guest without the module, a module after the drivers, a device after both.

use crate::case::{Case, Group, GuestHalf, HOST_OF_DMA, HostHalf};
use crate::cases::passthrough::class;
use crate::cases::passthrough::network::{both_ways, guest_end};
use crate::data::{BLOCK, Pattern};
use crate::guest::disk::GuestDisk;
use crate::guest::dma::{LATER, MODULE, Stats, domains};
use crate::guest::function::GuestFunction;
use crate::guest::{Guest, busybox, load_file, load_needs_of, wait_for};
use crate::host::{Assigned, Dma, Host, Kernel, Port, RunningVm, outboard};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(300);
const PATTERN: Pattern = Pattern(55);
/// Blocks written and checked: 4 MiB.
const BLOCKS: u64 = (4 << 20) / BLOCK as u64;
/// Bytes each way over the network.
const LEN: u64 = 8 << 20;
/// Seconds that the nvme driver waits for an answer of its controller, instead of 60.
const NVME_PATIENCE: &str = "10";
/// Name of the virtual machine that gets a device later.
const NAME: &str = "late";

pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, host: HostHalf, guest: GuestHalf| Case {
        name,
        about,
        limit_s: 900,
        group: Group::Test,
        host_kernel: HOST_OF_DMA,
        host,
        guest,
    };
    vec![
        case(
            "dma-mac-late",
            "drivers without our module are held back and told of; the module after them refuses, and works after they were bound again",
            late_host,
            late,
        ),
        case("dma-mac-hotadd", "a disk added where nothing was when the module came", add_host, added),
    ]
}

fn late_host(host: &Host) -> Result<Option<String>> {
    // The other end of the wire, before what the IOMMU holds is first looked at.
    host.need("virtio_net")?;
    let assigned = Assigned::bind(&[Port::Nvme, Port::Network])?;
    let spec = host.guest(Kernel::V6_12).devices(&assigned).cpus(2).arg(LATER, 1).arg("len", LEN);
    let mut vm = host.start(&spec)?;
    vm.note("gave-up", STEP)?;
    for slot in assigned.slots() {
        wait_for("word of a driver that waits in vain", Duration::from_secs(60), || told(&vm, &slot.slot))
            .with_context(|| format!("of {}; the monitor said: {}", slot.slot, vm.stderr()))?;
    }
    vm.type_text("load\n")?;
    host.log(format!("the module came after a driver: {}", vm.note("refused", STEP)?));
    both_ways(host, &mut vm, LEN)?;
    vm.finish(STEP)?;
    // Fails if the IOMMU has seen a fault in all that time.
    assigned.release()?;
    Ok(None)
}

/// Whether the log says that a driver of `slot` waits, what for, and what to do.
fn told(vm: &RunningVm, slot: &str) -> Option<()> {
    let says = ["cannot do DMA", "Install the kernel module outboard_dma", "docs/guest-module.md"];
    let said = vm.stderr();
    let lines =
        said.lines().filter(|line| line.contains(slot) && says.iter().all(|text| line.contains(text)));
    (lines.count() == 1).then_some(())
}

fn late(guest: &mut Guest) -> Result<()> {
    guest.check_dma_myself();
    let card = network_card(guest)?;
    let disk = without_module()?;
    guest.note("gave-up", true);
    ensure!(guest.read_line()? == "load", "the host half said something else");
    guest.need(MODULE)?;
    let said = busybox(&["dmesg"])?;
    let line = said.lines().find(|line| line.contains("not served") && line.contains(&card.address));
    let line = line.with_context(|| format!("nothing of the card in the kernel's log: {said}"))?;
    ensure!(line.contains("the driver e1000e was bound before"), "the kernel's log says '{line}'");
    ensure!(!said.contains(&format!("{}: not served", disk.address)), "the disk has no driver: {said}");
    // The driver is alive, sends what the kernel has for it, and has got no operations of ours.
    std::thread::sleep(Duration::from_secs(5));
    ensure!(stats_of(&card)?.value("maps")? == 0, "something was mapped for a driver that is not served");
    guest.note("refused", line);
    disk.bind("nvme")?;
    works(&disk)?;
    card.unbind()?;
    card.bind("e1000e")?;
    guest_end(guest, &card)?;
    for function in [&disk, &card] {
        let stats = stats_of(function)?;
        ensure!(stats.value("maps")? > 0 && stats.value("failures")? == 0, "{}", stats.text);
    }
    Ok(())
}

/// The card with its driver, which needs no DMA to bind, and turned on.
fn network_card(guest: &mut Guest) -> Result<GuestFunction> {
    guest.need("e1000e")?;
    let card = GuestFunction::the(class::ETHERNET)?;
    card.wait_driver("e1000e")?;
    busybox(&["ip", "link", "set", &card.interface()?, "up"])?;
    Ok(card)
}

/// The disk, after its driver has tried in vain.
fn without_module() -> Result<GuestFunction> {
    let file = load_needs_of("nvme")?;
    fs::write("/sys/module/nvme_core/parameters/admin_timeout", NVME_PATIENCE)?;
    load_file(&file)?;
    let disk = GuestFunction::the(class::NVME)?;
    let gave_up = format!("{}: probe with driver nvme failed", disk.address);
    let tried = || busybox(&["dmesg"]).ok()?.contains(&gave_up).then_some(());
    wait_for("end of the driver's patience", STEP, tried)?;
    ensure!(!disk.folder().join("driver").exists(), "the driver has the disk");
    ensure!(!Path::new("/dev/nvme0n1").exists(), "there is a disk without DMA");
    Ok(disk)
}

/// The data of the NVMe disk at `function`.
fn works(function: &GuestFunction) -> Result<()> {
    let disk = GuestDisk::of(function)?;
    disk.write_pattern(PATTERN, 0, BLOCKS)?;
    disk.flush()?;
    disk.check_pattern(PATTERN, 0, BLOCKS)
}

/// The statistics of the DMA device that serves `function`: those that name it.
fn stats_of(function: &GuestFunction) -> Result<Stats> {
    let named = |stats: &Stats| stats.text.contains(&format!("device {} ", function.address));
    let all = domains()?.iter().map(|folder| Stats::read(folder)).collect::<Result<Vec<_>>>()?;
    let found = all.into_iter().find(named);
    found.with_context(|| format!("the module knows nothing of {}", function.address))
}

fn add_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let slot = assigned.slots()[0].slot.clone();
    let device = Dma::of(host.case()).device(&slot);
    // A simulated device has the machine give every port a DMA device.
    let args = ["--device", "simulated:endpoint,dma=mac", "--spare-ports", "1", "--name", NAME];
    let mut vm = host.start(&host.guest(Kernel::V6_12).device_drivers().cpus(2).extra(&args))?;
    vm.note("empty", STEP)?;
    for round in ["first", "second"] {
        outboard(&["device", "add", NAME, &device]).with_context(|| format!("the {round} time"))?;
        vm.note("verified", STEP).with_context(|| format!("the {round} time"))?;
        outboard(&["device", "remove", NAME, &slot]).with_context(|| format!("the {round} time"))?;
    }
    vm.finish(STEP)?;
    assigned.release()?;
    Ok(None)
}

fn added(guest: &mut Guest) -> Result<()> {
    guest.check_dma_myself();
    guest.need("nvme")?;
    ensure!(GuestFunction::of_class(class::NVME)?.is_empty(), "there is a disk already");
    // Of the empty slot as well.
    let folders = domains()?;
    ensure!(folders.len() == 2, "the module serves {folders:?}");
    for folder in &folders {
        let stats = Stats::read(folder)?;
        ensure!(stats.value("maps")? == 0, "{}", stats.text);
    }
    guest.note("empty", true);
    for round in ["first", "second"] {
        let disk = wait_for("disk", STEP, || GuestFunction::the(class::NVME).ok())?;
        disk.wait_driver("nvme")?;
        works(&disk).with_context(|| format!("the {round} time"))?;
        let stats = stats_of(&disk)?;
        ensure!(stats.value("maps")? > 0 && stats.value("failures")? == 0, "{}", stats.text);
        guest.note("verified", true);
        let gone = || GuestFunction::of_class(class::NVME).is_ok_and(|found| found.is_empty()).then_some(());
        wait_for("end of the disk", STEP, gone)?;
    }
    Ok(())
}
