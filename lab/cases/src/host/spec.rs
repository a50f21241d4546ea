//! A guest to be, and the command line that makes it in either monitor.

use super::{Assigned, AssignedSlot, Dma, SHARE, limits, outboard_path, peer_program};
use crate::protocol::Vmm;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// File name of the initramfs for guests with devices of the host, beside the ordinary one.
pub const INITRD_DEVICES: &str = "initrd-devices.cpio";
/// The same with our kernel module, for the kernels that it is built for.
pub const INITRD_DMA: &str = "initrd-dma.cpio";

/// Folder, among those of the kernels, of one that somebody built: it takes the place of [`Kernel::V6_12`] in guests
/// (`cargo xtask lab --guest-kernel`).
pub const OWN_KERNEL: &str = "own";

/// A kernel of the distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Linux 6.1, `arm64`.
    V6_1,
    /// Linux 6.1, `cloud-arm64`.
    V6_1Cloud,
    /// Linux 6.12, `arm64`.
    V6_12,
    /// Linux 6.12, `cloud-arm64`.
    V6_12Cloud,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::V6_1, Self::V6_1Cloud, Self::V6_12, Self::V6_12Cloud];

    /// Its folder in the share.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_1Cloud => "6.1-cloud",
            Self::V6_12 => "6.12",
            Self::V6_12Cloud => "6.12-cloud",
        }
    }

    /// Its folder in the share, or that of the kernel that stands in for it.
    fn folder(self) -> PathBuf {
        Path::new(SHARE).join("kernels").join(if self.is_own() { OWN_KERNEL } else { self.name() })
    }

    /// Whether a kernel that somebody built stands in for it. Such a kernel checks itself, says so, and is slow.
    pub fn is_own(self) -> bool {
        self == Self::V6_12 && Path::new(SHARE).join("kernels").join(OWN_KERNEL).join("Image").is_file()
    }

    /// The flat `Image`.
    pub fn image(self) -> PathBuf {
        self.folder().join("Image")
    }

    /// The initramfs with the agent and this kernel's modules.
    pub fn initrd(self) -> PathBuf {
        self.folder().join("initrd.cpio")
    }
}

/// A disk of a guest.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// `raw` or `qcow2`; Outboard sees it by itself.
    pub format: &'static str,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Its backing files, which Outboard opens only if they are named.
    pub backing: Vec<PathBuf>,
}

impl Disk {
    /// A raw image.
    pub fn raw(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), format: "raw", read_only: false, backing: vec![] }
    }

    /// A qcow2 image.
    pub fn qcow2(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), format: "qcow2", read_only: false, backing: vec![] }
    }

    /// The same over `backing`.
    pub fn over(mut self, backing: impl Into<PathBuf>) -> Self {
        self.backing.push(backing.into());
        self
    }

    /// The same for reading only.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }
}

/// Where the guest's serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// The monitor's standard input and output.
    Stdio,
    /// The monitor's standard input and output, which are a terminal.
    Terminal,
    /// A Unix socket that the monitor listens on.
    Socket(PathBuf),
}

/// A guest to be.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// Who runs it.
    pub vmm: Vmm,
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// Number of vCPUs.
    pub cpus: u32,
    /// MiB of memory.
    pub memory_mib: u64,
    /// Disks in order: `/dev/vda`, `/dev/vdb`, …
    pub disks: Vec<Disk>,
    /// User-mode network, with forwards of (port of the host, port of the guest).
    pub net: Option<Vec<(u16, u16)>>,
    /// Where the console goes.
    pub console: Console,
    /// Kernel command line.
    pub append: String,
    /// Devices of the emulated host.
    pub devices: Vec<AssignedSlot>,
    /// How they find the guest's memory (Outboard only).
    pub dma: Dma,
    /// Further arguments for Outboard.
    pub extra: Vec<OsString>,
}

impl GuestSpec {
    pub(super) fn new(case: &str, vmm: Vmm, kernel: Kernel) -> Self {
        let loglevel = if kernel.is_own() { "ignore_loglevel" } else { "quiet" };
        Self {
            vmm,
            kernel: kernel.image(),
            initrd: kernel.initrd(),
            cpus: 1,
            memory_mib: 512,
            disks: Vec::new(),
            net: None,
            console: Console::Stdio,
            append: format!("console=ttyAMA0 panic=-1 {loglevel} lab.case={case}"),
            devices: Vec::new(),
            dma: Dma::of(case),
            extra: Vec::new(),
        }
    }

    /// With this many vCPUs.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// With this much memory in MiB.
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// With one more disk.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// With a user-mode network.
    pub fn net(mut self) -> Self {
        self.net.get_or_insert_default();
        self
    }

    /// With the host's port `host` of 127.0.0.1 forwarded to the guest's port `guest`.
    pub fn forward(mut self, host: u16, guest: u16) -> Self {
        self.net.get_or_insert_default().push((host, guest));
        self
    }

