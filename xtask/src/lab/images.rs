//! What the emulated host boots from, and what it finds in the share.

use super::libraries::{self, LOADER};
use super::modules::{Module, Modules};
use super::packages::Packages;
use crate::guest_module::{self, Built};
use crate::paths::Paths;
use crate::stamp;
use anyhow::{Context, Result, bail};
use cpio::newc::{self, ModeFileType};
use lab_cases::host::{CASE_MODULES, INITRD_DEVICES, INITRD_DMA, Kernel, MODULES, OWN_KERNEL};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Kernels that the emulated host is started with; `host_kernel` of a case says which it gets.
pub const HOST_KERNELS: [Kernel; 2] = [Kernel::V6_1, Kernel::V6_12];
/// Modules that guest halves may ask for.
const GUEST_MODULES: [&str; 9] = [
    "virtio_pci",
    "nvme",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "gpio_keys",
    "evdev",
    "virtio_console",
];
/// And those that need a device of the host: in an initramfs of its own, so that other guests start as fast as before.
const DEVICE_MODULES: [&str; 8] = [
    "e1000",
    "e1000e",
    "xhci_pci",
    "usb_storage",
    "sd_mod",
    "ahci",
    "snd_hda_codec_generic",
    "snd_hda_intel",
];
/// Programs of busybox that have a name of their own in the shell.
const APPLETS: [&str; 34] = [
    "sh",
    "ls",
    "cat",
    "cp",
    "mv",
    "rm",
    "mkdir",
    "mount",
    "umount",
    "dd",
    "dmesg",
    "free",
    "grep",
    "head",
    "hexdump",
    "ip",
    "kill",
    "less",
    "lspci",
    "more",
    "nslookup",
    "ping",
    "poweroff",
    "ps",
    "reboot",
    "sed",
    "sha256sum",
    "sleep",
    "tail",
    "top",
    "uname",
    "vi",
    "wget",
    "wc",
];

