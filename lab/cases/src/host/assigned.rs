//! Devices of the emulated host on their way into a guest and back, and what the kernel still holds of them.

use super::{Port, describe, outboard_path};
use crate::guest::{busybox, wait_for};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// How a guest's device finds the guest's memory. Every case with a device runs with each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dma {
    /// All of guest memory mapped one to one.
    Identity,
    /// Under a Mac's limits: the guest asks for each mapping.
    Mac,
    /// The same for a guest without the module, with this layout of the published protocol (`a` or `b`).
    Bare(&'static str),
    /// The same with limits so small that drivers meet them: 24 MiB in 666 mappings, a Mac's divided by 64 and by about 100.
    Tight,
}

/// Names of cases that run with [`Dma::Mac`] begin so.
const DMA_MAC: &str = "dma-mac-";
/// The same for [`Dma::Tight`].
const DMA_TIGHT: &str = "dma-tight-";

impl Dma {
    /// The one that a case's name asks for.
    pub fn of(case: &str) -> Self {
        match case {
            _ if case.starts_with(DMA_MAC) || case == "bench-dma" => Self::Mac,
            _ if case.starts_with(DMA_TIGHT) => Self::Tight,
            _ => Self::Identity,
        }
    }

    /// The value of `--device` for `slot`.
    pub fn device(self, slot: &str) -> String {
        match self {
            Self::Identity => slot.to_owned(),
            Self::Mac => format!("{slot},dma=mac"),
            Self::Bare(published) => format!("{slot},dma=mac,published={published}"),
            Self::Tight => format!("{slot},dma=mac,limit-bytes=24M,limit-entries=666"),
        }
    }
}

/// A slot of the emulated host that a guest gets.
#[derive(Clone, Debug)]
pub struct AssignedSlot {
    /// Such as `0000:01:00`.
    pub slot: String,
    /// Its functions' addresses.
    pub functions: Vec<String>,
}

/// Slots that are bound to vfio-pci. Dropping it gives them back.
pub struct Assigned {
    slots: Vec<AssignedSlot>,
    held_before: Held,
    since: f64,
    released: bool,
}

impl Assigned {
    /// The same for devices that are plugged and pulled: page tables are not compared at the end, since the emulated host's own for them come and
    /// go with them.
    pub fn bind_pluggable(ports: &[Port]) -> Result<Self> {
        let mut assigned = Self::bind(ports)?;
        assigned.held_before.tables = None;
        Ok(assigned)
    }

    /// Takes what is behind `ports` from the emulated host's drivers.
    pub fn bind(ports: &[Port]) -> Result<Self> {
        let since = uptime()?;
        let held_before = Held::now()?;
        let mut assigned = Self { slots: Vec::new(), held_before, since, released: false };
        for port in ports {
            let slot = AssignedSlot { slot: port.slot()?, functions: port.functions()? };
            // A case that failed before may have left it bound.
            if slot.functions.iter().any(|function| driver_of(function).as_deref() == Some("vfio-pci")) {
                outboard(&["devices", "release", &slot.slot])?;
            }
            outboard(&["devices", "bind", &slot.slot])?;
            assigned.slots.push(slot);
        }
        Ok(assigned)
    }

    /// The slots, in the order of the ports.
    pub fn slots(&self) -> &[AssignedSlot] {
        &self.slots
    }

    /// Gives all back to the host's drivers. By now no process uses them: fails if the IOMMU still holds anything for them, or
    /// has reported a fault of any device since they were bound.
    pub fn release(self) -> Result<()> {
        self.release_with(|fault| bail!("the IOMMU reported a fault: {fault:?}"))
    }

    /// The same, with `judge` for each fault.
    pub fn release_with(mut self, mut judge: impl FnMut(&SmmuFault) -> Result<()>) -> Result<()> {
        let before = self.held_before;
        let held = wait_for("end of what the IOMMU held", Duration::from_secs(10), || {
            Held::now().ok().filter(|now| before.allows(now))
        });
        held.with_context(|| format!("before: {before:?}, now: {:?}", Held::now()))?;
        self.released = true;
        for slot in &self.slots {
            outboard(&["devices", "release", &slot.slot])?;
        }
        smmu_faults(self.since)?.iter().try_for_each(&mut judge)
    }
}

impl Drop for Assigned {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        for slot in &self.slots {
            // The case has failed already; this is for the next one.
            let _ = outboard(&["devices", "release", &slot.slot]);
        }
    }
}

