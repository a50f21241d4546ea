//! `outboard record` on the emulated host: its own NVMe disk behind the SMMU, a kernel with `dma:*` events.

use crate::case::{Case, Group, HOST_OF_DMA};
use crate::guest::{Guest, busybox, wait_for};
use crate::host::{Host, describe, outboard_path};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

const TRACEFS: &str = "/sys/kernel/tracing";
const DISK: &str = "/dev/nvme0n1";
/// What each pass reads of the disk.
const BYTES: u64 = 48 << 20;
/// From the disk, not from memory.
const READ: &str = "echo 3 > /proc/sys/vm/drop_caches; head -c 50331648 /dev/nvme0n1 > /dev/null";

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "record",
        about: "DMA of the host's own NVMe disk recorded and read by fit; every failure, signals, lost events, nothing left behind",
        limit_s: 300,
        host_kernel: HOST_OF_DMA,
        group: Group::Test,
        host,
        guest,
    }]
}

fn guest(_: &mut Guest) -> Result<()> {
    bail!("this case has no guest")
}

fn host(host: &Host) -> Result<Option<String>> {
    host.need("nvme")?;
    wait_for("NVMe disk", Duration::from_secs(20), || Path::new(DISK).exists().then_some(()))?;
    let device = fs::canonicalize("/sys/class/nvme/nvme0/device")?;
    let device = device.file_name().context("the device has a name")?.to_string_lossy().into_owned();
    if !Path::new(TRACEFS).join("events").exists() {
        expect(&record(host, &[], "true")?, 125, "no tracefs is mounted; as root, run: mount -t tracefs")?;
        busybox(&["mount", "-t", "tracefs", "nodev", TRACEFS])?;
    }
    let result = with_tracefs(host, &device);
    busybox(&["umount", TRACEFS])?;
    result.map(|()| None)
}

fn with_tracefs(host: &Host, device: &str) -> Result<()> {
    disk_is_recorded(host, device)?;
    failures(host)?;
    signals(host)?;
    losses(host)
}

/// `outboard record ARGS -- sh -c SCRIPT`, into `x.trace`.
fn record(host: &Host, args: &[&str], script: &str) -> Result<Output> {
    command(host, args, &["/bin/busybox", "sh", "-c", script]).output().context("cannot start outboard")
}

fn command(host: &Host, args: &[&str], words: &[&str]) -> Command {
    let mut command = Command::new(outboard_path());
    command.arg("record").arg("-o").arg(host.scratch("x.trace")).args(args).arg("--").args(words);
    command
}

/// Its status and what it must say; and nothing may be left switched on.
fn expect(output: &Output, status: i32, words: &str) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(status), "not status {status}: {}", describe(output));
    ensure!(said.contains(words), "it should say '{words}': {}", describe(output));
    let left = instances();
    ensure!(left.is_empty(), "tracing instances are left: {left:?}");
    Ok(())
}

fn instances() -> Vec<String> {
    let entries = fs::read_dir(Path::new(TRACEFS).join("instances")).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn disk_is_recorded(host: &Host, device: &str) -> Result<()> {
    expect(&record(host, &["--device", device], READ)?, 0, " events recorded in ")?;
    let text = fs::read_to_string(host.scratch("x.trace"))?;
    let mapped = mapped(&text, device)?;
    ensure!(mapped >= BYTES, "{BYTES} bytes were read, but only {mapped} mapped");
    ensure!(text.contains("# lost 0 events"), "the trace does not say that nothing was lost");
    let output =
        Command::new(outboard_path()).args(["fit", "--json"]).arg(host.scratch("x.trace")).output()?;
    ensure!(output.status.success(), "outboard fit: {}", describe(&output));
    let report: Value = serde_json::from_slice(&output.stdout)?;
    for policy in ["adaptive", "fixed-256k", "none"] {
        let row = &report["policies"][policy];
        let live = row["peak_live_bytes"].as_u64().unwrap_or(0);
        ensure!(row["fits"] == true && (4096..BYTES).contains(&live), "{policy}: {row}");
    }
    host.fact("record", format!("{mapped} bytes in {} events", text.lines().count()));
    Ok(())
}

/// Bytes that all mappings of a trace have together. Every one of `device`.
fn mapped(text: &str, device: &str) -> Result<u64> {
    let mut bytes = 0;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        ensure!(line.contains(&format!(": {device} ")), "another device: {line}");
        let field = |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name));
        if line.contains(": dma_map_sg: ") {
            let list = field("sizes=").context("a list has sizes")?.trim_matches(['{', '}']);
            for size in list.split(',') {
                bytes += u64::from_str_radix(size.trim_start_matches("0x"), 16)?;
            }
        } else if line.contains(": dma_map_p") {
            bytes += field("size=").context("a mapping has a size")?.parse::<u64>()?;
        }
    }
    Ok(bytes)
}

fn failures(host: &Host) -> Result<()> {
    expect(&record(host, &[], "exit 7")?, 7, "events recorded")?;
    expect(&record(host, &[], "kill -9 $$")?, 137, "events recorded")?;
    expect(&record(host, &["--device", "ff:1f.7"], "true")?, 125, "there is no PCI device 0000:ff:1f.7")?;
    let missing = command(host, &[], &["no-such-program"]).output()?;
    expect(&missing, 127, "command not found: no-such-program")?;
    let folder = command(host, &[], &["/proc"]).output()?;
    expect(&folder, 126, "cannot run /proc")?;
    let mut unwritable = Command::new(outboard_path());
    unwritable.args(["record", "-o", "/proc/nothing/x", "--", "/bin/busybox", "true"]);
    expect(&unwritable.output()?, 125, "cannot write the trace /proc/nothing/x")
}

/// It ends with its command, and a killed one's remains go with the next.
fn signals(host: &Host) -> Result<()> {
    for (signal, status) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
        let script = format!("kill -{signal} $PPID; exec /bin/busybox sleep 100");
        expect(&record(host, &[], &script)?, status, "events recorded")?;
    }
    // A second one ends even what does not listen.
    let stubborn = "trap '' TERM; kill -TERM $PPID; sleep 1; kill -TERM $PPID; while :; do sleep 1; done";
    expect(&record(host, &[], stubborn)?, 137, "events recorded")?;
    let killed = record(host, &[], "kill -KILL $PPID")?;
    ensure!(killed.status.code().is_none(), "not killed: {}", describe(&killed));
    ensure!(instances().len() == 1, "a killed recording leaves its instance: {:?}", instances());
    expect(&record(host, &[], "true")?, 0, "events recorded")
}

/// The recording is stopped while the disk is read: the kernel's buffers run over, and that is said everywhere.
fn losses(host: &Host) -> Result<()> {
    let passes = format!(
        "kill -STOP $PPID; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do {READ}; done; kill -CONT $PPID"
    );
    expect(&record(host, &["--buffer", "1"], &passes)?, 125, "were lost")?;
    let output = Command::new(outboard_path()).arg("fit").arg(host.scratch("x.trace")).output()?;
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(table.contains("the recording lost "), "fit does not say that events were lost: {table}");
    Ok(())
}