/// What an emulated host boots.
pub struct HostImages {
    /// The kernel's version, for the names of logs.
    pub name: &'static str,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// What some cases need and others do not.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras<'a> {
    /// The distribution's QEMU.
    pub peer: bool,
    /// The guest's kernel module, in initramfs images of its own.
    pub dma_module: bool,
    /// Where the kernel was built that guests get instead of Linux 6.12.
    pub own_kernel: Option<&'a Path>,
}

/// Makes the emulated host's images and fills the share. `programs` is the folder with the arm64 programs.
pub fn prepare(paths: &Paths, packages: &Packages, programs: &Path, extras: Extras<'_>) -> Result<()> {
    let agent = programs.join("lab-agent");
    let busybox = packages.busybox();
    let sums = stamp::sum(&[&agent, &busybox])?;
    let wanted = [&MODULES[..], &CASE_MODULES].concat();
    for kernel in HOST_KERNELS {
        let (root, HostImages { name, initrd, .. }) = (packages.kernel(kernel), host(paths, kernel));
        let inputs = format!("{sums}{}\n{wanted:?}{APPLETS:?}", root.display());
        stamp::once(paths, &format!("host-initramfs-{name}"), &inputs, &[&initrd], || {
            let archive = initramfs(&agent, &busybox, &mut Modules::scan(root)?, &wanted)?;
            stamp::write_whole(&initrd, &archive.finish()?)
        })?;
    }
    for kernel in Kernel::ALL {
        let root = packages.kernel(kernel);
        let folder = paths.share().join("kernels").join(kernel.name());
        let image = folder.join("Image");
        stamp::once(
            paths,
            &format!("kernel-{}", kernel.name()),
            &root.display().to_string(),
            &[&image],
            || flat_image(&kernel_file(root)?, &image),
        )?;
        let initrd = folder.join("initrd.cpio");
        let inputs = format!("{sums}{}\n{GUEST_MODULES:?}{APPLETS:?}", root.display());
        stamp::once(paths, &format!("initramfs-{}", kernel.name()), &inputs, &[&initrd], || {
            let archive = initramfs(&agent, &busybox, &mut Modules::scan(root)?, &GUEST_MODULES)?;
            stamp::write_whole(&initrd, &archive.finish()?)
        })?;
    }
    let root = packages.kernel(Kernel::V6_12);
    devices_initramfs(
        paths,
        root,
        &[&agent, &busybox],
        &[],
        &initrd_of(paths, Kernel::V6_12, INITRD_DEVICES),
    )?;
    if extras.dma_module {
        let mut all = guest_modules(paths, packages)?;
        for kernel in WITH_MODULE {
            let built = all.remove(kernel.name()).context("it was just built")?;
            let initrd = initrd_of(paths, kernel, INITRD_DMA);
            devices_initramfs(paths, packages.kernel(kernel), &[&agent, &busybox], &built.files, &initrd)?;
        }
    }
    own_kernel(paths, extras.own_kernel, &[&agent, &busybox])?;
    super::formats::prepare(paths, &paths.share().join("kernels/6.12-cloud/Image"))?;
    // A disk that nobody can open for writing: the share is read-only.
    stamp::write_whole(&paths.share().join("kernels/6.12/frozen.raw"), &[0; 4096])?;
    for program in ["outboard", "hv-conformance", "host-pci-conformance"] {
        let from = programs.join(program);
        if from.is_file() {
            stamp::copy_if_changed(&from, &paths.share().join("bin").join(program))?;
        }
    }
    if extras.peer {
        super::peer::prepare(paths)?;
    }
    Ok(())
}

/// The images of the emulated host with `kernel`, one of [`HOST_KERNELS`], as [`prepare`] makes them.
pub fn host(paths: &Paths, kernel: Kernel) -> HostImages {
    let name = kernel.name();
    let initrd = paths.lab.join(format!("host-{name}.cpio"));
    HostImages { name, kernel: paths.share().join("kernels").join(name).join("Image"), initrd }
}

/// Kernels whose guests can have the DMA module.
const WITH_MODULE: [Kernel; 2] = [Kernel::V6_1, Kernel::V6_12];

/// Builds the guest's kernel modules.
pub fn guest_modules(paths: &Paths, packages: &Packages) -> Result<BTreeMap<String, Built>> {
    let images = WITH_MODULE
        .iter()
        .map(|kernel| Ok((kernel.name().to_owned(), guest_module::package_of(packages.kernel(*kernel))?)));
    guest_module::build(paths, &images.collect::<Result<Vec<_>>>()?)
}

/// Builds the package's `source` as DKMS does, for the same kernels.
pub fn dkms_modules(
    paths: &Paths,
    packages: &Packages,
    source: &Path,
    tree: &Path,
) -> Result<Vec<(&'static str, PathBuf)>> {
    let build = |kernel: &Kernel| {
        let image = guest_module::package_of(packages.kernel(*kernel))?;
        let tree = tree.join(kernel.name());
        Ok((kernel.name(), guest_module::build_by_dkms(paths, kernel.name(), &image, source, &tree)?))
    };
    WITH_MODULE.iter().map(build).collect()
}

/// Puts the kernel that was built in `folder` into the share, with an initramfs of each kind; without one, takes the last one out.
fn own_kernel(paths: &Paths, folder: Option<&Path>, programs: &[&Path; 2]) -> Result<()> {
    let place = paths.share().join("kernels").join(OWN_KERNEL);
    if place.exists() {
        fs::remove_dir_all(&place)?;
    }
    let Some(folder) = folder else { return Ok(()) };
    let folder = fs::canonicalize(folder).with_context(|| format!("there is no {}", folder.display()))?;
    let built = guest_module::build_for(paths, OWN_KERNEL, &folder)?;
    let archive = initramfs(programs[0], programs[1], &mut Modules::scan(&folder)?, &GUEST_MODULES)?;
    stamp::write_whole(&place.join("initrd.cpio"), &archive.finish()?)?;
    devices_initramfs(paths, &folder, programs, &[], &place.join(INITRD_DEVICES))?;
    devices_initramfs(paths, &folder, programs, &built.files, &place.join(INITRD_DMA))?;
    // Last: the host halves go by it.
    flat_image(&folder.join("arch/arm64/boot/Image"), &place.join("Image"))
}

fn kernel_file(root: &Path) -> Result<PathBuf> {
    let files = fs::read_dir(root.join("boot")).context("a kernel package has a folder boot")?;
    let mut files = files.flatten().map(|entry| entry.path());
    let is_kernel =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"));
    files.find(is_kernel).with_context(|| format!("{} has no boot/vmlinuz…", root.display()))
}

/// Debian's arm64 kernels are flat images; if one comes compressed, it is unpacked.
fn flat_image(from: &Path, to: &Path) -> Result<()> {
    let mut bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if bytes.starts_with(&[0x1F, 0x8B]) {
        let output = Command::new("gzip").arg("-dc").arg(from).output().context("cannot start gzip")?;
        bytes = output.stdout;
    }
    // Linux, Documentation/arch/arm64/booting.rst: the magic number at offset 56.
    if bytes.get(56..60) != Some(b"ARM\x64") {
        bail!("{} is no arm64 kernel image", from.display());
    }
    stamp::write_whole(to, &bytes)
}

/// The initramfs of guests with a device of the host: its drivers, `lspci`, and the modules in `own`. `programs` are the agent and busybox.
fn devices_initramfs(
    paths: &Paths,
    root: &Path,
    programs: &[&Path; 2],
    own: &[PathBuf],
    initrd: &Path,
) -> Result<()> {
    let tools = paths.lab.join("pciutils");
    stamp::once(paths, "pciutils", "1", &[&tools.join(LOADER)], || {
        libraries::fetch(paths, &["pciutils"], &["lspci"], &tools)
    })?;
    let wanted = [&GUEST_MODULES[..], &DEVICE_MODULES].concat();
    let mut files: Vec<&Path> = programs.to_vec();
    files.extend(own.iter().map(PathBuf::as_path));
    let inputs = format!("{}{}\n{wanted:?}{APPLETS:?}", stamp::sum(&files)?, root.display());
    let name = initrd.strip_prefix(paths.share()).unwrap_or(initrd).display().to_string().replace('/', "-");
    stamp::once(paths, &name, &inputs, &[initrd], || {
        let mut modules = Modules::scan(root)?;
        let mut wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
        for file in own {
            wanted.push(modules.add_file(file)?);
        }
        let mut archive = initramfs(programs[0], programs[1], &mut modules, &wanted)?;
        // Beside busybox's own, which shows less.
        archive.add("sbin", ModeFileType::Directory, 0o755, &[])?;
        archive.add("sbin/lspci", ModeFileType::Regular, 0o755, &fs::read(tools.join("bin/lspci"))?)?;
        archive.add(
            &format!("lib/{LOADER}"),
            ModeFileType::Regular,
            0o755,
            &fs::read(tools.join(LOADER))?,
        )?;
        for entry in fs::read_dir(tools.join("lib"))?.flatten() {
            let name = format!("lib/{}", entry.file_name().to_string_lossy());
            // The loader is among the libraries that libraries ask for.
            if entry.file_name() != LOADER {
                archive.add(&name, ModeFileType::Regular, 0o755, &fs::read(entry.path())?)?;
            }
        }
        stamp::write_whole(initrd, &archive.finish()?)
    })?;
    Ok(())
}

fn initrd_of(paths: &Paths, kernel: Kernel, file: &str) -> PathBuf {
    paths.share().join("kernels").join(kernel.name()).join(file)
}

fn initramfs(
    agent: &Path,
    busybox: &Path,
    modules: &mut Modules,
    wanted: &[impl AsRef<str>],
) -> Result<Archive> {
    let (list, files) = modules.pack(wanted)?;
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "etc", "lib", "lib/modules", "proc", "run", "sys", "tmp"] {
        archive.add(folder, ModeFileType::Directory, 0o755, &[])?;
    }
    archive.add("init", ModeFileType::Regular, 0o755, &fs::read(agent)?)?;
    archive.add("bin/busybox", ModeFileType::Regular, 0o755, &fs::read(busybox)?)?;
    archive.add("bin/udhcpc-hook", ModeFileType::Symlink, 0o777, b"/init")?;
    for applet in APPLETS {
        archive.add(&format!("bin/{applet}"), ModeFileType::Symlink, 0o777, b"busybox")?;
    }
    archive.add("etc/modules.load", ModeFileType::Regular, 0o644, list.as_bytes())?;
    for Module { path, bytes } in files {
        archive.add(path.trim_start_matches('/'), ModeFileType::Regular, 0o644, &bytes)?;
    }
    Ok(archive)
}

/// A cpio archive in the kernel's format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, kind: ModeFileType, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let builder = newc::Builder::new(name).ino(self.entries).nlink(1).mode(mode).set_mode_file_type(kind);
        let mut writer = builder.write(&mut self.bytes, u32::try_from(content.len())?);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        newc::trailer(&mut self.bytes)?;
        Ok(self.bytes)
    }
}
