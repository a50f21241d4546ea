use crate::{PciAddress, Selection};
use std::io;
use std::path::PathBuf;

/// Why a function cannot be given to a guest, bound or released, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Another operating system.
    #[error("handing out PCI devices works on Linux only for now; on a Mac it is yet to come")]
    NotYet,
    /// Nothing is there.
    #[error("this host has no PCI function at {0}; `outboard devices` lists those it has")]
    Unknown(Selection),
    /// A bridge is part of the host.
    #[error("{0} is a bridge, part of the host itself; choose a device behind it")]
    Bridge(PciAddress),
    /// No IOMMU.
    #[error(
        "no IOMMU covers {0}, so a guest with it could reach all memory: turn the IOMMU on in the firmware (VT-d, AMD-Vi, SMMU) and, with an Intel CPU, boot with intel_iommu=on"
    )]
    NoIommu(PciAddress),
    /// The IOMMU cannot tell it from others.
    #[error(
        "{address} shares IOMMU group {group} with {others}: bind these too if the guest may have them, or move the card to another slot"
    )]
    GroupShared {
        /// The function asked for.
        address: PciAddress,
        /// The group's number.
        group: u32,
        /// The foreign functions with their drivers.
        others: String,
    },
    /// The host's own disk.
    #[error(
        "{address} is in use as a disk of this host: {device} {how}; unmount it first, or choose another device"
    )]
    Disk {
        /// The function.
        address: PciAddress,
        /// The block device.
        device: String,
        /// What it is used for.
        how: String,
    },
    /// The host's own network.
    #[error(
        "{address} is in use as this host's network: {interface} {how}; take the interface down first, or choose another device"
    )]
    Network {
        /// The function.
        address: PciAddress,
        /// The network interface.
        interface: String,
        /// What it is used for.
        how: String,
    },
    /// The driver that hands it over is missing.
    #[error("the kernel's vfio-pci driver is not loaded: run `sudo modprobe vfio-pci`")]
    NoVfio,
    /// Another driver has it.
    #[error(
        "{address} is not bound to vfio-pci ({driver} has it): run `sudo outboard devices bind {selection}`"
    )]
    NotBound {
        /// What was asked for.
        selection: Selection,
        /// The function.
        address: PciAddress,
        /// What has it.
        driver: String,
    },
    /// Nothing to do.
    #[error("{0} is already bound to vfio-pci; `outboard run --device {0}` can use it")]
    AlreadyBound(Selection),
    /// Nothing to give back.
    #[error("{0} is not bound to vfio-pci, so there is nothing to release")]
    NotOurs(Selection),
    /// Another process uses it.
    #[error(
        "{address} is in use by another process, which has /dev/vfio/{group} open: stop that virtual machine first"
    )]
    Busy {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
    },
    /// It failed before.
    #[error(
        "{0} did not come back from a reset and is kept back: power-cycle or unplug it, or run `sudo outboard devices release {0}` to try it again"
    )]
    Quarantined(PciAddress),
    /// No right.
    #[error("no permission for {path}: run this with sudo, or let your user have that file")]
    Denied {
        /// The file.
        path: PathBuf,
    },
    /// A file of the kernel failed.
    #[error("{path}: {source}")]
    Sysfs {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The driver did not take it.
    #[error("{address} was offered to {driver}, which did not take it: see `dmesg`")]
    NotTaken {
        /// The function.
        address: PciAddress,
        /// The driver.
        driver: String,
    },
    /// Opening it failed.
    #[error(transparent)]
    Function(#[from] crate::Error),
}
