//! The lab's one program inside: init of the emulated host, init of every guest, and both halves of the cases.
//!
//! Which of them it is follows from how it is started: as process 1 with `lab.role=host` on the kernel's command line it
//! is the emulated host's init; as process 1 otherwise, a guest's; as `… case NAME MONITOR`, a case's host half; under
//! the name `udhcpc-hook`, what the DHCP client calls.

#![allow(clippy::print_stdout, clippy::print_stderr)] // A developer's tool: nothing runs on after its output has failed.

mod guest;
mod host;
mod mounts;

use anyhow::{Result, bail};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = if std::process::id() == 1 { run_init() } else { run_program(&words) };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_init() -> Result<()> {
    // Before anything else: the benchmarks measure the time up to this line.
    guest::announce();
    mounts::basic()?;
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    if cmdline.split_whitespace().any(|word| word == "lab.role=host") {
        host::init()
    } else {
        guest::init(&cmdline)
    }
}

fn run_program(words: &[&str]) -> Result<()> {
    match words {
        [name, event, ..] if name.ends_with("udhcpc-hook") => lab_cases::guest::net::dhcp_hook(event),
        [_, "case", name, monitor] => host::run_case(name, monitor),
        _ => bail!("this is the inside of the lab; start it with `cargo xtask lab`"),
    }
}
