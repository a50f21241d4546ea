//! What can be asked of a VM, and what it says.

use serde::{Deserialize, Serialize};

/// To a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "request")]
pub enum Request {
    /// How it is: answered with [`Answer::Status`].
    Status,
    /// Have the guest let go of a device of the host: answered with [`Answer::Done`] once it has.
    RemoveDevice {
        /// As `--device` of `outboard run` takes it.
        device: String,
        /// Seconds to wait for the guest.
        wait_s: u32,
    },
    /// Give the guest a device of the host: answered with [`Answer::Done`] once the guest has turned it on.
    AddDevice {
        /// As `--device` of `outboard run` takes it.
        device: String,
        /// Seconds to wait for the guest.
        wait_s: u32,
    },
}

/// From a VM: what it was asked for, or why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// How it is.
    Status(Box<VmStatus>),
    /// It is done; a sentence about it.
    Done(String),
    /// It is not, and why.
    Error(String),
}

/// What the guest is doing, as far as can be seen from outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestState {
    /// The machine is being built, at first or for a reboot.
    #[default]
    Starting,
    /// Its vCPUs run.
    Running,
    /// The same, and the power key was pressed.
    PoweringOff,
    /// Its vCPUs have stopped; it is taken apart.
    Stopping,
}

/// A VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// What the guest is doing.
    pub state: GuestState,
    /// Seconds since the process began to build it.
    pub uptime_s: u64,
    /// How often the guest was booted: 1, and one more for each reboot.
    pub boots: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Root ports for devices of the host, in order.
    pub slots: Vec<Slot>,
    /// Disks, in order.
    pub disks: Vec<Disk>,
    /// Networks, in order.
    pub networks: Vec<Network>,
    /// Devices that have failed and are out of use, though the machine works on.
    #[serde(default)]
    pub failed: Vec<FailedDevice>,
    /// How far the process is confined, in words.
    #[serde(default)]
    pub jail: String,
    /// Counts since the last boot; none while there is no machine.
    pub counters: Option<Counters>,
}

/// A root port and what is behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// The port's address in the guest.
    pub port: String,
    /// What is or was last there, as it was asked for.
    pub device: Option<String>,
    /// How it is with it.
    pub state: SlotState,
    /// More about the state, if there is something to say.
    pub why: Option<String>,
    /// Bus number behind the port, once the guest has given one.
    pub bus: Option<u8>,
    /// The device's functions.
    pub functions: Vec<DeviceFunction>,
    /// What the guest has asked for, where it has to ask for each mapping.
    pub dma: Option<DmaCounters>,
}

/// DMA of a slot whose guest asks for each mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaCounters {
    /// Bytes mapped now.
    pub bytes: u64,
    /// Mappings now.
    pub entries: u64,
    /// Most bytes.
    pub limit_bytes: u64,
    /// Most mappings.
    pub limit_entries: u32,
    /// Mappings made since the guest was booted.
    pub maps: u64,
    /// Mappings taken down since then.
    pub unmaps: u64,
    /// What was done that would have panicked a Mac: each is a bug of Outboard.
    pub mistakes: u64,
}

/// How it is with a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotState {
    /// Nothing is there: a device can be added.
    #[default]
    Empty,
    /// A device is there and the slot has power.
    On,
    /// A device is there; the guest has not turned the slot's power on.
    Off,
    /// The guest was asked to let go.
    Ejecting,
    /// The device vanished, or the host wanted it back. Another can be added.
    Gone,
    /// The device failed. Another can be added.
    Broken,
}

/// A function of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFunction {
    /// On the host.
    pub address: String,
    /// Vendor and device ID, hexadecimal, as `lspci -n` has them.
    pub id: String,
    /// Class, hexadecimal, 6 digits.
    pub class: String,
    /// Why it was lost, if it was.
    pub lost: Option<String>,
}

/// A virtio device that has failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedDevice {
    /// The name that the log has for it, such as `net0`.
    pub name: String,
    /// Why it failed.
    pub why: String,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Path of the image, as given.
    pub path: String,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Why flushes fail, if one has: what was written before it may be lost.
    #[serde(default)]
    pub flush_error: Option<String>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The guest's MAC address.
    pub mac: String,
    /// The network that the card is on.
    #[serde(default)]
    pub subnet: String,
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<String>,
}

/// What the machine counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Accesses of the guest to addresses where no device is.
    pub unmapped_accesses: u64,
    /// Accesses of the guest that a device refused.
    pub refused_accesses: u64,
}
