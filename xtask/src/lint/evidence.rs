//! Every test that docs/faults.md and docs/threat-model.md name exists, and every fault has one.
//!
//! A reference stands in backticks: `crates/x/src/y.rs::name_of_a_test` for a function, `lab NAME` or `lab NAME/PART` for a
//! case of the lab.

use crate::paths::Paths;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

const FAULTS: &str = "docs/faults.md";
const THREATS: &str = "docs/threat-model.md";

/// The faults of docs/faults.md by letter, with the number of each.
const FAMILIES: [(char, u32); 4] = [('A', 16), ('B', 13), ('C', 10), ('D', 8)];

/// What a row says where no test is possible, with the reason behind it.
const NOT_TESTED: &str = "not tested:";

pub(super) fn check(paths: &Paths) -> Result<Option<String>> {
    let sources = part_sources(&paths.root)?;
    let exists = |reference: &str| exists(&paths.root, &sources, reference);
    let mut faults = Vec::new();
    for page in [FAULTS, THREATS] {
        let text =
            fs::read_to_string(paths.root.join(page)).with_context(|| format!("cannot read {page}"))?;
        for reference in references(&text).filter(|reference| !exists(reference)) {
            faults.push(format!("{page} names `{reference}`, which does not exist"));
        }
        if page == FAULTS {
            faults.extend(rows_without_evidence(&text));
        }
    }
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(None)
}

/// The references to tests in `text`.
fn references(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2)).filter(|quoted| is_reference(quoted))
}

fn is_reference(quoted: &str) -> bool {
    quoted.contains("::") && quoted.contains('/') || quoted.starts_with("lab ")
}

/// True if the test that `reference` names is there; `sources` is where parts of cases are named.
fn exists(root: &Path, sources: &str, reference: &str) -> bool {
    if let Some(case) = reference.strip_prefix("lab ") {
        let (name, part) = case.split_once('/').map_or((case, None), |(name, part)| (name, Some(part)));
        let has_part = part.is_none_or(|part| sources.contains(&format!("\"{part}\"")));
        return lab_cases::find(name).is_some() && has_part;
    }
    let Some((file, function)) = reference.rsplit_once("::") else { return false };
    fs::read_to_string(root.join(file)).is_ok_and(|text| text.contains(&format!("{function}(")))
}

/// The text of all files in which parts of cases have their names.
fn part_sources(root: &Path) -> Result<String> {
    let folders = ["lab/cases/src", "crates/hypervisor/src/conformance", "crates/host-pci/src/conformance"];
    let mut text = String::new();
    for folder in folders {
        append(&root.join(folder), &mut text).with_context(|| format!("cannot read {folder}"))?;
    }
    Ok(text)
}

fn append(folder: &Path, text: &mut String) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            append(&path, text)?;
        } else {
            text.push_str(&fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

/// Faults without a row of their own, and rows that name neither a test nor a reason why there is none.
fn rows_without_evidence(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for (letter, count) in FAMILIES {
        for number in 1..=count {
            let head = format!("| {letter}{number} |");
            let rows: Vec<&str> = text.lines().filter(|line| line.starts_with(&head)).collect();
            match rows[..] {
                [row] if references(row).next().is_some() || row.contains(NOT_TESTED) => {}
                [_] => faults.push(format!("{FAULTS}: {letter}{number} names no test")),
                _ => {
                    faults.push(format!("{FAULTS}: {letter}{number} has {} rows instead of one", rows.len()))
                }
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
    }

    #[test]
    fn references_are_found_among_other_quotes() {
        let text = "`--jail off` and `lab boot-6.12`, `a/b.rs::c`; `Vec::new`\n`lab x/y`";
        assert_eq!(references(text).collect::<Vec<_>>(), ["lab boot-6.12", "a/b.rs::c", "lab x/y"]);
    }

    #[test]
    fn what_does_not_exist_is_found() {
        let sources = part_sources(root()).unwrap();
        let exists = |reference: &str| exists(root(), &sources, reference);
        assert!(exists("lab guest-panic/stays") && exists("lab poweroff"));
        assert!(!exists("lab guest-panic/flies") && !exists("lab no-such-case"));
        assert!(exists("xtask/src/lint/evidence.rs::what_does_not_exist_is_found"));
        assert!(!exists(concat!("xtask/src/lint/evidence.rs::what_does_not", "_exist")));
        assert!(!exists("xtask/src/lint/no.rs::x"));
    }

    #[test]
    fn every_fault_needs_a_row_with_a_test_or_a_reason() {
        let rows: String = FAMILIES
            .iter()
            .flat_map(|(letter, count)| {
                (1..=*count).map(move |n| format!("| {letter}{n} | x | `lab poweroff` |\n"))
            })
            .collect();
        assert!(rows_without_evidence(&rows).is_empty());
        let gap = rows.replace("| B7 | x | `lab poweroff` |", "| B7 | x | none |");
        assert_eq!(rows_without_evidence(&gap), ["docs/faults.md: B7 names no test"]);
        let reason = gap.replace("| B7 | x | none |", "| B7 | x | not tested: needs a card |");
        assert!(rows_without_evidence(&reason).is_empty());
        assert_eq!(rows_without_evidence(&(rows + "| A1 | again | `lab poweroff` |\n")).len(), 1);
    }
}
