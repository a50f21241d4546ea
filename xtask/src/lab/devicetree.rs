//! The emulated host's device tree, with one bus that its SMMU does not cover: some real machines have such slots.

use crate::paths::Paths;
use crate::process;
use anyhow::{Context, Result, ensure};
use lab_cases::host::Port;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Tokens of the structure block (Devicetree Specification 0.4, 5.4).
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;

/// Has the emulator write its device tree, changes it, and says where it is. `command` is the emulator's command with its machine, CPUs and
/// memory, without devices.
pub fn prepare(paths: &Paths, mut command: Command, machine: &str) -> Result<PathBuf> {
    let path = paths.lab.join("host.dtb");
    let text = path.to_str().context("the clone's path is not valid UTF-8; move it")?.replace(',', ",,");
    command.arg("-M").arg(format!("{machine},dumpdtb={text}"));
    process::output(&mut command, "qemu-system-aarch64 with dumpdtb")?;
    limit_iommu(&path, u32::from(Port::Unprotected.bus()) << 8)
        .with_context(|| format!("{} is not as expected", path.display()))?;
    Ok(path)
}

/// Lets the SMMU cover only requester IDs below `end`: the third and last cell of `iommu-map` is how many (Linux,
/// Documentation/devicetree/bindings/pci/pci-iommu.txt).
fn limit_iommu(path: &Path, end: u32) -> Result<()> {
    let mut tree = fs::read(path)?;
    let value = find(&tree, "iommu-map")?.context("no node has an iommu-map")?;
    ensure!(value.len() == 16, "its iommu-map has {} bytes", value.len());
    tree[value.end - 4..value.end].copy_from_slice(&end.to_be_bytes());
    pack(&mut tree)?;
    fs::write(path, tree)?;
    Ok(())
}

/// Cuts off what the emulator leaves free behind the blocks: it makes room itself when it reads the tree, and a kernel takes 2 MiB at most.
fn pack(tree: &mut Vec<u8>) -> Result<()> {
    let mut end = 0;
    // Offset and size of the strings, then of the structure; total size (5.2).
    for (offset, size) in [(12, 32), (8, 36)] {
        end = end.max(word(tree, offset)? + word(tree, size)?);
    }
    tree.truncate(end);
    let size = u32::try_from(tree.len())?;
    tree[4..8].copy_from_slice(&size.to_be_bytes());
    Ok(())
}

fn word(tree: &[u8], at: usize) -> Result<usize> {
    let bytes = tree.get(at..at + 4).context("it ends early")?;
    Ok(u32::from_be_bytes(bytes.try_into()?) as usize)
}

/// Where in `tree` the value of the first property called `name` is.
fn find(tree: &[u8], name: &str) -> Result<Option<std::ops::Range<usize>>> {
    let word = |at: usize| word(tree, at);
    let text =
        |at: usize| tree.get(at..).and_then(|rest| rest.split(|byte| *byte == 0).next()).unwrap_or_default();
    let (mut at, strings) = (word(8)?, word(12)?);
    loop {
        let token = word(at)? as u32;
        at += 4;
        match token {
            BEGIN_NODE => at += (text(at).len() + 1).next_multiple_of(4),
            PROPERTY => {
                let (len, offset) = (word(at)?, word(at + 4)?);
                let value = at + 8..at + 8 + len;
                if text(strings + offset) == name.as_bytes() {
                    return Ok(Some(value));
                }
                at = value.end.next_multiple_of(4);
            }
            END_NODE | NOP => {}
            _ => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_property_is_found_behind_others() {
        let mut tree = Vec::new();
        let mut put = |words: &[u32]| words.iter().for_each(|word| tree.extend(word.to_be_bytes()));
        // Magic, size, structure at 40, strings at 100; then a node "" with properties at 0 ("a", 5 bytes) and 2 ("map", 4 bytes).
        put(&[0xd00d_feed, 106, 40, 100, 0, 17, 16, 0, 6, 60]);
        put(&[BEGIN_NODE, 0, PROPERTY, 5, 0, 0, 0, NOP, PROPERTY, 4, 2, 77, END_NODE, 9, 0]);
        tree.extend(b"a\0map\0");
        assert_eq!(find(&tree, "map").expect("whole"), Some(84..88));
        assert_eq!(find(&tree, "none").expect("whole"), None);
        assert!(find(&tree[..60], "map").is_err());
        tree.resize(4096, 0);
        pack(&mut tree).expect("whole");
        assert_eq!((tree.len(), &tree[4..8]), (106, &106_u32.to_be_bytes()[..]));
    }
}
