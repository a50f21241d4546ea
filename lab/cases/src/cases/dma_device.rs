//! The DMA device in the hands of user space: the published protocol, and a guest without manners. No module of ours is in the guest.

use crate::case::{Case, Group, HOST_OF_DMA};
use crate::cases::passthrough::class;
use crate::guest::Guest;
use crate::guest::dma_device::{self as dma, DmaDevice, GRANULE, PublishedFunction, register, status};
use crate::guest::function::GuestFunction;
use crate::guest::nvme::RawNvme;
use crate::guest::pci::DmaPage;
use crate::guest::published::{Driver, Layout, OK, Pages, exercise};
use crate::host::{Assigned, Dma, Host, Kernel, Port, RunningVm};
use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(240);
const CPUS: u32 = 4;
/// An address of Outboard's machine where nothing is, and one in the window of its devices.
const NOWHERE: u64 = 0x0c00_0000;
const WINDOW: u64 = 0x2000_0000;
/// First byte of RAM.
const RAM: u64 = 0x4000_0000;
const MEMORY_MIB: u64 = 512;
/// How long a device that must not do DMA is watched.
const QUIET: Duration = Duration::from_secs(2);
/// How long the driver of a neighbour tries.
const NEIGHBOUR: Duration = Duration::from_secs(8);
const PROMPT: Duration = Duration::from_secs(20);
/// What xtask calls its NVMe disk.
const SERIAL: &str = "outboard-lab";
/// Pages that the published driver maps, beside its own three and the disk's.
const MAPPED: usize = 64;

pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, host, guest| Case {
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
            "dma-published",
            "the published DMA protocol in both layouts, by a driver written from its description; an NVMe disk's DMA through it",
            published_host,
            published_guest,
        ),
        case(
            "dma-hostile",
            "a hostile guest at the DMA device: queues, lengths, counts, handles, storms, entries that change",
            hostile_host,
            hostile_guest,
        ),
    ]
}

/// The guest is over, and the monitor has taken down what was mapped, all of it, without a mistake.
fn finish(vm: &mut RunningVm, slots: usize) -> Result<()> {
    vm.finish(STEP)?;
    let said = vm.stderr();
    let clean = said.lines().filter(|line| line.contains("DMA of") && line.contains(" 0 left, 0 mistakes"));
    ensure!(clean.count() == slots, "the monitor did not end with clean slots: {said}");
    Ok(())
}

fn published_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    for published in ["a", "b"] {
        let spec = host.guest(Kernel::V6_12).devices(&assigned).dma(Dma::Bare(published));
        let mut vm = host.start(&spec.arg("layout", published))?;
        let result = finish(&mut vm, 1);
        host.part(format!("layout-{published}"), result);
    }
    assigned.release()?;
    // A slot of two functions, of which that protocol serves one.
    let assigned = Assigned::bind(&[Port::Several])?;
    let spec = host.guest(Kernel::V6_12).devices(&assigned).dma(Dma::Bare("a"));
    let result = finish(&mut host.start(&spec.arg("layout", "a").arg("neighbour", 1))?, 1);
    // Fails if the IOMMU has seen the neighbour's raw addresses.
    host.part("neighbour", result.and_then(|()| assigned.release()));
    Ok(None)
}

/// DMA is let through for the function that is served. The driver of the other one knows nothing of that: its raw addresses reach nobody.
fn neighbour(guest: &mut Guest) -> Result<()> {
    let function = PublishedFunction::open(3 + MAPPED)?;
    let address: Vec<u64> = function.pages().iter().map(DmaPage::address).collect();
    let [command, requests, responses, mapped @ ..] = &address[..] else { bail!("no pages") };
    let pages = Pages { command: *command, requests: *requests, responses: *responses };
    let driver = Driver::new(&function, Layout::A, pages).map_err(|error| anyhow!("{error}"))?;
    let first = mapped.first().copied().context("a page")?;
    ensure!(driver.map(&[(first, 4096)]).0 == OK, "the first mapping failed");
    guest.need("snd_hda_intel")?;
    let sound = GuestFunction::the(class::HDA)?;
    // It sends its first command by DMA, and waits for an answer.
    thread::sleep(NEIGHBOUR);
    ensure!(sound.folder().exists(), "the neighbour is gone");
    ensure!(driver.unmap(&[first]).0 == OK, "the unmapping failed");
    function.check()
}

