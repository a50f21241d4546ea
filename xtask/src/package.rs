//! `cargo xtask package`: the guest's kernel module as a Debian package for DKMS.
//!
//! The module's Rust half is in it as an object file: a stock Debian or Ubuntu guest has a C compiler for DKMS at most, no Rust, and certainly not the
//! bare-metal target. The object calls nothing of the kernel but `memcpy` and the like, so one fits every kernel. Its source is in the
//! package too.

use crate::guest_module;
use crate::paths::Paths;
use crate::{lab, process};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const NAME: &str = "outboard-dma";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// File under `guest/package`, place in the package (`@SRC@` is the folder of the sources), mode.
const FILES: [(&str, &str, u32); 17] = [
    ("control", "DEBIAN/control", 0o644),
    ("postinst", "DEBIAN/postinst", 0o755),
    ("prerm", "DEBIAN/prerm", 0o755),
    ("postrm", "DEBIAN/postrm", 0o755),
    ("dkms.conf", "@SRC@/dkms.conf", 0o644),
    ("check-kernel", "@SRC@/check-kernel", 0o755),
    ("renew-initramfs", "@SRC@/renew-initramfs", 0o755),
    ("list-drivers", "@SRC@/list-drivers", 0o755),
    ("renew-drivers", "@SRC@/renew-drivers", 0o755),
    ("rebind", "@SRC@/rebind", 0o755),
    ("outboard-dma.service", "usr/lib/systemd/system/outboard-dma.service", 0o644),
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
    println!("{}", package.display());
    if check {
        for (kernel, module) in
            lab::build_package(paths, &unpacked(&package, &folder)?.join(&source), &folder.join("dkms"))?
        {
            println!("  {kernel:<6} {}", module.display());
        }
    }
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

    fn script(name: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg(Paths::new().expect("the clone").root.join("guest/package").join(name));
        command
    }

    /// A folder of its own for a test.
    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("outboard-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a folder");
        folder
    }

    #[test]
    fn the_list_has_every_driver_of_a_pci_or_virtio_device_once() {
        let root = folder("list-drivers");
        for (kernel, aliases) in [
            (
                "6.1",
                "# made by depmod\nalias pci:v00008086d* e1000e\nalias pci:v*d*sv*sd*bc01sc08i02* nvme\nalias usb:v1d6b* usbtest\n",
            ),
            (
                "6.12",
                "alias pci:v000010DEd* nvidia\nalias pci:v000010DEe* nvidia\nalias virtio:d00000001v* virtio_net\n\
              alias pci:v1234d0BD0* outboard_dma\nalias pci:v1af4d* e1000e\n",
            ),
        ] {
            fs::create_dir_all(root.join(kernel)).expect("a folder");
            fs::write(root.join(kernel).join("modules.alias"), aliases).expect("written");
        }
        // Twice: the second time nothing changes.
        let file = root.join("drivers.conf");
        for _ in 0..2 {
            let output =
                script("renew-drivers").arg(&file).env("MODULES_ROOT", &root).output().expect("sh runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let text = fs::read_to_string(&file).expect("it is made");
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let expected = ["e1000e", "nvidia", "nvme", "virtio_net"]
            .map(|name| format!("softdep {name} pre: outboard_dma"));
        assert_eq!(lines, expected);
        fs::remove_dir_all(&root).expect("removed");
    }

    /// A stand-in for sysfs: what `rebind` writes stays in the files.
    #[test]
    fn drivers_that_came_first_are_bound_anew_where_that_is_safe() {
        let root = folder("rebind");
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, text).expect("written");
        };
        let [net, disk, gpu, refused] = ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0", "0000:04:00.0"];
        put(
            "module/outboard_dma/parameters/unserved",
            &format!("{net} virtio-pci\n{disk} nvme\n{gpu} nouveau\n{refused} -\n"),
        );
        for address in [net, disk, gpu] {
            put(&format!("bus/pci/devices/{address}/driver/unbind"), "");
        }
        for driver in ["virtio-pci", "nvme", "nouveau"] {
            put(&format!("bus/pci/drivers/{driver}/bind"), "");
        }
        put("bus/pci/drivers_probe", "");
        put(&format!("bus/pci/devices/{disk}/nvme/nvme0/block/nvme0n1/size"), "8");
        put("proc/mounts", "/dev/nvme0n1 /mnt ext4 rw 0 0\n");
        put("proc/swaps", "");
        let output =
            script("rebind").env("SYSFS", &root).env("PROC", root.join("proc")).output().expect("sh runs");
        assert!(output.status.success());
        let read = |path: String| fs::read_to_string(root.join(path)).expect("it is there").trim().to_owned();
        assert_eq!(read(format!("bus/pci/devices/{net}/driver/unbind")), net);
        assert_eq!(read("bus/pci/drivers/virtio-pci/bind".to_owned()), net);
        assert_eq!(read("bus/pci/drivers_probe".to_owned()), refused);
        for (address, driver) in [(disk, "nvme"), (gpu, "nouveau")] {
            assert_eq!(read(format!("bus/pci/devices/{address}/driver/unbind")), "", "{driver} was unbound");
            assert_eq!(read(format!("bus/pci/drivers/{driver}/bind")), "");
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(&format!("{disk} stays without DMA: something of it is in use")), "{said}");
        assert!(said.contains(&format!("{gpu} stays without DMA: nouveau")), "{said}");
        fs::remove_dir_all(&root).expect("removed");
    }
}
