//! The conformance suite of host PCI functions and their DMA domains, on a network card behind VFIO and the SMMU.

use crate::case::{Case, Group};
use crate::host::{Assigned, Host, Port, SHARE, SmmuFault};
use crate::protocol::{Event, Outcome};
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use std::process::Command;

/// A missing translation (SMMUv3, 7.3.12): what a device gets that uses memory after it was unmapped, which one of the cases has it do.
const TRANSLATION: u8 = 0x10;

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "host-pci-conformance",
        about: "the suite of host PCI functions on VFIO: guest addresses one to one, and those of a Mac's DART",
        limit_s: 600,
        group: Group::Test,
        host,
        guest: |_| bail!("this case boots no Linux"),
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    // The suite knows how to have this card interrupt and copy.
    let assigned = Assigned::bind(&[Port::Network])?;
    let slot = assigned.slots()[0].slot.clone();
    for (name, option) in [("identity", None), ("mac", Some("--mac"))] {
        let program = Path::new(SHARE).join("bin/host-pci-conformance");
        let output = Command::new(program).arg(&slot).args(option).output();
        let output = output.context("cannot start host-pci-conformance")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let mut passed = 0;
        for (case, outcome) in text.lines().filter_map(parse) {
            passed += u32::from(matches!(outcome, Outcome::Passed));
            host.send(&Event::Part { name: format!("{name}/{case}"), outcome });
        }
        ensure!(passed > 20, "{passed} cases passed with {name}: {text}");
        ensure!(matches!(output.status.code(), Some(0 | 1)), "it ended with {}", output.status);
    }
    assigned.release_with(judge)?;
    Ok(None)
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