fn published_guest(guest: &mut Guest) -> Result<()> {
    if guest.arg("neighbour").is_ok() {
        return neighbour(guest);
    }
    let layout = if guest.arg("layout")? == "a" { Layout::A } else { Layout::B };
    let nvme = RawNvme::open()?;
    // The guest's own addresses, before it has asked for anything: the monitor holds the device back, nothing faults.
    let raw = nvme.pages.each_ref().map(DmaPage::address);
    ensure!(nvme.identify(raw, QUIET)?.is_none(), "the disk did DMA before anything was mapped");
    let function = PublishedFunction::open(3 + MAPPED)?;
    let address: Vec<u64> = function.pages().iter().map(DmaPage::address).collect();
    let [command, requests, responses, mapped @ ..] = &address[..] else { bail!("no pages") };
    let pages = Pages { command: *command, requests: *requests, responses: *responses };
    let fault = |error: String| anyhow!("{error}");
    let driver = Driver::new(&function, layout, pages).map_err(fault)?;
    let served = nvme.function.address.get(5..7).and_then(|bus| u32::from_str_radix(bus, 16).ok());
    ensure!(Some(driver.managed()) == served.map(|bus| bus << 8), "it serves {:#x}", driver.managed());
    exercise(&driver, mapped, NOWHERE).map_err(fault)?;
    let (code, responses) = driver.map(&raw.map(|page| (page, 4096)));
    ensure!(code == OK, "mapping the disk's pages ended with {code}");
    let buses: Vec<u64> = responses.iter().map(|response| response.bus).collect();
    let [queue, done, data] = buses[..] else { bail!("{} responses", buses.len()) };
    let serial = nvme.identify([queue, done, data], PROMPT)?;
    ensure!(serial.as_deref() == Some(SERIAL), "the disk calls itself {serial:?}");
    ensure!(driver.unmap(&raw).0 == OK, "unmapping the disk's pages failed");
    function.check()
}

fn hostile_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme, Port::Sata])?;
    let spec =
        host.guest(Kernel::V6_12).devices(&assigned).dma(Dma::Bare("a")).cpus(CPUS).memory_mib(MEMORY_MIB);
    let mut vm = host.start(&spec)?;
    let parts = vm.note("parts", STEP)?.as_u64().context("a number of parts")?;
    for _ in 0..parts {
        let part = vm.note("part", STEP)?;
        let name = part["name"].as_str().unwrap_or("?");
        let result = part["fault"].as_str().map_or(Ok(()), |fault| Err(anyhow!("{fault}")));
        host.part(name, result);
    }
    host.part("nothing-left", finish(&mut vm, 2));
    assigned.release()?;
    Ok(None)
}

type Attack = fn(&[DmaDevice]) -> Result<()>;

const ATTACKS: [(&str, Attack); 10] = [
    ("before-enable", before_enable),
    ("queues-that-are-none", bad_queues),
    ("counts", bad_counts),
    ("ranges-that-are-no-ram", bad_ranges),
    ("queue-that-maps-itself", own_queue),
    ("handles-of-another-device", foreign_handles),
    ("only-unmaps-for-later", not_later),
    ("registers-that-are-none", bad_registers),
    ("storm", storm),
    ("entries-that-change", changing_entries),
];

fn hostile_guest(guest: &mut Guest) -> Result<()> {
    let devices = DmaDevice::all()?;
    ensure!(devices.len() == 2, "{} DMA devices", devices.len());
    let nvme = RawNvme::open()?;
    let mut results = Vec::new();
    for (name, attack) in ATTACKS {
        devices.iter().for_each(DmaDevice::start);
        let result = attack(&devices).and_then(|()| settle(&devices));
        results.push((name, result));
    }
    results.push(("works-afterwards", works(&devices, &nvme)));
    guest.note("parts", results.len());
    for (name, result) in results {
        let fault = result.err().map(|error| format!("{error:#}"));
        guest.note("part", serde_json::json!({ "name": name, "fault": fault }));
    }
    Ok(())
}

/// After a reset nothing is mapped, and the device can be started again.
fn settle(devices: &[DmaDevice]) -> Result<()> {
    for device in devices {
        device.reset();
        let (entries, bytes) =
            (device.read_long(register::STAT_ENTRIES), device.read_long(register::STAT_BYTES));
        ensure!((entries, bytes) == (0, 0), "{entries} mappings of {bytes} bytes after a reset");
        let (maps, unmaps) = (device.read_long(register::STAT_MAPS), device.read_long(register::STAT_UNMAPS));
        ensure!(maps == unmaps, "{maps} mappings made, {unmaps} taken down");
        ensure!(device.read(register::STATE) == 0, "state {}", device.read(register::STATE));
    }
    Ok(())
}

fn expect(what: &str, is: u32, should_be: u32) -> Result<()> {
    ensure!(is == should_be, "{what}: status {is}, not {should_be}");
    Ok(())
}

