//! What rustup adds to the Rust toolchain: targets, and components of cargo.

use crate::paths::Paths;
use crate::{process, progress};
use anyhow::Result;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A part of the toolchain that may be missing.
pub struct Part {
    kind: Kind,
    name: &'static str,
    /// What it is for.
    pub why: &'static str,
}

enum Kind {
    /// The standard library, or at least `core`, of a target.
    Target,
    /// A component with this subcommand of cargo.
    Component(&'static str),
}

/// The usual target of programs in the emulated host: static by itself.
pub const MUSL: Part = Part {
    kind: Kind::Target,
    name: "aarch64-unknown-linux-musl",
    why: "builds the programs of the emulated host",
};
/// Where there is no system: the guest's kernel module.
pub const BARE: Part = Part {
    kind: Kind::Target,
    name: "aarch64-unknown-none-softfloat",
    why: "builds the guest's kernel module",
};
/// What Outboard is for.
pub const APPLE: Part =
    Part { kind: Kind::Target, name: "aarch64-apple-darwin", why: "checks the types of what runs on a Mac" };
/// The lint of the format.
pub const FORMAT: Part = Part { kind: Kind::Component("fmt"), name: "rustfmt", why: "checks the format" };
/// The lints of the compiler's companion.
pub const CLIPPY: Part = Part { kind: Kind::Component("clippy"), name: "clippy", why: "checks the code" };

/// All of them.
pub const ALL: [&Part; 5] = [&MUSL, &BARE, &APPLE, &FORMAT, &CLIPPY];

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.word(), self.name)
    }
}

impl Part {
    /// Its name for rustup.
    pub fn name(&self) -> &'static str {
        self.name
    }

    fn word(&self) -> &'static str {
        match self.kind {
            Kind::Target => "target",
            Kind::Component(_) => "component",
        }
    }

    /// Whether the toolchain has it.
    pub fn is_there(&self, paths: &Paths) -> Result<bool> {
        match self.kind {
            Kind::Target => Ok(sysroot()?.join("lib/rustlib").join(self.name).join("lib").is_dir()),
            Kind::Component(subcommand) => {
                let mut command = crate::cargo(paths);
                command.args([subcommand, "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
                Ok(command.status().is_ok_and(|status| status.success()))
            }
        }
    }

    /// Adds it where it is missing, after saying so. Whether it is there then.
    pub fn ensure(&self, paths: &Paths) -> Result<bool> {
        if self.is_there(paths)? {
            return Ok(true);
        }
        if !process::exists("rustup") {
            progress::say(&format!("There is no {self} in this Rust toolchain, and no rustup to add it"));
            return Ok(false);
        }
        progress::say(&format!("Installing with rustup: {self} ({})", self.why));
        let mut command = Command::new("rustup");
        command.args([self.word(), "add", self.name]).current_dir(&paths.root);
        if let Err(error) = process::run_logged(&mut command, "rustup", &paths.lab.join("rustup.log")) {
            progress::say(&format!("  rustup brings nothing here: {error:#}"));
        }
        self.is_there(paths)
    }
}

/// Where the toolchain is installed.
pub fn sysroot() -> Result<PathBuf> {
    let text = process::output(Command::new("rustc").args(["--print", "sysroot"]), "rustc --print sysroot")?;
    Ok(PathBuf::from(text.trim()))
}

/// The linker that comes with rustup's toolchains.
pub fn rust_lld(sysroot: &Path) -> Option<PathBuf> {
    let hosts = std::fs::read_dir(sysroot.join("lib/rustlib")).ok()?.flatten();
    hosts.map(|host| host.path().join("bin/rust-lld")).find(|path| path.is_file())
}
