//! The monitor on a terminal: raw while the guest runs, and as it was after every way out.

use crate::case::{Case, Group, HOST};
use crate::guest::Guest;
use crate::host::{ExitKind, Host, Kernel, RunningVm};
use crate::protocol::Vmm;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, Termios};
use std::process::Command;
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_secs(120);
/// Exit statuses of `outboard` (its `--help`).
const FAILED: ExitKind = ExitKind::Code(1);
const STOPPED_HARD: ExitKind = ExitKind::Code(4);
/// How long the shell's `sleep` would go on without Ctrl-C: longer than any wait here.
const SLEEP_S: u64 = 1000;

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "terminal",
        about: "keys, Ctrl-C, Ctrl-A x on a terminal; its settings come back, after SIGTERM and a failure too",
        limit_s: 600,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest: shell,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    if host.vmm() == Vmm::Qemu {
        return Ok(Some("it is about Outboard's use of the terminal".into()));
    }
    host.part("keys", keys(host));
    host.part("sigterm", sigterm(host));
    host.part("failure", failure(host));
    Ok(None)
}

/// A shell in the guest is used as a person would, and left with Ctrl-A x.
fn keys(host: &Host) -> Result<()> {
    let mut vm = host.start(&host.guest(Kernel::V6_12).terminal())?;
    vm.note("ready", STEP)?;
    ensure_raw(&vm)?;
    vm.type_text("echo hi-$((1+1))\r")?;
    vm.console_line("hi-2", STEP)?;
    // Printed by the process that Ctrl-C must reach: it has the terminal by then.
    vm.type_text(&format!("sh -c 'echo start-$((1+2)); exec sleep {SLEEP_S}'\r"))?;
    vm.console_line("start-3", STEP)?;
    vm.type_text("\x03echo after-$((2+2))\r")?;
    vm.console_line("after-4", STEP).context("Ctrl-C did not end the guest's sleep")?;
    vm.type_text("\x01x")?;
    ensure_end(&mut vm, STOPPED_HARD)
}

/// A guest that does not react to its power key, and two SIGTERMs.
fn sigterm(host: &Host) -> Result<()> {
    let mut vm = host.start(&host.guest(Kernel::V6_12).terminal())?;
    vm.note("ready", STEP)?;
    ensure_raw(&vm)?;
    vm.signal(Signal::SIGTERM)?;
    std::thread::sleep(Duration::from_millis(500));
    vm.signal(Signal::SIGTERM)?;
    ensure_end(&mut vm, STOPPED_HARD)
}

/// A machine that cannot be built.
fn failure(host: &Host) -> Result<()> {
    let mut spec = host.guest(Kernel::V6_12).memory_mib(256).terminal();
    spec.initrd = host.raw_image("large", 300)?;
    let mut vm = host.start(&spec)?;
    ensure_end(&mut vm, FAILED)?;
    ensure!(vm.stderr().contains("initrd"), "the message is {:?}", vm.stderr());
    Ok(())
}

/// Raw: keys go to the guest one by one, unechoed, and none of them is a signal.
fn ensure_raw(vm: &RunningVm) -> Result<()> {
    let cooked = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
    let left = vm.terminal()?.1.local_flags & cooked;
    ensure!(left.is_empty(), "the terminal is not raw while the guest runs: {left:?}");
    Ok(())
}

fn ensure_end(vm: &mut RunningVm, wanted: ExitKind) -> Result<()> {
    let start = Instant::now();
    let exit = vm.exit(Duration::from_secs(30))?;
    ensure!(exit == wanted, "{exit:?} instead of {wanted:?} after {:?}; {}", start.elapsed(), vm.stderr());
    let (before, after) = vm.terminal()?;
    let (before, after) = (settings(&before), settings(&after));
    ensure!(after == before, "the terminal was {before} and is now {after}");
    Ok(())
}

/// What the kernel keeps of a terminal's settings. It has 19 control characters, the C library's structure more, and unused.
fn settings(termios: &Termios) -> String {
    let Termios { input_flags, output_flags, control_flags, local_flags, control_chars, .. } = termios;
    let keys = &control_chars[..19];
    format!("{input_flags:?} {output_flags:?} {control_flags:?} {local_flags:?} {keys:?}")
}

fn shell(guest: &mut Guest) -> Result<()> {
    guest.note("ready", true);
    // A session of its own with the console as its terminal, so that Ctrl-C is a signal.
    let status = Command::new("/bin/busybox")
        .args(["setsid", "-c", "/bin/busybox", "sh"])
        .env("PATH", "/bin")
        .env("PS1", "guest# ")
        .status()?;
    ensure!(status.success(), "the shell ended with {status}");
    Ok(())
}