fn before_enable(devices: &[DmaDevice]) -> Result<()> {
    let device = &devices[0];
    device.reset();
    device.write(register::QUEUE_FIRST, device.queue.address());
    device.put(0, dma::MAP, RAM, GRANULE, 0);
    expect("a batch before the device is enabled", device.ring(1), status::OFF)?;
    expect("its entry", device.result(0).2, status::BUSY)
}

fn bad_queues(devices: &[DmaDevice]) -> Result<()> {
    let device = &devices[0];
    let end = RAM + (MEMORY_MIB << 20);
    for base in [0, NOWHERE, WINDOW, end, end - 64, RAM - 64, u64::MAX - 63, device.queue.address() + 8] {
        device.write(register::QUEUE_FIRST, base);
        expect(&format!("a queue at {base:#x}"), device.ring(2), status::BAD_QUEUE)?;
    }
    Ok(())
}

fn bad_counts(devices: &[DmaDevice]) -> Result<()> {
    for count in [0, 257, 0x8000_0000, u32::MAX] {
        expect(&format!("a batch of {count}"), devices[0].ring(count), status::BAD_COUNT)?;
    }
    Ok(())
}

fn bad_ranges(devices: &[DmaDevice]) -> Result<()> {
    let (device, end) = (&devices[0], RAM + (MEMORY_MIB << 20));
    let ranges = [
        (NOWHERE, GRANULE, status::BAD_RANGE),
        (WINDOW, GRANULE, status::BAD_RANGE),
        (end, GRANULE, status::BAD_RANGE),
        (end - GRANULE, 2 * GRANULE, status::BAD_RANGE),
        (RAM, (MEMORY_MIB << 20) + GRANULE, status::BAD_RANGE),
        (0u64.wrapping_sub(GRANULE), GRANULE, status::BAD_RANGE),
        (0u64.wrapping_sub(GRANULE), 2 * GRANULE, status::BAD_RANGE),
        (RAM, 0u64.wrapping_sub(GRANULE), status::BAD_RANGE),
        (RAM, 0, status::MISALIGNED),
        (RAM, 4096, status::MISALIGNED),
        (RAM + 4096, GRANULE, status::MISALIGNED),
        (RAM, u64::MAX, status::MISALIGNED),
    ];
    for (address, len, code) in ranges {
        expect(&format!("{address:#x}+{len:#x}"), device.one(dma::MAP, address, len, 0).2, code)?;
    }
    ensure!(device.read_long(register::STAT_ENTRIES) == 0, "one of them was mapped");
    Ok(())
}

fn own_queue(devices: &[DmaDevice]) -> Result<()> {
    let device = &devices[0];
    let first = device.queue.address() / GRANULE * GRANULE;
    for index in 0..32 {
        device.put(index, dma::MAP, first, GRANULE, 0);
    }
    expect("a queue that maps itself", device.ring(32), status::OK)?;
    // A second queue over the first, one entry further.
    let second = register::QUEUE_FIRST + register::QUEUE_STRIDE;
    device.write(second, device.queue.address() + 64);
    for index in 0..32 {
        let (handle, ..) = device.result(index);
        device.put(index, dma::UNMAP, 0, 0, handle);
    }
    device.write(second + register::DOORBELL, 31_u32);
    expect("the queue over it", device.read(second + register::STATUS), status::OK)?;
    expect("the first of both", device.ring(32), status::NO_SUCH_HANDLE)?;
    expect("its own entry", device.result(0).2, status::OK)
}

fn foreign_handles(devices: &[DmaDevice]) -> Result<()> {
    let [one, other] = devices else { bail!("two devices") };
    let (handle, _, code) = one.one(dma::MAP, RAM, GRANULE, 0);
    expect("a mapping", code, status::OK)?;
    for foreign in [handle, handle + 1, 0, 1, u64::MAX] {
        expect("another device's handle", other.one(dma::UNMAP, 0, 0, foreign).2, status::NO_SUCH_HANDLE)?;
    }
    expect("its own", one.one(dma::UNMAP, 0, 0, handle).2, status::OK)?;
    expect("its own, again", one.one(dma::UNMAP, 0, 0, handle).2, status::NO_SUCH_HANDLE)
}

fn not_later(devices: &[DmaDevice]) -> Result<()> {
    let device = &devices[0];
    device.put(0, dma::MAP, RAM, GRANULE, 0);
    device.write(register::QUEUE_FIRST + register::DOORBELL_LATER, 1_u32);
    let status = register::QUEUE_FIRST + register::STATUS;
    crate::guest::wait_for("end of a batch for later", PROMPT, || {
        (device.read(status) != status::BUSY).then_some(())
    })?;
    expect("a mapping for later", device.result(0).2, status::NOT_LATER)
}

