//! Which Debian packages the lab uses, and where they are unpacked.

use super::RELEASE;
use crate::debian::{Apt, Status, unpack};
use crate::paths::Paths;
use crate::stamp;
use anyhow::{Context, Result};
use lab_cases::host::Kernel;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// What was fetched: package name to the folder under `packages/`.
#[derive(Default, Serialize, Deserialize)]
struct Lock {
    wanted: Vec<String>,
    folders: BTreeMap<String, PathBuf>,
}

/// The unpacked packages.
pub struct Packages {
    folders: BTreeMap<String, PathBuf>,
    kernels: BTreeMap<&'static str, PathBuf>,
}

impl Packages {
    /// Fetches and unpacks what is missing. What is there stays, even when Debian has something newer: the lab is the
    /// same from run to run until `target/lab` is deleted.
    pub fn prepare(paths: &Paths) -> Result<Self> {
        let wanted: Vec<String> = Kernel::ALL.iter().map(|kernel| metapackage(*kernel).to_owned()).collect();
        let file = paths.packages().join("lock.json");
        let mut lock: Lock =
            fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let there = |lock: &Lock| lock.folders.values().all(|folder| paths.packages().join(folder).is_dir());
        if lock.wanted != wanted || lock.folders.is_empty() || !there(&lock) {
            lock = fetch(paths, wanted)?;
            stamp::write_whole(&file, &serde_json::to_vec_pretty(&lock)?)?;
        }
        let at = |folder: &PathBuf| paths.packages().join(folder);
        let kernels =
            Kernel::ALL.iter().map(|kernel| (kernel.name(), at(&lock.folders[metapackage(*kernel)])));
        let kernels = kernels.collect();
        Ok(Self {
            folders: lock.folders.iter().map(|(name, folder)| (name.clone(), at(folder))).collect(),
            kernels,
        })
    }

    /// The folder of a kernel's package.
    pub fn kernel(&self, kernel: Kernel) -> &PathBuf {
        &self.kernels[kernel.name()]
    }

    /// The static busybox.
    pub fn busybox(&self) -> PathBuf {
        self.folders[BUSYBOX].join("bin/busybox")
    }
}

const BUSYBOX: &str = "busybox-static";

/// Debian's name for the newest kernel of a line.
const fn metapackage(kernel: Kernel) -> &'static str {
    match kernel {
        Kernel::V6_1 => "linux-image-arm64",
        Kernel::V6_1Cloud => "linux-image-cloud-arm64",
        Kernel::V6_12 => "linux-image-6.12-arm64",
        Kernel::V6_12Cloud => "linux-image-6.12-cloud-arm64",
    }
}

fn fetch(paths: &Paths, wanted: Vec<String>) -> Result<Lock> {
    let apt = Apt::new(paths.lab.join("apt-arm64"), "arm64", RELEASE, Status::Empty)?;
    apt.update()?;
    let mut names = vec![BUSYBOX.to_owned()];
    for name in &wanted {
        names.push(apt.resolve(name, "linux-image-")?);
    }
    let files = apt.download(&names)?;
    let mut folders = BTreeMap::new();
    let keys = std::iter::once(BUSYBOX.to_owned()).chain(wanted.iter().cloned());
    for (key, file) in keys.zip(files) {
        let stem = file.file_stem().context("a package file has a name")?;
        // apt writes a version's colon as %3a, which is awkward in every other program's paths.
        let folder = PathBuf::from(stem.to_string_lossy().replace("%3a", "-"));
        let target = paths.packages().join(&folder);
        if target.exists() {
            fs::remove_dir_all(&target)?;
        }
        unpack(&file, &target)?;
        fs::remove_file(&file)?;
        folders.insert(key, folder);
    }
    Ok(Lock { wanted, folders })
}
