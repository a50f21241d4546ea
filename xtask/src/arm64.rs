//! Programs for the emulated host: static arm64 binaries, cross-built wherever this runs.

use crate::debian::rust;
use crate::debian::setup::{self, CROSS_LIBC, CROSS_LINKER};
use crate::paths::Paths;
use crate::process;
use crate::rustup::{self, MUSL};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What Debian's own Rust offers instead; static on request.
const GNU: &str = "aarch64-unknown-linux-gnu";

/// A way to build for arm64.
pub struct Toolchain {
    target: &'static str,
    variables: Vec<(String, String)>,
}

impl Toolchain {
    /// The installed toolchain with its musl target; if that cannot be had, Debian's.
    pub fn prepare(paths: &Paths) -> Result<Self> {
        if MUSL.ensure(paths)? { Self::installed(paths) } else { Self::from_debian(paths) }
    }

    fn installed(paths: &Paths) -> Result<Self> {
        let linker = if rustup::rust_lld(&rustup::sysroot()?).is_some() {
            "rust-lld"
        } else {
            setup::ensure(paths, &[&CROSS_LINKER])?;
            CROSS_LINKER_PROGRAM
        };
        let variables = vec![("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER".into(), linker.into())];
        Ok(Self { target: MUSL.name(), variables })
    }

    /// Debian's. Glibc's programs can be static too.
    fn from_debian(paths: &Paths) -> Result<Self> {
        setup::ensure(paths, &[&CROSS_LINKER, &CROSS_LIBC])?;
        let rustc = rust::compiler(paths)?;
        Ok(Self {
            target: GNU,
            variables: vec![
                ("RUSTC".into(), text(&rustc)?),
                ("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER".into(), CROSS_LINKER_PROGRAM.into()),
                (
                    "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS".into(),
                    "-Ctarget-feature=+crt-static".into(),
                ),
            ],
        })
    }

    /// A cargo command for this target.
    pub fn cargo(&self, paths: &Paths, subcommand: &str) -> Command {
        let mut command = crate::cargo(paths);
        command.arg(subcommand).arg("--target").arg(self.target);
        command.envs(self.variables.iter().map(|(key, value)| (key, value)));
        command
    }

    /// Builds `packages` for release and returns the folder with the programs.
    pub fn build(&self, paths: &Paths, packages: &[&str]) -> Result<PathBuf> {
        let mut command = self.cargo(paths, "build");
        command.arg("--release");
        for package in packages {
            command.args(["--package", package]);
        }
        let what = format!("building {} for arm64", packages.join(", "));
        process::run_logged(&mut command, &what, &paths.logs().join("build.log"))?;
        Ok(paths.target().join(self.target).join("release"))
    }
}

const CROSS_LINKER_PROGRAM: &str = "aarch64-linux-gnu-gcc";

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).context("the clone's path is not valid UTF-8; move it")
}
