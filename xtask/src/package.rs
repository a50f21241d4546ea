//! `cargo xtask package`: the guest's kernel module as a Debian package for DKMS.
//!
//! The module's Rust half is in it as an object file: a stock Debian or Ubuntu guest has a C compiler for DKMS at most, no Rust, and certainly not the
//! bare-metal target. The object calls nothing of the kernel but `memcpy` and the like, so one fits every kernel. Its source is in the
//! package too.

use crate::guest_module;
use crate::paths::Paths;
use crate::{lab, process, progress};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const NAME: &str = "outboard-dma";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// File under `guest/package`, place in the package (`@SRC@` is the folder of the sources), mode.
const FILES: [(&str, &str, u32); 13] = [
    ("control", "DEBIAN/control", 0o644),
    ("postinst", "DEBIAN/postinst", 0o755),
    ("prerm", "DEBIAN/prerm", 0o755),
    ("postrm", "DEBIAN/postrm", 0o755),
    ("dkms.conf", "@SRC@/dkms.conf", 0o644),
    ("check-kernel", "@SRC@/check-kernel", 0o755),
    ("renew-initramfs", "@SRC@/renew-initramfs", 0o755),
    ("modprobe.conf", "usr/lib/modprobe.d/outboard-dma.conf", 0o644),
    ("modules-load.conf", "usr/lib/modules-load.d/outboard-dma.conf", 0o644),
    ("initramfs-hook", "usr/share/initramfs-tools/hooks/outboard-dma", 0o755),
    ("dracut.conf", "usr/lib/dracut/dracut.conf.d/50-outboard-dma.conf", 0o644),
    ("copyright", "usr/share/doc/outboard-dma-dkms/copyright", 0o644),
    ("README.md", "usr/share/doc/outboard-dma-dkms/README.md", 0o644),
];
/// Source of the Rust half: folders of the clone.
const RUST: [&str; 3] = ["guest/module/core", "crates/windows", "crates/abi"];

/// Builds the package; with `check` also the module out of it, as DKMS would, for the lab's kernels.
pub fn run(paths: &Paths, check: bool) -> Result<bool> {
    progress::begin("package");
    let folder = paths.target().join("package");
    let root = folder.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    let source = format!("usr/src/{NAME}-{VERSION}");
    guest_module::lay_out_package(paths, &root.join(&source))?;
    for name in RUST {
        copy_tree(&paths.root.join(name), &root.join(&source).join("rust").join(name))?;
    }
    for (file, place, mode) in FILES {
        let text = fs::read_to_string(paths.root.join("guest/package").join(file))
            .with_context(|| format!("cannot read guest/package/{file}"))?;
        place_file(&root.join(place.replace("@SRC@", &source)), &text.replace("@VERSION@", VERSION), mode)?;
    }
    let package = folder.join(format!("{NAME}-dkms_{VERSION}_arm64.deb"));
    let mut command = Command::new("dpkg-deb");
    command.args(["--root-owner-group", "-Zxz", "--build"]).arg(&root).arg(&package);
    process::output(&mut command, "dpkg-deb")?;
    progress::say(&package.display().to_string());
    if check {
        for (kernel, module) in lab::build_package(
            paths,
            &unpacked(&package, &folder)?.join(&source),
            &paths.kbuild.join("dkms"),
        )? {
            progress::say(&format!("  {kernel:<6} {}", module.display()));
        }
    }
    progress::end();
    Ok(true)
}

fn unpacked(package: &Path, folder: &Path) -> Result<PathBuf> {
    let to = folder.join("unpacked");
    if to.exists() {
        fs::remove_dir_all(&to)?;
    }
    process::output(Command::new("dpkg-deb").arg("--extract").arg(package).arg(&to), "dpkg-deb --extract")?;
    Ok(to)
}

fn place_file(to: &Path, text: &str, mode: u32) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file has a folder")?)?;
    fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    ensure!(from.is_dir(), "there is no {}", from.display());
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "target" {
                copy_tree(&entry.path(), &to)?;
            }
        } else {
            fs::copy(entry.path(), &to).with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's configuration, and whether the module can be built for it.
    #[test]
    fn kernels_that_cannot_have_the_module_are_told_apart() {
        let folder = std::env::temp_dir().join(format!("outboard-check-kernel-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let script = Paths::new().expect("the clone").root.join("guest/package/check-kernel");
        for (config, good) in [
            ("CONFIG_XEN=y\nCONFIG_ARCH_HAS_DMA_OPS=y\n", true),
            ("CONFIG_DMA_OPS=y\n", true),
            ("# CONFIG_XEN is not set\nCONFIG_HAS_DMA=y\n", false),
            ("CONFIG_NEED_SG_DMA_LENGTH=y\n# CONFIG_ARCH_HAS_DMA_OPS is not set\n", false),
        ] {
            fs::write(folder.join(".config"), config).expect("written");
            let output =
                Command::new("sh").arg(&script).arg(&folder).arg("6.99-x").output().expect("sh runs");
            assert_eq!(output.status.success(), good, "{config}");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(said.contains("Linux 6.99-x cannot have this module"), !good, "{said}");
        }
        fs::remove_dir_all(&folder).expect("removed");
    }
}
