//! A real PCI device of the emulated host in the guest, driven by a stock driver, behind the SMMU.

use crate::case::{Case, Group};
use crate::data::{BLOCK, Pattern};
use crate::guest::Guest;
use crate::guest::disk::GuestDisk;
use crate::host::{Host, Kernel, outboard_path};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(180);
/// Blocks written in the guest: 16 MiB.
const BLOCKS: u64 = (16 << 20) / BLOCK as u64;
/// PCI class of an NVMe controller.
const NVME_CLASS: &str = "0x010802";
const PATTERN: Pattern = Pattern(77);

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "passthrough-nvme",
        about: "the stock nvme driver on the host's own NVMe disk: data, MSI-X, two processes, no IOMMU fault",
        limit_s: 400,
        group: Group::Test,
        host,
        guest,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    let Some(address) = find_nvme()? else { bail!("the emulated host has no NVMe disk") };
    outboard(&["devices", "bind", &address])?;
    // The second process finds what the first one's guest wrote: the device came back whole.
    for stage in ["write", "check"] {
        let spec = host.guest(Kernel::V6_12).cpus(2).arg("stage", stage).extra(&["--device", &address]);
        let mut vm = host.start(&spec)?;
        let interrupts = vm.note("interrupts", STEP)?.as_u64().context("a number of interrupts")?;
        ensure!(interrupts > 0, "no MSI-X interrupt arrived in the guest");
        vm.finish(STEP)?;
        host.fact("device", json!({ "address": address, "driver": "nvme", "interrupts": interrupts }));
    }
    outboard(&["devices", "release", &address])?;
    let faults = smmu_faults()?;
    ensure!(faults.is_empty(), "the IOMMU reported faults: {faults:?}");
    Ok(None)
}

/// The NVMe controller's address, from sysfs.
fn find_nvme() -> Result<Option<String>> {
    for entry in fs::read_dir("/sys/bus/pci/devices")?.flatten() {
        let class = fs::read_to_string(entry.path().join("class")).unwrap_or_default();
        if class.trim() == NVME_CLASS {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

fn outboard(args: &[&str]) -> Result<()> {
    let output = Command::new(outboard_path()).args(args).output().context("cannot start outboard")?;
    ensure!(output.status.success(), "outboard {}: {}", args.join(" "), crate::host::describe(&output));
    Ok(())
}

/// Lines of the kernel's log in which the SMMU reports an event (a translation fault and the like).
fn smmu_faults() -> Result<Vec<String>> {
    let log = crate::guest::busybox(&["dmesg"])?;
    let fault = |line: &&str| line.contains("arm-smmu-v3") && line.contains("event");
    // "allocated N entries for evtq" at start is no event.
    Ok(log.lines().filter(fault).filter(|line| !line.contains("allocated")).map(str::to_owned).collect())
}

fn guest(guest: &mut Guest) -> Result<()> {
    guest.need("nvme")?;
    let disk = GuestDisk::nvme()?;
    if guest.arg("stage")? == "write" {
        disk.write_pattern(PATTERN, 0, BLOCKS)?;
        disk.flush()?;
    }
    disk.check_pattern(PATTERN, 0, BLOCKS)?;
    guest.note("interrupts", interrupts()?);
    Ok(())
}

/// Interrupts of the driver's queues so far.
fn interrupts() -> Result<u64> {
    let table = fs::read_to_string("/proc/interrupts")?;
    let of_nvme = table.lines().filter(|line| line.contains("MSIX") && line.contains("nvme"));
    let numbers =
        of_nvme.flat_map(|line| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()));
    ensure!(Path::new("/sys/class/nvme/nvme0").exists(), "the driver shows no controller");
    Ok(numbers.sum())
}
