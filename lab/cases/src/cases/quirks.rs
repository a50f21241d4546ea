//! The quirks of the guest's module, each in guests with Debian's 6.1 and 6.12 kernels and no device at all.
#![allow(unsafe_code)] // UNSAFETY: prctl, whose options here no safe wrapper has.

use crate::case::{Case, Group, HOST};
use crate::guest::{Guest, busybox};
use crate::host::{Host, INITRD_DMA, Kernel};
use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::fs;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(150);
const MODULE: &str = "outboard_dma";

pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, guest| Case {
        name,
        about,
        limit_s: 400,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest,
    };
    vec![
        case(
            "quirk-uvm",
            "requests of a stand-in for NVIDIA's UVM, which comes before and after the module, goes and comes back",
            uvm,
        ),
        case(
            "quirk-tso",
            "prctl(PR_SET_MEM_MODEL) with a pretended TSO bit on all CPUs, on some, and on one that comes later",
            tso,
        ),
        case(
            "quirk-dczva",
            "the kernel's and modules' DC ZVA rewritten and put back, memset and clear_page right throughout",
            dczva,
        ),
    ]
}

fn host(host: &Host) -> Result<Option<String>> {
    for kernel in [Kernel::V6_1, Kernel::V6_12] {
        let mut spec = host.guest(kernel).cpus(2);
        spec.initrd.set_file_name(INITRD_DMA);
        let run = || host.start(&spec)?.finish(STEP);
        host.part(kernel.name(), run());
    }
    Ok(None)
}

fn load(name: &str, parameters: &[&str]) -> Result<()> {
    let file = format!("/lib/modules/{name}.ko");
    busybox(&[&["insmod", &file], parameters].concat()).map(drop)
}

fn unload(name: &str) -> Result<()> {
    busybox(&["rmmod", name]).map(drop)
}

/// A parameter of a loaded module.
fn parameter(module: &str, name: &str) -> Result<String> {
    let path = format!("/sys/module/{module}/parameters/{name}");
    Ok(fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?.trim().to_owned())
}

/// What the module says of a quirk; it must begin with `state`.
fn says(quirk: &str, state: &str) -> Result<()> {
    let all = parameter(MODULE, "quirks")?;
    let line = all.lines().find_map(|line| line.strip_prefix(quirk)?.strip_prefix(": "));
    let line = line.with_context(|| format!("the module says nothing of {quirk}: {all}"))?;
    ensure!(line.starts_with(state), "{quirk} should be '{state}', the module says '{line}'");
    Ok(())
}

const UVM: &str = "outboard_test_uvm";
const LARGE: u64 = 2 << 20;

/// One call of the stand-in's: (length, page size, alignment, offset) in; page size afterwards and whether it succeeded.
fn uvm_call(length: u64, page: u64, alignment: u64, offset: u64) -> Result<(u64, bool)> {
    let words = [("length", length), ("page", page), ("alignment", alignment), ("offset", offset)];
    let words = words.map(|(name, value)| format!("{name}={value}"));
    load(UVM, &words.iter().map(String::as_str).collect::<Vec<_>>())?;
    let (after, status) = (parameter(UVM, "after")?, parameter(UVM, "status")?);
    unload(UVM)?;
    let after: Vec<u64> = after.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let [offset_after, page_after, alignment_after, rest] = after[..] else {
        anyhow::bail!("not four values: {after:?}")
    };
    ensure!(
        (offset_after, alignment_after, rest) == (offset, alignment, 1),
        "something else was changed: {after:?}"
    );
    Ok((page_after, status == "0"))
}

/// Large requests are changed, others are not.
fn uvm_works() -> Result<()> {
    for page in [64 << 10, LARGE] {
        ensure!(
            uvm_call(4 << 20, page, 0, 0)? == (0, true),
            "a request for pages of {page} bytes was not changed"
        );
    }
    for page in [0, 4096] {
        ensure!(
            uvm_call(4 << 20, page, 4096, 0)? == (page, true),
            "a request for pages of {page} bytes was changed"
        );
    }
    Ok(())
}