    /// With the console on a Unix socket.
    pub fn console_socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.console = Console::Socket(path.into());
        self
    }

    /// With the monitor on a terminal of its own.
    pub fn terminal(mut self) -> Self {
        self.console = Console::Terminal;
        self
    }

    /// With `key` and `value` for the guest half, which asks for them with `Guest::arg`.
    pub fn arg(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        self.append.push_str(&format!(" lab.{key}={value}"));
        self
    }

    /// With more words on the kernel's command line.
    pub fn append(mut self, words: &str) -> Self {
        self.append.push(' ');
        self.append.push_str(words);
        self
    }

    /// With the devices of `assigned`, and the initramfs that has their drivers.
    pub fn devices(self, assigned: &Assigned) -> Self {
        let mut spec = self.device_drivers();
        spec.devices.extend_from_slice(assigned.slots());
        spec
    }

    /// With the initramfs that has drivers of devices, and `lspci`; only [`Kernel::V6_12`] has one. In cases named `dma-…` it also has our kernel
    /// module, `outboard_dma`, and [`Kernel::V6_1`] has one too.
    pub fn device_drivers(mut self) -> Self {
        self.initrd.set_file_name(if self.dma == Dma::Identity { INITRD_DEVICES } else { INITRD_DMA });
        self
    }

    /// With this way for its devices to find its memory, instead of the one that the case's name asks for.
    pub fn dma(mut self, dma: Dma) -> Self {
        self.dma = dma;
        self
    }

    /// With further arguments for Outboard.
    pub fn extra(mut self, args: &[&str]) -> Self {
        self.extra.extend(args.iter().map(OsString::from));
        self
    }

    /// The command that runs it.
    pub fn command(&self) -> Command {
        match self.vmm {
            Vmm::Outboard => self.outboard_command(),
            Vmm::Qemu => self.qemu_command(),
        }
    }

    fn outboard_command(&self) -> Command {
        let mut command = Command::new(outboard_path());
        if self.dma != Dma::Identity {
            limits::like_a_mac(&mut command, self.dma);
            // At the end it says what became of the mappings; `RunningVm::finish` reads that.
            command.args(["--log-level", "info"]);
        }
        command.arg("run").arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd);
        command.arg("--append").arg(&self.append);
        command.arg("--cpus").arg(self.cpus.to_string()).arg("--memory").arg(format!("{}M", self.memory_mib));
        for disk in &self.disks {
            let mut value = disk.path.clone().into_os_string();
            if disk.read_only {
                value.push(":ro");
            }
            for backing in &disk.backing {
                value.push(",backing=");
                value.push(backing);
            }
            command.arg("--disk").arg(value);
        }
        if let Some(forwards) = &self.net {
            // The cases' servers are on the emulated host's 127.0.0.1, where QEMU's user network always leads.
            let mut value = String::from("user,host-loopback=on");
            for (host, guest) in forwards {
                value.push_str(&format!(",forward=127.0.0.1:{host}:{guest}"));
            }
            command.arg("--net").arg(value);
        }
        match &self.console {
            Console::Stdio | Console::Terminal => command.arg("--console").arg("stdio"),
            Console::Socket(path) => command.arg("--console").arg(format!("socket:{}", path.display())),
        };
        for device in &self.devices {
            command.arg("--device").arg(self.dma.device(&device.slot));
        }
        command.args(&self.extra);
        command
    }

    fn qemu_command(&self) -> Command {
        let mut command = peer_program("qemu-system-aarch64");
        command.args([
            "-M",
            "virt,gic-version=3",
            "-cpu",
            "host",
            "-accel",
            "kvm",
            "-display",
            "none",
            "-nodefaults",
        ]);
        command.arg("-smp").arg(self.cpus.to_string()).arg("-m").arg(self.memory_mib.to_string());
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd);
        command.arg("-append").arg(&self.append);
        for (index, disk) in self.disks.iter().enumerate() {
            let read_only = if disk.read_only { "on" } else { "off" };
            command.arg("-drive").arg(format!(
                "if=none,id=d{index},file={},format={},read-only={read_only},discard=unmap",
                disk.path.display(),
                disk.format
            ));
            command.arg("-device").arg(format!("virtio-blk-pci,drive=d{index},disable-legacy=on"));
        }
        if let Some(forwards) = &self.net {
            let mut value = String::from("user,id=n0");
            for (host, guest) in forwards {
                value.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
            }
            command.arg("-netdev").arg(value);
            // Without its boot ROM: nothing here boots from the network, and the ROM is no part of the comparison.
            command.arg("-device").arg("virtio-net-pci,netdev=n0,disable-legacy=on,romfile=");
        }
        command.arg("-device").arg("virtio-rng-pci,disable-legacy=on");
        for (index, device) in self.devices.iter().enumerate() {
            command.arg("-device").arg(format!("pcie-root-port,id=slot{index},chassis={}", index + 1));
            for function in &device.functions {
                let number = function.rsplit('.').next().unwrap_or_default();
                let several =
                    if number == "0" && device.functions.len() > 1 { ",multifunction=on" } else { "" };
                command
                    .arg("-device")
                    .arg(format!("vfio-pci,host={function},bus=slot{index},addr=0.{number}{several}"));
            }
        }
        match &self.console {
            Console::Stdio | Console::Terminal => command.arg("-serial").arg("stdio"),
            Console::Socket(path) => {
                command.arg("-serial").arg(format!("unix:{},server=on,wait=off", path.display()))
            }
        };
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: &Command) -> Vec<String> {
        command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn both_monitors_get_the_same_guest() {
        let spec = |vmm| {
            GuestSpec::new("demo", vmm, Kernel::V6_12)
                .cpus(2)
                .memory_mib(256)
                .disk(Disk::raw("/run/case/a.raw").read_only())
                .forward(2222, 22)
                .arg("stage", 2)
        };
        let ours = words(&spec(Vmm::Outboard).command());
        let theirs = words(&spec(Vmm::Qemu).command());
        let append = "console=ttyAMA0 panic=-1 quiet lab.case=demo lab.stage=2";
        for words in [&ours, &theirs] {
            assert!(words.iter().any(|word| word == append), "{words:?}");
            assert!(words.iter().any(|word| word == "/lab/kernels/6.12/Image"));
        }
        assert!(ours.contains(&"/run/case/a.raw:ro".into()));
        assert!(ours.contains(&"user,host-loopback=on,forward=127.0.0.1:2222:22".into()));
        assert!(theirs.iter().any(|word| word.contains("hostfwd=tcp:127.0.0.1:2222-:22")));
    }
}
