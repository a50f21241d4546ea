//! Folders are layers: a crate's README says what it may depend on, its manifest must keep to that.

use crate::paths::Paths;
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::fs;

/// What a README allows.
#[derive(Debug, PartialEq, Eq)]
enum Allowed {
    Everything,
    Only(Vec<String>),
}

pub(super) fn check(paths: &Paths) -> Result<Option<String>> {
    let crates = paths.root.join("crates");
    let mut faults = Vec::new();
    for package in workspace::packages(paths)? {
        if package.folder().parent() != Some(&crates) {
            continue;
        }
        let folder =
            package.folder().file_name().context("a crate has a folder")?.to_string_lossy().into_owned();
        let readme = fs::read_to_string(package.folder().join("README.md")).unwrap_or_default();
        let Some(allowed) = allowed(&readme) else {
            faults.push(format!("crates/{folder}/README.md has no sentence 'May depend on: …'"));
            continue;
        };
        for needed in package.needs() {
            if !permits(&allowed, &needed) {
                faults.push(format!("crates/{folder} depends on {needed}, which its README does not allow"));
            }
        }
    }
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(None)
}

fn permits(allowed: &Allowed, name: &str) -> bool {
    match allowed {
        Allowed::Everything => true,
        Allowed::Only(names) => names.iter().any(|one| one == name),
    }
}

/// The sentence `May depend on: a, b.`: names of folders, `everything`, or `no other crate of this workspace`.
fn allowed(readme: &str) -> Option<Allowed> {
    let (_, rest) = readme.split_once("ay depend on")?;
    let end = rest.find(['.', ';', '\n']).unwrap_or(rest.len());
    let list = rest[..end].replace(['`', ':'], " ").replace(" only", " ").replace(" and ", ",");
    let names: Vec<String> = list.split(',').map(|name| name.trim().to_owned()).collect();
    Some(match names.first().map(String::as_str) {
        Some("everything") => Allowed::Everything,
        Some(none) if none.starts_with("no other crate") => Allowed::Only(Vec::new()),
        _ => Allowed::Only(names),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_of_readmes() {
        let only =
            |names: &[&str]| Some(Allowed::Only(names.iter().map(|name| (*name).to_owned()).collect()));
        assert_eq!(allowed("# x\n\nMay depend on: bus, pci.\nMore."), only(&["bus", "pci"]));
        assert_eq!(allowed("Frames. May depend on `bus` only; knows nothing."), only(&["bus"]));
        assert_eq!(allowed("May depend on: bus and pci."), only(&["bus", "pci"]));
        assert_eq!(allowed("May depend on: no other crate of this workspace, and on core."), only(&[]));
        assert_eq!(allowed("May depend on: everything."), Some(Allowed::Everything));
        assert_eq!(allowed("# x\nNothing said."), None);
    }

    #[test]
    fn what_is_not_named_is_not_permitted() {
        let bus = Allowed::Only(vec!["bus".into()]);
        assert!(permits(&bus, "bus"));
        assert!(!permits(&bus, "pci"));
        assert!(permits(&Allowed::Everything, "pci"));
    }
}
