//! The conformance suite of the hypervisor layer, on the emulated host's KVM.

use crate::case::{Case, Group, HOST};
use crate::host::{Host, SHARE};
use crate::protocol::{Event, Outcome};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// A line of `hv-conformance --json`.
#[derive(Deserialize)]
struct Line {
    case: String,
    result: String,
    reason: Option<String>,
}

/// What it prints before it interrupts a case that hangs.
#[derive(Deserialize)]
struct Hang {
    hangs: String,
}

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "hv-conformance",
        about: "hand-assembled guest programs on the hypervisor back end; registers and exits compared",
        limit_s: 900,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest: |_| bail!("this case boots no Linux"),
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    let program = Path::new(SHARE).join("bin/hv-conformance");
    let mut child = Command::new(program)
        .arg("--json")
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start hv-conformance")?;
    let output = child.stdout.take().expect("stdout is piped");
    let mut count = 0;
    for line in BufReader::new(output).lines() {
        // The last line has the counts, which are made here.
        let line = line?;
        if let Ok(Hang { hangs }) = serde_json::from_str(&line) {
            // The suite gives a few seconds for this.
            host.describe_stuck(child.id(), &hangs);
            host.log(format!("{hangs} hangs: {}-{hangs}.stuck.log says where", host.case()));
        }
        let Ok(line) = serde_json::from_str::<Line>(&line) else { continue };
        count += 1;
        let reason = line.reason.unwrap_or_default();
        let outcome = match line.result.as_str() {
            "ok" => Outcome::Passed,
            "skipped" => Outcome::Skipped(reason),
            _ => Outcome::Failed(reason),
        };
        host.send(&Event::Part { name: line.case, outcome });
    }
    let status = child.wait()?;
    ensure!(count > 0, "hv-conformance ran no case ({status})");
    if status.code().is_none() {
        // The kernel says where a program was that a fault ended (debug.exception-trace).
        let said = Command::new("/bin/busybox").args(["dmesg"]).output().context("dmesg")?;
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        let lines: Vec<&str> = said.lines().rev().take(40).collect();
        host.log(lines.into_iter().rev().collect::<Vec<_>>().join("\n"));
    }
    // Failed cases count by themselves; this is for a suite that broke down.
    ensure!(matches!(status.code(), Some(0 | 1)), "hv-conformance ended with {status}");
    Ok(None)
}
