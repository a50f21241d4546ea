//! Where the emulated host's PCI devices for guests are.

use anyhow::{Context, Result, ensure};
use std::fs;

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
    /// A network card that the SMMU does not cover. The last bus.
    Unprotected,
}

impl Port {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Nvme,
        Self::Network,
        Self::Usb,
        Self::Sata,
        Self::Sound,
        Self::Several,
        Self::Edu,
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

    /// The slot behind it, such as `0000:01:00`.
    pub fn slot(self) -> Result<String> {
        let functions = self.functions()?;
        let (slot, _) = functions[0].rsplit_once('.').context("a function has a number")?;
        Ok(slot.to_owned())
    }
}
