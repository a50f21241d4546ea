//! Config space of functions in the guest, past their drivers.

use super::function::GuestFunction;
use anyhow::{Context, Result, bail};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

/// COMMAND register (PCIe 7.5.1.1.3).
pub const COMMAND: u16 = 0x04;
/// It answers to memory accesses.
pub const COMMAND_MEMORY: u32 = 1 << 1;
/// It may do DMA.
pub const COMMAND_BUS_MASTER: u32 = 1 << 2;
/// The first of six base address registers.
pub const BAR_0: u16 = 0x10;
/// Capability: MSI-X.
pub const MSIX: u8 = 0x11;
/// Capability: PCI Express.
pub const EXPRESS: u8 = 0x10;
/// Of a bridge: memory window, prefetchable window with its upper halves, control.
const WINDOWS: u16 = 0x20;
const BRIDGE_CONTROL: u16 = 0x3e;
const SECONDARY_BUS_RESET: u32 = 1 << 6;

/// The config space of a function.
pub struct Config {
    file: File,
    address: String,
}

impl Config {
    /// That of `function`.
    pub fn open(function: &GuestFunction) -> Result<Self> {
        let path = function.folder().join("config");
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { file, address: function.address.clone() })
    }

    /// Bytes: 256 or 4096.
    pub fn len(&self) -> Result<u16> {
        Ok(u16::try_from(self.file.metadata()?.len())?)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads 1, 2 or 4 bytes: as one access if `at` is a multiple of the width.
    pub fn read(&self, at: u16, width: u16) -> Result<u32> {
        let mut bytes = [0; 4];
        self.file
            .read_exact_at(&mut bytes[..usize::from(width)], at.into())
            .with_context(|| format!("reading config space of {} at {at:#x}", self.address))?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes 1, 2 or 4 bytes, likewise.
    pub fn write(&self, at: u16, width: u16, value: u32) -> Result<()> {
        self.file
            .write_all_at(&value.to_le_bytes()[..usize::from(width)], at.into())
            .with_context(|| format!("writing config space of {} at {at:#x}", self.address))
    }

    /// Sets the bits of `mask` in a word to those of `value`.
    pub fn update(&self, at: u16, mask: u32, value: u32) -> Result<()> {
        let old = self.read(at, 2)?;
        self.write(at, 2, old & !mask | value & mask)
    }

    /// Where a capability is.
    pub fn capability(&self, id: u8) -> Result<Option<u16>> {
        let mut at = self.read(0x34, 1)? as u16;
        // At most 48 capabilities fit.
        for _ in 0..48 {
            if at < 0x40 {
                return Ok(None);
            }
            if self.read(at, 1)? == u32::from(id) {
                return Ok(Some(at));
            }
            at = self.read(at + 1, 1)? as u16;
        }
        bail!("the capabilities of {} are a loop", self.address)
    }
}

/// The root port that a function is behind.
pub struct PortConfig {
    config: Config,
    windows: [u32; 4],
}

impl PortConfig {
    /// That of `function`.
    pub fn above(function: &GuestFunction) -> Result<Self> {
        let folder = std::fs::canonicalize(function.folder())?;
        let name =
            folder.parent().and_then(|port| port.file_name()?.to_str()).context("it is behind no port")?;
        let config = Config::open(&GuestFunction { address: name.to_owned() })?;
        let mut windows = [0; 4];
        for (at, window) in (WINDOWS..).step_by(4).zip(&mut windows) {
            *window = config.read(at, 4)?;
        }
        Ok(Self { config, windows })
    }

    /// Opens its windows to all there is, below and above 4 GiB.
    pub fn open_windows(&self) -> Result<()> {
        self.set_windows([0xfff0_0000, 0xfff0_0000, 0, u32::MAX])
    }

    /// Puts the windows back.
    pub fn restore_windows(&self) -> Result<()> {
        self.set_windows(self.windows)
    }

    fn set_windows(&self, values: [u32; 4]) -> Result<()> {
        (WINDOWS..).step_by(4).zip(values).try_for_each(|(at, value)| self.config.write(at, 4, value))
    }

    /// Resets what is behind it.
    pub fn reset_slot(&self) -> Result<()> {
        self.config.update(BRIDGE_CONTROL, SECONDARY_BUS_RESET, SECONDARY_BUS_RESET)?;
        std::thread::sleep(std::time::Duration::from_millis(2));
        self.config.update(BRIDGE_CONTROL, SECONDARY_BUS_RESET, 0)
    }
}
