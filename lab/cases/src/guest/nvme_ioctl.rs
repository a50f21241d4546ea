//! Commands to an NVMe controller past the block layer.
#![allow(unsafe_code)] // UNSAFETY: an ioctl of the nvme driver that no safe wrapper has.

use anyhow::{Context, Result};
use std::fs::File;
use std::os::fd::AsRawFd;

/// Admin command Get Features, and the feature Number of Queues (NVM Express 1.4, 5.14 and 5.21.1.7).
const GET_FEATURES: u8 = 0x0a;
const NUMBER_OF_QUEUES: u32 = 7;

/// `struct nvme_passthru_cmd` (Linux, include/uapi/linux/nvme_ioctl.h).
#[repr(C)]
#[derive(Default)]
struct Passthrough {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11_to_15: [u32; 5],
    timeout_ms: u32,
    result: u32,
}

nix::ioctl_readwrite!(
    /// NVME_IOCTL_ADMIN_CMD.
    admin_command,
    b'N',
    0x41,
    Passthrough
);

/// An NVMe controller, by its character device.
pub struct Controller(File);

impl Controller {
    /// The controller of the disk `name` (`nvme0n1`).
    pub fn of_disk(name: &str) -> Result<Self> {
        let (controller, _) = name.rsplit_once('n').with_context(|| format!("{name} is no NVMe disk"))?;
        let path = format!("/dev/{controller}");
        Ok(Self(File::open(&path).with_context(|| format!("cannot open {path}"))?))
    }

    /// Asks for the number of queues: a command without data.
    pub fn get_feature(&self) -> Result<u32> {
        let mut command = Passthrough { opcode: GET_FEATURES, cdw10: NUMBER_OF_QUEUES, ..Default::default() };
        // SAFETY: the structure is the driver's own and outlives the call; the command has no data that it could point to.
        unsafe { admin_command(self.0.as_raw_fd(), &mut command) }.context("Get Features failed")?;
        Ok(command.result)
    }
}