fn uvm(_: &mut Guest) -> Result<()> {
    // Without the quirk it is as NVIDIA's driver has it: no second try.
    load("nvidia", &[])?;
    ensure!(uvm_call(LARGE, LARGE, 0, 0)? == (LARGE, false), "the stand-in does not do what it stands for");
    // Nothing is served here, so nobody needs it.
    load(MODULE, &[])?;
    says("uvm", "off: no function of NVIDIA's is served")?;
    ensure!(uvm_call(LARGE, LARGE, 0, 0)? == (LARGE, false), "a quirk that nobody needs works");
    unload(MODULE)?;
    // The driver is there first; goes; comes back.
    load(MODULE, &["quirk_uvm=1"])?;
    says("uvm", "on")?;
    uvm_works()?;
    for _ in 0..3 {
        unload("nvidia")?;
        says("uvm", "waits")?;
        load("nvidia", &[])?;
        says("uvm", "on")?;
        uvm_works()?;
    }
    ensure!(parameter(MODULE, "uvm_changed")? == "8", "not 8 requests were changed");
    unload(MODULE)?;
    ensure!(uvm_call(LARGE, LARGE, 0, 0)? == (LARGE, false), "the quirk outlived its module");
    unload("nvidia")?;
    // The module is there first.
    load(MODULE, &["quirk_uvm=1"])?;
    says("uvm", "waits")?;
    load("nvidia", &[])?;
    says("uvm", "on")?;
    uvm_works()?;
    // What is not as known is left alone, and ends it after five.
    load(UVM, &["length=4194304", "page=2097152", "wild=24"])?;
    unload(UVM)?;
    for (page, alignment, offset) in [(LARGE, 0, 4096), (3, 0, 0), (LARGE, 3, 0)] {
        let left = uvm_call(4 << 20, page, alignment, offset)?;
        ensure!(left.0 == page, "a strange request was changed to {}", left.0);
    }
    uvm_works()?;
    ensure!(uvm_call(4096, LARGE, 0, 0)?.0 == LARGE, "a page larger than the request was changed");
    ensure!(uvm_call(LARGE, LARGE, 0, 0)? == (LARGE, false), "five strange requests did not end it");
    unload(MODULE)?;
    unload("nvidia")?;
    // Not wanted.
    load("nvidia", &[])?;
    load(MODULE, &["quirk_uvm=0"])?;
    says("uvm", "off: by parameter")?;
    ensure!(uvm_call(LARGE, LARGE, 0, 0)? == (LARGE, false), "the quirk works although it is off");
    unload(MODULE)
}

const GET: i32 = 0x6d4d_444c;
const SET: i32 = 0x4d4d_444c;
const DEFAULT: u64 = 0;
const TSO: u64 = 1;

/// Success with a value, or the error's number.
fn prctl(option: i32, arguments: [u64; 4]) -> Result<i32, i32> {
    let [a, b, c, d] = arguments;
    // SAFETY: these options take numbers and write nowhere.
    let answer = unsafe { nix::libc::prctl(option, a, b, c, d) };
    if answer < 0 { Err(nix::errno::Errno::last_raw()) } else { Ok(answer) }
}

/// As the kernel has it: it knows neither.
fn unknown() -> Result<()> {
    for (option, argument) in [(GET, 0), (SET, DEFAULT), (SET, TSO)] {
        let answer = prctl(option, [argument, 0, 0, 0]);
        ensure!(
            answer == Err(nix::libc::EINVAL),
            "prctl {option:#x} with {argument}: {answer:?} instead of EINVAL"
        );
    }
    Ok(())
}

/// As Asahi's kernel has it, and nothing else is.
fn known() -> Result<()> {
    for (option, argument) in [(GET, 0), (SET, DEFAULT), (SET, TSO), (GET, 0)] {
        let answer = prctl(option, [argument, 0, 0, 0]);
        ensure!(answer == Ok(0), "prctl {option:#x} with {argument}: {answer:?} instead of 0");
    }
    let wrong = [
        (SET, [2, 0, 0, 0]),
        (SET, [u64::MAX, 0, 0, 0]),
        (SET, [TSO, 1, 0, 0]),
        (SET, [TSO, 0, 0, 1]),
        (GET, [1, 0, 0, 0]),
        (GET, [0, 0, 1, 0]),
        (0x6d4d_444d, [0; 4]),
        (-1, [0; 4]),
    ];
    for (option, arguments) in wrong {
        let answer = prctl(option, arguments);
        ensure!(
            answer == Err(nix::libc::EINVAL),
            "prctl {option:#x} {arguments:?}: {answer:?} instead of EINVAL"
        );
    }
    // An option of the kernel's own.
    ensure!(prctl(nix::libc::PR_GET_DUMPABLE, [0; 4]).is_ok(), "an option of the kernel's own does not work");
    Ok(())
}

/// From several threads at once; beyond 32 calls at a time the kernel may answer for itself.
fn storm() -> Result<()> {
    let threads: Vec<_> = (0..8)
        .map(|_| std::thread::spawn(|| (0..2000).filter(|_| prctl(SET, [TSO, 0, 0, 0]) != Ok(0)).count()))
        .collect();
    let refused: usize = threads.into_iter().map(|thread| thread.join().unwrap_or(usize::MAX)).sum();
    ensure!(refused == 0, "{refused} of 16,000 calls from 8 threads were refused");
    Ok(())
}