/// What the emulated host's kernel holds for DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    /// Pages pinned for devices (Linux, Documentation/core-api/pin_user_pages.rst).
    pinned: i64,
    /// Pages of IOMMU page tables; counted since Linux 6.11.
    tables: Option<i64>,
}

impl Held {
    /// Whether `now` is no more and no less than this, as far as it is compared.
    fn allows(&self, now: &Self) -> bool {
        self.pinned == now.pinned && (self.tables.is_none() || self.tables == now.tables)
    }

    fn now() -> Result<Self> {
        // Adds up what each CPU has counted for itself so far.
        fs::write("/proc/sys/vm/stat_refresh", "1").context("cannot refresh /proc/vmstat")?;
        let text = fs::read_to_string("/proc/vmstat").context("cannot read /proc/vmstat")?;
        let counter = |name: &str| -> Result<i64> {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            value.with_context(|| format!("/proc/vmstat has no {name}"))
        };
        let pinned = counter("nr_foll_pin_acquired ")? - counter("nr_foll_pin_released ")?;
        Ok(Self { pinned, tables: Some(counter("nr_iommu_pages ")?) })
    }
}

/// A fault that the SMMU reported (SMMUv3, 7.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmmuFault {
    /// What happened: 0x10 is a missing translation.
    pub event: u8,
    /// Requester ID of the device: bus in the upper byte, device and function in the lower.
    pub stream: u32,
    /// Where it wanted to read or write.
    pub address: u64,
}

/// Faults since `since` (seconds of uptime), from the kernel's log: `arm-smmu-v3 … event 0x10 received:` and four lines of words.
pub fn smmu_faults(since: f64) -> Result<Vec<SmmuFault>> {
    Ok(parse_faults(&busybox(&["dmesg"])?, since))
}

fn parse_faults(log: &str, since: f64) -> Vec<SmmuFault> {
    let hex = |text: &str| u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok();
    let mut faults = Vec::new();
    let mut lines = log.lines().filter(|line| time_of(line).is_none_or(|time| time >= since));
    while let Some(line) = lines.next() {
        let Some((_, rest)) = line.split_once("arm-smmu-v3") else { continue };
        let Some((_, event)) = rest.split_once(" event ") else { continue };
        let Some(event) = event.split_whitespace().next().and_then(hex) else { continue };
        let words: Vec<u64> = lines
            .by_ref()
            .take(4)
            .filter_map(|line| hex(line.rsplit([' ', '\t']).next().unwrap_or_default()))
            .collect();
        let word = |index: usize| words.get(index).copied().unwrap_or(0);
        faults.push(SmmuFault { event: event as u8, stream: (word(0) >> 32) as u32, address: word(2) });
    }
    faults
}

/// Seconds at the start of a line of the kernel's log.
fn time_of(line: &str) -> Option<f64> {
    line.split_once('[')?.1.split_once(']')?.0.trim().parse().ok()
}

fn uptime() -> Result<f64> {
    let text = fs::read_to_string("/proc/uptime").context("cannot read /proc/uptime")?;
    text.split(' ').next().and_then(|word| word.parse().ok()).context("/proc/uptime has no number")
}

/// The driver of a function of the emulated host.
pub fn driver_of(function: &str) -> Option<String> {
    let link = fs::read_link(Path::new("/sys/bus/pci/devices").join(function).join("driver")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// Runs `outboard` to its end, which must be a success.
pub fn outboard(args: &[&str]) -> Result<()> {
    let output = Command::new(outboard_path()).args(args).output().context("cannot start outboard")?;
    ensure!(output.status.success(), "outboard {}: {}", args.join(" "), describe(&output));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_with_their_device_and_address() {
        let log = "[    1.0] arm-smmu-v3 9050000.smmuv3: allocated 32768 entries for evtq\n\
                   [    2.0] arm-smmu-v3 9050000.smmuv3: event 0x10 received:\n\
                   [    2.0] arm-smmu-v3 9050000.smmuv3: \t0x0000010000000010\n\
                   [    2.0] arm-smmu-v3 9050000.smmuv3: \t0x0000020000000000\n\
                   [    2.0] arm-smmu-v3 9050000.smmuv3: \t0x00000000deadb000\n\
                   [    2.0] arm-smmu-v3 9050000.smmuv3: \t0x0000000000000000\n\
                   [    2.1] other line\n";
        let fault = SmmuFault { event: 0x10, stream: 0x100, address: 0xdead_b000 };
        assert_eq!(parse_faults(log, 0.5), [fault]);
        assert_eq!(parse_faults(log, 3.0), []);
    }
}
