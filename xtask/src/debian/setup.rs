//! What the machine must have, and how it gets it.

use super::{Apt, Status, apt};
use crate::paths::Paths;
use crate::process;
use anyhow::{Context, Result, bail};
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

/// Installs what is missing of `needs`, after saying what and why. With `dry_run` it only says so.
pub fn ensure(paths: &Paths, needs: &[&Need], dry_run: bool) -> Result<()> {
    let missing: Vec<&&Need> = needs.iter().filter(|need| !process::exists(need.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("{} with apt:", if dry_run { "Would be installed" } else { "Installing" });
    for need in &missing {
        println!("  {:<24} {}", need.package, need.why);
    }
    if dry_run {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    let by_hand = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if !nix::unistd::geteuid().is_root() && !process::exists("sudo") {
        bail!("this needs root and there is no sudo; as root, run: {by_hand}");
    }
    let architecture = process::output(Command::new("dpkg").arg("--print-architecture"), "dpkg")?;
    let release = apt::codename()?;
    let apt = Apt::new(paths.lab.join("apt-native"), architecture.trim(), &release, Status::System)?;
    apt.update()?;
    apt.install(&packages).with_context(|| format!("to do it by hand: {by_hand}"))?;
    for need in missing {
        if !process::exists(need.program) {
            bail!("{} is installed, but there is still no program {}", need.package, need.program);
        }
    }
    Ok(())
}
