//! The crates of this workspace, as cargo sees them.

use crate::paths::Paths;
use crate::process;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// One crate.
#[derive(Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
    metadata: Option<Metadata>,
}

#[derive(Deserialize)]
struct Dependency {
    path: Option<PathBuf>,
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Metadata {
    outboard: Option<Ours>,
}

#[derive(Deserialize)]
struct Ours {
    #[serde(default, rename = "linux-only")]
    linux_only: bool,
}

impl Package {
    /// Its folder.
    pub fn folder(&self) -> &Path {
        self.manifest_path.parent().expect("a manifest has a folder")
    }

    /// Whether it says in its manifest that it is for Linux only (`[package.metadata.outboard] linux-only`).
    pub fn linux_only(&self) -> bool {
        self.metadata.as_ref().and_then(|all| all.outboard.as_ref()).is_some_and(|ours| ours.linux_only)
    }

    /// Names of the folders of the workspace's crates that it needs (not those that only its tests need).
    pub fn needs(&self) -> Vec<String> {
        let real = self.dependencies.iter().filter(|one| one.kind.as_deref() != Some("dev"));
        real.filter_map(|one| Some(one.path.as_ref()?.file_name()?.to_string_lossy().into_owned())).collect()
    }
}

/// All crates.
pub fn packages(paths: &Paths) -> Result<Vec<Package>> {
    #[derive(Deserialize)]
    struct Answer {
        packages: Vec<Package>,
    }
    let mut command = crate::cargo(paths);
    command.args(["metadata", "--no-deps", "--format-version", "1"]);
    let text = process::output(&mut command, "cargo metadata")?;
    let answer: Answer = serde_json::from_str(&text).context("cargo metadata printed something else")?;
    Ok(answer.packages)
}
