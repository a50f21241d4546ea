//! The command: started, watched, its status passed on.

use crate::Args;
use crate::error::Error;
use crate::recording::Recording;
use crate::tracefs::{self, Instance, Lost};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgrp, tcgetpgrp};
use outboard_cli::say;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

/// How often buffers are emptied and signals looked at.
const ROUND: Duration = Duration::from_millis(50);
/// After the command has ended: for what its drivers still take down.
const SETTLE: Duration = Duration::from_millis(300);
/// Status where recording failed or lost events.
const FAILED: u8 = 125;

/// `outboard record`: the status to exit with, and one line about the recording on standard error.
///
/// # Errors
/// [`Error`] where nothing was recorded; its [`Error::status`] is the status to exit with.
pub fn run(args: &Args) -> Result<u8, Error> {
    if !cfg!(target_os = "linux") {
        return Err(Error::NotLinux);
    }
    if let Some(device) = &args.device {
        device_exists(device)?;
    }
    // Before anything is switched on: from here on a signal ends the command, and us in good order.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(Error::Signals)?;
    let instance = Instance::new(args.device.as_deref(), args.buffer)?;
    let mut recording = Recording::open(&args.output)?;
    let (status, lost) = record(args, &instance, &mut recording, &mut signals)?;
    // The file says it too: whoever gets it later must know.
    recording.comment(&format!("lost {} events", lost.0 + recording.damaged))?;
    recording.flush()?;
    Ok(report(args, &instance, &recording, lost, status))
}

fn record(
    args: &Args,
    instance: &Instance,
    recording: &mut Recording,
    signals: &mut Signals,
) -> Result<(ExitStatus, Lost), Error> {
    let mut buffers = instance.buffers()?;
    let Instance { layout, printers, .. } = instance;
    instance.switch(true)?;
    let mut child = start(args)?;
    if let Err(error) = begin(args, recording) {
        end(&mut child);
        return Err(error);
    }
    let mut asked = false;
    let status = loop {
        for signal in signals.pending() {
            pass_on(&child, signal, asked);
            asked = true;
        }
        if let Err(error) = recording.round(layout, printers, &mut buffers) {
            end(&mut child);
            return Err(error);
        }
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => std::thread::sleep(ROUND),
            Err(source) => return Err(Error::NotRunnable { command: name(args), source }),
        }
    };
    std::thread::sleep(SETTLE);
    instance.switch(false)?;
    for _ in 0..2 {
        recording.round(layout, printers, &mut buffers)?;
    }
    recording.finish()?;
    Ok((status, instance.lost()?))
}

/// Overwrites the file only now, when there is a command to record.
fn begin(args: &Args, recording: &mut Recording) -> Result<(), Error> {
    let command: Vec<_> = args.command.iter().map(|word| word.to_string_lossy()).collect();
    recording.begin()?;
    recording.comment(&format!("outboard record, Linux {}", tracefs::release()))?;
    recording.comment(&format!("command: {}", command.join(" ").replace('\n', " ")))
}

/// Ends a command whose recording cannot go on, with a full disk, say: it must not outlive that unseen.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn name(args: &Args) -> String {
    args.command.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn start(args: &Args) -> Result<Child, Error> {
    let mut words = args.command.iter();
    let program = words.next().ok_or_else(|| Error::NotFound(String::new()))?;
    Command::new(program).args(words).spawn().map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::NotFound(name(args)),
        _ => Error::NotRunnable { command: name(args), source },
    })
}

/// Passes a signal on to the command; the second one of any kind kills it. Ctrl-C reaches it by itself where both are in the
/// terminal's foreground, and twice would be once too often.
fn pass_on(child: &Child, signal: i32, again: bool) {
    let signal = match (again, Signal::try_from(signal)) {
        (true, _) => Signal::SIGKILL,
        (false, Ok(Signal::SIGINT)) if in_foreground() => return,
        (false, signal) => signal.unwrap_or(Signal::SIGTERM),
    };
    if let Ok(pid) = i32::try_from(child.id()) {
        // Not waited for yet, so the number is still the command's.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn in_foreground() -> bool {
    let foreground = fs::File::open("/dev/tty").ok().and_then(|tty| tcgetpgrp(&tty).ok());
    foreground == Some(getpgrp())
}

fn report(args: &Args, instance: &Instance, recording: &Recording, lost: Lost, status: ExitStatus) -> u8 {
    let (file, events) = (args.output.display(), recording.events);
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(FAILED),
        (None, signal) => u8::try_from(128 + signal.unwrap_or(0)).unwrap_or(FAILED),
    };
    if lost.0 + recording.damaged > 0 {
        let more = instance.buffer_mib.saturating_mul(4).min(4096);
        say!(
            "outboard: {events} events recorded in {file}, but {} were lost ({} because the kernel's buffers of {} MiB a CPU \
             were full, {} unreadable): the trace is incomplete; record again with --buffer {more}",
            lost.0 + recording.damaged,
            lost.0,
            instance.buffer_mib,
            recording.damaged,
        );
        return if code == 0 { FAILED } else { code };
    }
    let hint = match (events, &args.device) {
        (0, Some(device)) => {
            format!(": {device} was not used; `outboard record` without --device shows what was")
        }
        (0, None) => ": no driver mapped anything while the command ran".to_owned(),
        _ => format!("; see: outboard fit {file}"),
    };
    say!("outboard: {events} events recorded in {file}{hint}");
    code
}

/// A device that does not exist would give an empty trace without a word.
fn device_exists(device: &str) -> Result<(), Error> {
    let devices = std::path::Path::new("/sys/bus/pci/devices");
    if devices.join(device).exists() {
        return Ok(());
    }
    // PCI base class 3: displays and GPUs.
    let is_display = |class: &str| class.starts_with("0x03");
    let displays: Vec<String> = fs::read_dir(devices)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| fs::read_to_string(entry.path().join("class")).is_ok_and(|class| is_display(&class)))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let there = if displays.is_empty() {
        "the machine has no GPU; `ls /sys/bus/pci/devices` lists all devices".to_owned()
    } else {
        format!("the machine's GPUs are: {}", displays.join(", "))
    };
    Err(Error::NoDevice { device: device.to_owned(), there })
}
