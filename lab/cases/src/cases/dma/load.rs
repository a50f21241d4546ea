//! A disk under more load than the host maps at a time, and the recorder.

use crate::case::{Case, Group, GuestHalf, HOST_OF_DMA, HostHalf};
use crate::data::{BLOCK, Pattern};
use crate::guest::Guest;
use crate::guest::disk::GuestDisk;
use crate::guest::dma::{Stats, domains};
use crate::guest::function::GuestFunction;
use crate::guest::pressure::{self, worker};
use crate::host::{Assigned, Host, Kernel, Port, outboard};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{Seek, SeekFrom};
use std::thread;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(400);
const NVME_CLASS: u32 = 0x01_0802;
/// Requests at a time, of 1 MiB each: twice what the host maps.
const THREADS: u64 = 48;
const ROUNDS: u64 = 4;
const BLOCKS: u64 = (1 << 20) / BLOCK as u64;
/// Entries that the recorder takes, so that the record fits the console.
const RECORDED: u32 = 400;

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
            "dma-tight-nvme",
            "48 MiB of requests where the host maps 24: never wrong data, never a hang",
            tight_host,
            tight,
        ),
        case("dma-mac-record", "what the module's recorder writes, outboard fit reads", record_host, record),
    ]
}

fn tight_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let mut vm = host.start(&host.guest(Kernel::V6_12).devices(&assigned).cpus(4).memory_mib(1024))?;
    let errors = vm.note("errors", STEP)?;
    let failures = vm.note("failures", STEP)?;
    let evicted = vm.note("evicted", STEP)?;
    host.log(format!("{errors} I/O errors, {failures} refused mappings, {evicted} windows evicted"));
    host.log(format!("without room: {}", vm.note("pressure", STEP)?));
    vm.finish(STEP)?;
    assigned.release()?;
    Ok(None)
}

fn tight(guest: &mut Guest) -> Result<()> {
    guest.check_dma_myself();
    guest.need("nvme")?;
    let function = GuestFunction::the(NVME_CLASS)?;
    function.wait_driver("nvme")?;
    let disk = GuestDisk::direct("nvme0n1")?;
    let disk = &disk;
    let errors = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|index| scope.spawn(move || worker(disk, index, |round| round < ROUNDS)))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).sum::<Result<u64>>()
    })?;
    guest.note("errors", errors);
    let stats = Stats::read(&domains()?[0])?;
    guest.note("failures", stats.value("failed")?);
    guest.note("evicted", stats.value("evicted")?);
    ensure!(stats.value("evicted")? > 0, "there was no pressure:\n{}", stats.text);
    for key in ["unknown", "lost", "host_refused"] {
        ensure!(stats.value(key)? == 0, "{key}:\n{}", stats.text);
    }
    // The same with no room at all at times, and then with one request at a time.
    pressure::on_disk(guest, &function, "nvme")?;
    let disk = GuestDisk::of(&function)?;
    disk.write_pattern(Pattern(1), 0, 4 * BLOCKS)?;
    disk.check_pattern(Pattern(1), 0, 4 * BLOCKS)
}

fn record_host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let mut vm = host.start(&host.guest(Kernel::V6_12).devices(&assigned))?;
    let text = vm.note("record", STEP)?;
    vm.finish(STEP)?;
    assigned.release()?;
    let file = host.scratch("recorded.trace");
    fs::write(&file, text.as_str().context("the record is text")?)?;
    let path = file.to_str().context("a path of letters")?;
    outboard(&["fit", "--json", path]).context("outboard fit does not read the record")?;
    Ok(None)
}

fn record(guest: &mut Guest) -> Result<()> {
    let file = domains()?[0].join("record");
    fs::write(&file, RECORDED.to_string())?;
    // As programs do that open it for writing only; there is nothing to be at.
    let sought = fs::OpenOptions::new().write(true).open(&file)?.seek(SeekFrom::Start(1));
    ensure!(sought.is_err(), "a recorder that is only written was sought in");
    guest.need("nvme")?;
    GuestFunction::the(NVME_CLASS)?.wait_driver("nvme")?;
    let disk = GuestDisk::direct("nvme0n1")?;
    disk.write_pattern(Pattern(5), 0, 4 * BLOCKS)?;
    disk.check_pattern(Pattern(5), 0, 4 * BLOCKS)?;
    fs::write(&file, "0")?;
    let text = fs::read_to_string(&file)?;
    let of_kind = |kind: &str| text.lines().filter(|line| line.starts_with(kind)).count();
    ensure!(of_kind("m ") > 20 && of_kind("u ") > 10, "few calls were recorded: {text}");
    ensure!(
        text.lines().any(|line| line.starts_with("m ") && line.contains(',')),
        "no list was recorded: {text}"
    );
    guest.note("record", text);
    Ok(())
}
