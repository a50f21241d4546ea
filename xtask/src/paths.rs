//! Where things are in the clone.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// The folders of a clone.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The clone.
    pub root: PathBuf,
    /// Everything of the lab.
    pub lab: PathBuf,
}

impl Paths {
    /// Of the clone that this program was built from.
    pub fn new() -> Result<Self> {
        // cargo sets it at run time too, so that a clone may move; without cargo the place of the build is meant.
        let manifest =
            std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest).parent().context("xtask has no parent folder")?.to_owned();
        let lab = root.join("target/lab");
        let paths = Self { root, lab };
        for folder in [paths.packages(), paths.share(), paths.logs(), paths.stamps()] {
            fs::create_dir_all(&folder).with_context(|| {
                format!(
                    "cannot create {}; is the disk full, or does another user own target/?",
                    folder.display()
                )
            })?;
        }
        Ok(paths)
    }

    /// Packages of the distribution, unpacked.
    pub fn packages(&self) -> PathBuf {
        self.lab.join("packages")
    }

    /// What the emulated host sees, read-only.
    pub fn share(&self) -> PathBuf {
        self.lab.join("share")
    }

    /// What the emulated host may write.
    pub fn out(&self) -> PathBuf {
        self.lab.join("out")
    }

    /// Consoles and other logs of the last run.
    pub fn logs(&self) -> PathBuf {
        self.out().join("logs")
    }

    /// One file for each prepared thing, with the sum of what it was made from.
    pub fn stamps(&self) -> PathBuf {
        self.lab.join("stamps")
    }

    /// Where cargo puts what it builds.
    pub fn target(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.root.join("target"), PathBuf::from)
    }
}
