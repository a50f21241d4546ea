//! Programs for the emulated host: static arm64 binaries, cross-built wherever this runs.

use crate::debian::setup::{self, CROSS_LIBC, CROSS_LINKER};
use crate::debian::{Apt, Status, unpack};
use crate::paths::Paths;
use crate::{process, stamp};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The usual target: static by itself.
const MUSL: &str = "aarch64-unknown-linux-musl";
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
        let sysroot = sysroot()?;
        if !has_target(&sysroot, MUSL) && process::exists("rustup") {
            println!("Adding the Rust target {MUSL} (rustup target add)");
            let added = Command::new("rustup").args(["target", "add", MUSL]).stdin(Stdio::null()).status();
            if !added.is_ok_and(|status| status.success()) {
                println!("rustup brings nothing here");
            }
        }
        if has_target(&sysroot, MUSL) { Self::installed(paths, &sysroot) } else { Self::from_debian(paths) }
    }

    fn installed(paths: &Paths, sysroot: &Path) -> Result<Self> {
        let linker = if rust_lld(sysroot).is_some() {
            "rust-lld"
        } else {
            setup::ensure(paths, &[&CROSS_LINKER], false)?;
            CROSS_LINKER_PROGRAM
        };
        let variables = vec![("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER".into(), linker.into())];
        Ok(Self { target: MUSL, variables })
    }

    /// Debian's `rustc-web` with the arm64 standard library, unpacked under `target/lab`. Glibc's programs can be
    /// static too.
    fn from_debian(paths: &Paths) -> Result<Self> {
        println!("Using Debian's rustc-web and libstd-rust-web-dev:arm64, unpacked under target/lab");
        setup::ensure(paths, &[&CROSS_LINKER, &CROSS_LIBC], false)?;
        let root = paths.lab.join("rust-web");
        let wrapper = root.join("rustc");
        stamp::once(paths, "rust-web", "2", &[&wrapper], || {
            unpack_rust(paths, &root)?;
            write_wrapper(&root, &wrapper)
        })?;
        Ok(Self {
            target: GNU,
            variables: vec![
                ("RUSTC".into(), text(&wrapper)?),
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

fn sysroot() -> Result<PathBuf> {
    let text = process::output(Command::new("rustc").args(["--print", "sysroot"]), "rustc --print sysroot")?;
    Ok(PathBuf::from(text.trim()))
}

/// Whether the installed toolchain has the standard library of `target`.
pub fn has_target(sysroot: &Path, target: &str) -> bool {
    sysroot.join("lib/rustlib").join(target).join("lib").is_dir()
}

/// The linker that comes with rustup's toolchains.
fn rust_lld(sysroot: &Path) -> Option<PathBuf> {
    let hosts = fs::read_dir(sysroot.join("lib/rustlib")).ok()?.flatten();
    hosts.map(|host| host.path().join("bin/rust-lld")).find(|path| path.is_file())
}

/// Whether `rustup` or the installation has `target`, adding it if possible.
pub fn ensure_target(target: &str) -> Result<bool> {
    let sysroot = sysroot()?;
    if !has_target(&sysroot, target) && process::exists("rustup") {
        // If it brings nothing, the caller sees that the target is still missing.
        let _ = Command::new("rustup").args(["target", "add", target]).stdin(Stdio::null()).output();
    }
    Ok(has_target(&sysroot, target))
}

fn unpack_rust(paths: &Paths, root: &Path) -> Result<()> {
    let machine = process::output(Command::new("dpkg").arg("--print-architecture"), "dpkg")?;
    let machine = machine.trim().to_owned();
    let native = Apt::new(paths.lab.join("apt-rust"), &machine, super::lab::RELEASE, Status::Empty)?;
    native.update()?;
    let mut files = native.download_with_dependencies(&["rustc-web".into()])?;
    // The machine's own C library is newer or the same; a second one beside it would not fit its loader.
    files.retain(|file| !file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libc6")));
    if machine != "arm64" {
        let arm64 = Apt::new(paths.lab.join("apt-arm64"), "arm64", super::lab::RELEASE, Status::Empty)?;
        arm64.update()?;
        files.extend(arm64.download(&["libstd-rust-web-dev".into()])?);
    }
    for file in files {
        unpack(&file, root)?;
    }
    Ok(())
}

/// A script that starts the unpacked compiler with the unpacked libraries. Not by a variable of the environment: the
/// compiler would hand that on to the linker, which is the machine's own and wants the machine's own libraries.
fn write_wrapper(root: &Path, wrapper: &Path) -> Result<()> {
    let loaders = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    let loader =
        loaders.iter().find(|path| Path::new(path).exists()).context("this machine has no known loader")?;
    let mut folders = Vec::new();
    for machine in ["x86_64-linux-gnu", "aarch64-linux-gnu"] {
        folders.push(text(&root.join("usr/lib").join(machine))?);
        folders.push(text(&root.join("lib").join(machine))?);
    }
    let usr = text(&root.join("usr"))?;
    let script = format!(
        "#!/bin/sh\nexec {loader} --library-path '{}' '{usr}/bin/rustc' --sysroot '{usr}' \"$@\"\n",
        folders.join(":")
    );
    stamp::write_whole(wrapper, script.as_bytes())?;
    fs::set_permissions(wrapper, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).context("the clone's path is not valid UTF-8; move it")
}
