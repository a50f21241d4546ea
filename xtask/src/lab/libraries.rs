//! Programs of Debian packages with the libraries they need, out of packages that are only unpacked.

use super::RELEASE;
use crate::debian::{Apt, Status, unpack};
use crate::paths::Paths;
use crate::stamp;
use anyhow::{Context, Result, bail};
use object::read::elf::{ElfFile64, FileHeader};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The dynamic loader.
pub const LOADER: &str = "ld-linux-aarch64.so.1";

/// Fetches `packages` with all they depend on and puts `programs` into `to/bin`, their libraries into `to/lib` and the loader into `to`.
pub fn fetch(paths: &Paths, packages: &[&str], programs: &[&str], to: &Path) -> Result<()> {
    let root = paths.packages().join(format!("{}.part", packages[0]));
    let apt = Apt::new(paths.lab.join("apt-arm64"), "arm64", RELEASE, Status::Empty)?;
    apt.update()?;
    let names: Vec<String> = packages.iter().map(|name| (*name).to_owned()).collect();
    for file in apt.download_with_dependencies(&names)? {
        unpack(&file, &root)?;
        fs::remove_file(&file)?;
    }
    for program in programs {
        stamp::copy_if_changed(&root.join("usr/bin").join(program), &to.join("bin").join(program))?;
    }
    copy_libraries(&root, programs, to)?;
    fs::remove_dir_all(&root).context("cannot remove what was unpacked")
}

/// Copies what the programs need, and what that needs.
fn copy_libraries(root: &Path, programs: &[&str], to: &Path) -> Result<()> {
    let machine = "aarch64-linux-gnu";
    let folders = [root.join("lib").join(machine), root.join("usr/lib").join(machine), root.join("lib")];
    let find = |name: &str| -> Result<PathBuf> {
        let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.exists());
        // Some libraries stand in folders of their own (libpulsecommon); those are named by a search path in the program.
        found
            .or_else(|| search(&root.join("usr/lib"), name))
            .with_context(|| format!("no package has {name}"))
    };
    let mut open: Vec<PathBuf> = programs.iter().map(|name| to.join("bin").join(name)).collect();
    let mut seen = HashSet::new();
    while let Some(file) = open.pop() {
        for name in needed(&fs::read(&file)?).with_context(|| format!("reading {}", file.display()))? {
            if seen.insert(name.clone()) {
                let target = to.join("lib").join(&name);
                stamp::copy_if_changed(&find(&name)?, &target)?;
                open.push(target);
            }
        }
    }
    stamp::copy_if_changed(&find(LOADER)?, &to.join(LOADER))
}

fn search(folder: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if entry.file_name() == name {
            return Some(path);
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Some(found) = search(&path, name)
        {
            return Some(found);
        }
    }
    None
}

/// The shared libraries that an ELF file asks for (its DT_NEEDED entries).
fn needed(elf: &[u8]) -> Result<Vec<String>> {
    let file = ElfFile64::<object::Endianness>::parse(elf)?;
    let endian = file.endian();
    let sections = file.elf_header().sections(endian, elf)?;
    let Some((entries, link)) = sections.dynamic(endian, elf)? else { bail!("it is not linked dynamically") };
    let strings = sections.strings(endian, elf, link)?;
    let mut names = Vec::new();
    for entry in entries {
        if entry.d_tag.get(endian) == u64::from(object::elf::DT_NEEDED) {
            let offset = u32::try_from(entry.d_val.get(endian))?;
            let name = strings.get(offset).ok().context("a name is outside of the string table")?;
            names.push(String::from_utf8(name.to_vec())?);
        }
    }
    Ok(names)
}
