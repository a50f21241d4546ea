//! The conformance suite of host PCI functions and their DMA domains, on devices behind VFIO and the SMMU.

use crate::case::{Case, Group, HOST_OF_DMA};
use crate::host::{Assigned, Host, Port, SHARE, SmmuFault};
use crate::protocol::{Event, Outcome};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// A missing translation (SMMUv3, 7.3.12): what a device gets that uses memory after it was unmapped, which one of the cases has it do.
const TRANSLATION: u8 = 0x10;

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "host-pci-conformance",
        about: "the suite of host PCI functions on VFIO: guest addresses one to one, and those of a Mac's DART",
        limit_s: 600,
        host_kernel: HOST_OF_DMA,
        group: Group::Test,
        host,
        guest: |_| bail!("this case boots no Linux"),
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    // The first copies and interrupts on demand, the other has MSI-X and a reset of its own. Not the network card: turning its MSI-X off while it
    // holds an interrupt back ends QEMU 7.2 in an assertion (e1000e_intrmgr_on_msix_throttling_timer).
    let ports = [Port::Edu, Port::Nvme];
    let assigned = Assigned::bind(&ports)?;
    for (name, option) in [("identity", None), ("mac", Some("--mac"))] {
        let mut outcomes = BTreeMap::new();
        for slot in assigned.slots() {
            run(&slot.slot, option, &mut outcomes)?;
        }
        for (case, outcome) in outcomes {
            host.send(&Event::Part { name: format!("{name}/{case}"), outcome });
        }
    }
    let mut faults = 0;
    assigned.release_with(|fault| {
        faults += 1;
        judge(fault)
    })?;
    ensure!(faults > 0, "no access to memory that was unmapped met the IOMMU");
    Ok(None)
}

/// Runs the suite on `slot` and adds what became of its cases: a failure counts before a success, and that before a skip.
fn run(slot: &str, option: Option<&str>, outcomes: &mut BTreeMap<String, Outcome>) -> Result<()> {
    let program = Path::new(SHARE).join("bin/host-pci-conformance");
    let output = Command::new(program).arg(slot).args(option).output();
    let output = output.context("cannot start host-pci-conformance")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut count = 0;
    for (case, outcome) in text.lines().filter_map(parse) {
        count += 1;
        let counts = |outcome: &Outcome| match outcome {
            Outcome::Failed(_) => 2,
            Outcome::Passed => 1,
            Outcome::Skipped(_) => 0,
        };
        if outcomes.get(case).is_none_or(|had| counts(had) < counts(&outcome)) {
            outcomes.insert(case.to_owned(), outcome);
        }
    }
    ensure!(count > 20, "{count} cases: {text}");
    ensure!(matches!(output.status.code(), Some(0 | 1)), "it ended with {}", output.status);
    Ok(())
}

fn judge(fault: &SmmuFault) -> Result<()> {
    ensure!(fault.event == TRANSLATION, "the IOMMU reported {fault:x?}");
    Ok(())
}

/// `pass NAME (N ms)`, `skip NAME: WHY`, `FAIL NAME: WHY`.
fn parse(line: &str) -> Option<(&str, Outcome)> {
    let (verdict, rest) = line.split_once(' ')?;
    match verdict {
        "pass" => Some((rest.split(' ').next()?, Outcome::Passed)),
        "skip" => rest.split_once(": ").map(|(name, why)| (name, Outcome::Skipped(why.into()))),
        "FAIL" => rest.split_once(": ").map(|(name, why)| (name, Outcome::Failed(why.into()))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_suite_are_understood() {
        assert!(matches!(parse("pass dma-map-rules (3 ms)"), Some(("dma-map-rules", Outcome::Passed))));
        assert!(matches!(parse("skip a-b: no way"), Some(("a-b", Outcome::Skipped(why))) if why == "no way"));
        assert!(matches!(parse("FAIL a-b: c: d"), Some(("a-b", Outcome::Failed(why))) if why == "c: d"));
        assert!(parse("0000:02:00: 30 passed, 1 skipped, 0 failed").is_none());
    }
}