fn set_online(cpu: u32, online: bool) -> Result<()> {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
    fs::write(&path, if online { "1" } else { "0" }).with_context(|| format!("cannot write {path}"))
}

fn tso(_: &mut Guest) -> Result<()> {
    unknown()?;
    // Nothing is served here, so nobody needs it.
    load(MODULE, &["test_tso_cpus=2"])?;
    says("tso", "off: no function is served")?;
    unknown()?;
    unload(MODULE)?;
    // These CPUs do not have it: off.
    load(MODULE, &["quirk_tso=1"])?;
    says("tso", "off: not every CPU")?;
    unknown()?;
    unload(MODULE)?;
    // One of two has it: off.
    load(MODULE, &["quirk_tso=1", "test_tso_cpus=1"])?;
    says("tso", "off: not every CPU")?;
    unknown()?;
    unload(MODULE)?;
    // Both.
    load(MODULE, &["quirk_tso=1", "test_tso_cpus=2"])?;
    says("tso", "on: FOR TESTS ONLY")?;
    known()?;
    storm()?;
    unload(MODULE)?;
    unknown()?;
    // All that are there have it, then one comes that does not.
    set_online(1, false)?;
    load(MODULE, &["quirk_tso=1", "test_tso_cpus=1"])?;
    says("tso", "on")?;
    known()?;
    set_online(1, true)?;
    unknown()?;
    unload(MODULE)?;
    load(MODULE, &["test_tso_cpus=2", "quirk_tso=0"])?;
    says("tso", "off: by parameter")?;
    unknown()?;
    unload(MODULE)
}

const ZVA: &str = "outboard_test_zva";

/// Three numbers of a parameter of the test module.
fn numbers(name: &str) -> Result<[u64; 3]> {
    let text = parameter(ZVA, name)?;
    let numbers: Vec<u64> = text.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    numbers.try_into().map_err(|_| anyhow::anyhow!("{name} is not three numbers: {text}"))
}

fn clears() -> Result<()> {
    let answer = parameter(ZVA, "clears")?;
    ensure!(answer.starts_with("good "), "memory is not cleared as it should be: {answer}");
    Ok(())
}

/// The same on one CPU.
fn clears_on(cpu: usize) -> Result<()> {
    let pinned = std::thread::spawn(move || {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
        clears()
    });
    pinned.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
}

fn dczva(_: &mut Guest) -> Result<()> {
    load(ZVA, &[])?;
    let [questions, answers, zvas] = numbers("kernel")?;
    let own = numbers("own")?;
    ensure!(questions > 2 && answers == 0 && zvas > 0, "the kernel has {questions} {answers} {zvas}");
    ensure!(
        own == [4, 1, 0],
        "the test module's own code reads {own:?} (the CPU's blocks should have 64 bytes)"
    );
    clears()?;
    // Where no AMD GPU is served it is off by itself.
    load(MODULE, &[])?;
    says("dczva", "off: no AMD GPU is served")?;
    unload(MODULE)?;
    for round in 0..3 {
        load(MODULE, &["quirk_dczva=1"])?;
        says("dczva", "on")?;
        let now = numbers("kernel")?;
        ensure!(
            now[1] > 0 && now[0] + now[1] == questions && now[2] == zvas,
            "rewritten: {now:?} of {questions}"
        );
        // Two readers stay: the table of CPU features and its twin for programs.
        ensure!(now[0] == 2, "{} other readers of the register", now[0]);
        ensure!(numbers("own")? == [16, 0, 4], "a module that was there first is not rewritten");
        clears()?;
        if round == 1 {
            // One that comes later; its code is forgotten when it goes.
            for _ in 0..3 {
                unload(ZVA)?;
                load(ZVA, &[])?;
                ensure!(numbers("own")? == [16, 0, 4], "a module that came later is not rewritten");
                clears()?;
            }
        }
        unload(MODULE)?;
        ensure!(
            numbers("kernel")? == [questions, 0, zvas],
            "the kernel is not as it was: {:?}",
            numbers("kernel")?
        );
        ensure!(numbers("own")? == own, "the test module is not as it was: {:?}", numbers("own")?);
        clears()?;
    }
    // A CPU that comes later runs what was rewritten while it was away, and what is put back.
    set_online(1, false)?;
    load(MODULE, &["quirk_dczva=1"])?;
    set_online(1, true)?;
    clears_on(1)?;
    set_online(1, false)?;
    unload(MODULE)?;
    set_online(1, true)?;
    clears_on(1)?;
    // The module goes after one that it rewrote.
    load(MODULE, &["quirk_dczva=1"])?;
    unload(ZVA)?;
    unload(MODULE)?;
    load(ZVA, &[])?;
    ensure!(numbers("kernel")? == [questions, 0, zvas] && numbers("own")? == own, "not as it was");
    clears()
}
