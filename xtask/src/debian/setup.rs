//! What the machine must have, and how it gets it.

use super::{Apt, Status, apt};
use crate::paths::Paths;
use crate::process::{self, Advise};
use crate::progress;
use crate::rustup;
use anyhow::{Result, bail};
use std::process::Command;

/// A program (or a file, with its whole path) that must be there.
pub struct Need {
    program: &'static str,
    package: &'static str,
    why: &'static str,
}

/// Emulates the arm64 machine that everything runs on.
pub const EMULATOR: Need = Need {
    program: "qemu-system-aarch64",
    package: "qemu-system-arm",
    why: "emulates the arm64 host, the lab's 'Mac'",
};
/// For Debian's kernel modules.
pub const XZ: Need = Need { program: "xz", package: "xz-utils", why: "unpacks Debian's kernel modules" };
/// For one of the boot formats.
pub const ZSTD: Need =
    Need { program: "zstd", package: "zstd", why: "packs a kernel as a zstd zboot image for a case" };
/// Where the Rust toolchain has no linker of its own for arm64.
pub const CROSS_LINKER: Need = Need {
    program: "aarch64-linux-gnu-gcc",
    package: "gcc-aarch64-linux-gnu",
    why: "links arm64 programs; this Rust toolchain comes without rust-lld",
};

/// For the guest's kernel module.
pub const CROSS_COMPILER: Need = Need {
    program: "aarch64-linux-gnu-gcc",
    package: "gcc-aarch64-linux-gnu",
    why: "compiles the guest's kernel module",
};
/// The same.
pub const MAKE: Need = Need { program: "make", package: "make", why: "builds the guest's kernel module" };
/// The same.
pub const PAHOLE: Need =
    Need { program: "pahole", package: "pahole", why: "a kernel module's build asks for it" };

/// With [`CROSS_LINKER`], where arm64 programs are linked with glibc.
pub const CROSS_LIBC: Need = Need {
    program: "/usr/aarch64-linux-gnu/lib/libc.a",
    package: "libc6-dev-arm64-cross",
    why: "the C library for arm64 programs; this Rust toolchain has no arm64 target of its own",
};

/// What `lab` needs of every machine.
pub const LAB: [&Need; 3] = [&EMULATOR, &XZ, &ZSTD];
/// What the guest's kernel module needs.
pub const MODULE: [&Need; 3] = [&CROSS_COMPILER, &MAKE, &PAHOLE];

/// Installs all that the tasks need and that is missing, or only says with `dry_run` what would be; what is there is listed too.
pub fn all(paths: &Paths, dry_run: bool) -> Result<()> {
    let packages = [&LAB[..], &MODULE].concat();
    println!("Debian packages:");
    for need in &packages {
        println!("{}", line(need.package, process::exists(need.program), "apt", need.why));
    }
    println!("Rust:");
    for part in rustup::ALL {
        println!("{}", line(&part.to_string(), part.is_there(paths)?, "rustup", part.why));
    }
    if !dry_run {
        progress::begin("set up");
        ensure(paths, &packages)?;
        for part in rustup::ALL {
            // What rustup cannot bring has a substitute, or its check is skipped: the task that wants it says so.
            part.ensure(paths)?;
        }
        progress::end();
    }
    Ok(())
}

fn line(name: &str, there: bool, by: &str, why: &str) -> String {
    let state = if there { "there".to_owned() } else { format!("missing: {by} installs it") };
    format!("  {name:<40} {state:<30} {why}")
}

/// Installs what is missing of `needs`, after saying what and why.
pub fn ensure(paths: &Paths, needs: &[&Need]) -> Result<()> {
    let missing: Vec<&&Need> = needs.iter().filter(|need| !process::exists(need.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    progress::say("Installing with apt, and what they depend on:");
    for need in &missing {
        progress::say(&format!("  {:<24} {}", need.package, need.why));
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    let root = nix::unistd::geteuid().is_root();
    if !root && !process::exists("sudo") {
        bail!("this needs root, and there is no sudo. As root, run: {}", by_hand(true, &packages));
    }
    let by_hand = by_hand(root, &packages);
    let architecture = process::output(Command::new("dpkg").arg("--print-architecture"), "dpkg")?;
    let release = apt::codename()?;
    let apt = Apt::new(paths.lab.join("apt-native"), architecture.trim(), &release, Status::System)?;
    let install = || {
        apt.update()?;
        apt.install(&packages)
    };
    let said = install().advise(|| format!("To do it by hand: {by_hand}"))?;
    progress::say(&format!("  apt: {said}"));
    for need in missing {
        if !process::exists(need.program) {
            bail!("{} is installed, but there is still no program {}", need.package, need.program);
        }
    }
    Ok(())
}

/// The command for a person; a machine that was just installed may have no lists yet, or old ones.
fn by_hand(root: bool, packages: &[&str]) -> String {
    let sudo = if root { "" } else { "sudo " };
    let packages = packages.join(" ");
    format!("{sudo}apt-get update && {sudo}apt-get install --no-install-recommends {packages}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_for_people_fetches_the_lists_first() {
        assert_eq!(
            by_hand(false, &["make", "pahole"]),
            "sudo apt-get update && sudo apt-get install --no-install-recommends make pahole"
        );
        assert!(!by_hand(true, &["make"]).contains("sudo"));
    }

    #[test]
    fn what_is_missing_and_what_is_there_is_said() {
        assert!(line("make", false, "apt", "builds").contains("missing: apt installs it"));
        assert!(line("make", true, "apt", "builds").contains("there"));
    }
}