fn bad_registers(devices: &[DmaDevice]) -> Result<()> {
    let device = &devices[0];
    for offset in (0..4096).step_by(4) {
        // Of everything that is no control register or doorbell.
        if offset != register::CONTROL && offset < register::QUEUE_FIRST {
            device.write(offset, u32::MAX);
        }
    }
    ensure!(device.read(0x7c) == u32::MAX, "a register that is none does not read as all-ones");
    ensure!(device.read(0xffc) == u32::MAX, "a register that is none does not read as all-ones");
    ensure!(device.read(register::LIMIT_BYTES) != u32::MAX, "a register does");
    Ok(())
}

/// On each vCPU a thread that rings every bell of both devices, at once.
fn storm(devices: &[DmaDevice]) -> Result<()> {
    on_each_cpu(|cpu| {
        let queue = DmaPage::new()?;
        for round in 0..400_usize {
            let device = &devices[(round + cpu) % devices.len()];
            let base = register::QUEUE_FIRST + (round % CPUS as usize) * register::QUEUE_STRIDE;
            for entry in 0..4 {
                queue.write(entry * 64, u64::from(dma::MAP) + (round + entry) as u64 % 2);
                queue.write(entry * 64 + 8, RAM + (round as u64 % 64) * GRANULE);
                queue.write(entry * 64 + 16, GRANULE);
            }
            device.write(base, queue.address());
            device.write(base + register::DOORBELL, 4_u32);
            device.write(base + register::DOORBELL_LATER, 4_u32);
            if round % 100 == 99 {
                device.write(register::CONTROL, if cpu == 0 { dma::RESET } else { dma::ENABLE });
                device.write(register::CONTROL, dma::ENABLE);
            }
        }
        // Nobody reads or writes the page afterwards but the device: a batch for later may still be under way.
        std::mem::forget(queue);
        Ok(())
    })
}

/// One vCPU rings, the others change what it has written.
fn changing_entries(devices: &[DmaDevice]) -> Result<()> {
    let (device, over) = (&devices[0], AtomicBool::new(false));
    on_each_cpu(|cpu| {
        if cpu > 0 {
            let mut value = cpu as u64;
            while !over.load(Ordering::Relaxed) {
                value = value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (value >> 33) as usize % 64 * 64;
                let (offset, word) =
                    [(8, NOWHERE), (8, RAM), (16, GRANULE), (16, 1 << 40), (0, 2), (24, value)]
                        [(value >> 40) as usize % 6];
                device.queue.write(at + offset, word);
            }
            return Ok(());
        }
        for _ in 0..300 {
            for index in 0..64 {
                device.put(index, dma::MAP, RAM + index as u64 * GRANULE, GRANULE, 0);
            }
            device.ring(64);
        }
        over.store(true, Ordering::Relaxed);
        Ok(())
    })?;
    let maps = device.read_long(register::STAT_MAPS);
    ensure!(maps > 0, "nothing was mapped in all that");
    Ok(())
}

/// An ordinary guest afterwards: the disk's DMA goes where it was told.
fn works(devices: &[DmaDevice], nvme: &RawNvme) -> Result<()> {
    let port = |device: &DmaDevice| device.read(register::SERVED) >> 3;
    let lower = devices.iter().min_by_key(|device| port(device)).context("a device")?;
    ensure!(
        devices.iter().all(|device| device.read(register::QUEUES) == CPUS + 1),
        "a queue for each vCPU, and one"
    );
    // The disk was given first.
    lower.start();
    let mapped = nvme.pages.iter().map(|page| lower.map_page(page)).collect::<Result<Vec<_>>>()?;
    let [queue, done, data] = mapped[..] else { bail!("three pages") };
    let serial = nvme.identify([queue.1, done.1, data.1], PROMPT)?;
    ensure!(serial.as_deref() == Some(SERIAL), "the disk calls itself {serial:?}");
    for (handle, _) in mapped {
        expect("an unmapping", lower.one(dma::UNMAP, 0, 0, handle).2, status::OK)?;
    }
    Ok(())
}

/// Runs `work` on every vCPU at the same time.
fn on_each_cpu(work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let work = &work;
        let start = |cpu: usize| {
            scope.spawn(move || {
                let mut set = CpuSet::new();
                set.set(cpu)?;
                sched_setaffinity(Pid::from_raw(0), &set)?;
                work(cpu)
            })
        };
        let threads: Vec<_> = (0..CPUS as usize).map(start).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
    })
}
