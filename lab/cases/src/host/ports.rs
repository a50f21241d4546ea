//! Where the emulated host's PCI devices for guests are.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

/// ID of the access control services, their control register, and there what Linux asks for where it isolates: source validation, request and completion
/// redirect, upstream forwarding (PCIe 7.7.8).
const ACS: u16 = 0x0d;
const ACS_CONTROL: u64 = 6;
const ACS_ISOLATED: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;

/// A root port of the emulated host with a slot for guests behind it. `xtask` puts it there, the cases find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// An NVMe disk.
    Nvme,
    /// A network card (82574L), on one wire with the emulated host's own.
    Network,
    /// A USB controller (xHCI) with a stick.
    Usb,
    /// A SATA controller (AHCI) with a disk: a conventional PCI device, without a reset of its own.
    Sata,
    /// A sound controller (HD Audio), conventional as well.
    Sound,
    /// Two functions of one slot: a SATA controller and a sound controller, which can only be reset together.
    Several,
    /// QEMU's device for exercises (`edu`): copies by DMA on demand.
    Edu,
    /// Nothing at first: hot-pluggable, for cases that plug and pull an NVMe disk ([`PLUGGABLE`]).
    Pluggable,
    /// A network card (82540EM) whose driver resets it through I/O ports, on a network of the emulator's own.
    IoPorts,
    /// A network card that the SMMU does not cover. The last bus.
    Unprotected,
}

/// Names for the monitor: of the disk, of the device, and the device itself. With this many queues its doorbells and its MSI-X table are in different
/// 16 KiB pages, so that the guest rings the bells itself, without an exit, and the table is trapped.
pub const PLUGGABLE: (&str, &str, &str) = (
    "pluggable-disk",
    "pluggable",
    "nvme,id=pluggable,drive=pluggable-disk,bus=pluggable-port,serial=outboard-pluggable,max_ioqpairs=1100",
);

impl Port {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Nvme,
        Self::Network,
        Self::Usb,
        Self::Sata,
        Self::Sound,
        Self::Several,
        Self::Edu,
        Self::Pluggable,
        Self::IoPorts,
        Self::Unprotected,
    ];

    /// Its device number on bus 0.
    pub const fn device(self) -> u8 {
        0x10 + self as u8
    }

    /// Number of the bus behind it: the emulated host's kernel numbers them in the order of the ports.
    pub const fn bus(self) -> u8 {
        1 + self as u8
    }

    /// Its name on the emulator's command line.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Nvme => "nvme-port",
            Self::Network => "net-port",
            Self::Usb => "usb-port",
            Self::Sata => "sata-port",
            Self::Sound => "sound-port",
            Self::Several => "several-port",
            Self::Edu => "edu-port",
            Self::Pluggable => "pluggable-port",
            Self::IoPorts => "io-ports-port",
            Self::Unprotected => "unprotected-port",
        }
    }

    /// Addresses of the functions behind it, in order.
    pub fn functions(self) -> Result<Vec<String>> {
        let port = format!("/sys/bus/pci/devices/0000:00:{:02x}.0", self.device());
        let entries =
            fs::read_dir(&port).with_context(|| format!("the emulated host has no port at {port}"))?;
        let mut found: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            // The only children of a port that are named by a segment are PCI functions; services are named otherwise.
            .filter(|name| name.starts_with("0000:") && name.matches(':').count() == 2)
            .collect();
        found.sort();
        ensure!(!found.is_empty(), "nothing is behind {}", self.id());
        Ok(found)
    }

    /// Turns the port's access control on: what is plugged in afterwards gets an IOMMU group of its own. Linux (6.12, device tree) leaves it
    /// off; the port is in its device's group then, and when a guest gets that group, the port's own interrupts fault in the SMMU: its driver
    /// does not learn that a device was pulled.
    pub fn isolate(self) -> Result<()> {
        let config = self.config()?;
        let mut at = 0x100_u64;
        // ID, and the next one's place in the upper 12 bits (PCIe 7.6.3); at most 480 fit.
        for _ in 0..480 {
            let header = u32::from_le_bytes(read(&config, at)?);
            if header as u16 == ACS {
                let written = config.write_all_at(&ACS_ISOLATED.to_le_bytes(), at + ACS_CONTROL);
                return written.context("cannot turn access control on");
            }
            at = u64::from(header >> 20);
            if at == 0 {
                break;
            }
        }
        bail!("{} has no access control", self.id())
    }

    /// Its config space.
    fn config(self) -> Result<File> {
        let path = format!("/sys/bus/pci/devices/0000:00:{:02x}.0/config", self.device());
        let config = OpenOptions::new().read(true).write(true).open(&path);
        config.with_context(|| format!("cannot open {path}"))
    }

    /// The slot behind it, such as `0000:01:00`.
    pub fn slot(self) -> Result<String> {
        let functions = self.functions()?;
        let (slot, _) = functions[0].rsplit_once('.').context("a function has a number")?;
        Ok(slot.to_owned())
    }
}

fn read<const N: usize>(config: &File, at: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    config.read_exact_at(&mut bytes, at).context("cannot read a port's config space")?;
    Ok(bytes)
}
