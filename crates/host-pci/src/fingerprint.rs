//! What of a function's config space must be the same after a reset, and what is put back.

use crate::Result;
use crate::capabilities::{self, ReadDword};

/// Registers that tell that a function is the same, as it was: read once when it is opened, compared after each reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    /// Vendor and device ID, class and revision, subsystem, and the six BARs with their addresses.
    header: Vec<(u16, u32)>,
    capabilities: Vec<(u8, u16)>,
    extended: Vec<(u32, u16)>,
}

impl Fingerprint {
    /// Reads it: `header` the hardware's first 64 bytes, `chains` the capability chains.
    pub(crate) fn take(header: ReadDword<'_>, chains: ReadDword<'_>, config_len: u16) -> Result<Self> {
        const KEPT: [u16; 9] = [0x00, 0x08, 0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x2c];
        Ok(Self {
            header: KEPT.iter().map(|at| Ok((*at, header(*at)?))).collect::<Result<_>>()?,
            capabilities: capabilities::list(chains)?,
            extended: capabilities::list_extended(chains, config_len)?,
        })
    }

    /// Says how `now` differs; `None` if it does not.
    pub(crate) fn difference(&self, now: &Self) -> Option<String> {
        let changed = self.header.iter().zip(&now.header).find(|(was, is)| was != is);
        if let Some(((at, was), (_, is))) = changed {
            return Some(format!("config register {at:#04x} was {was:#010x} and is {is:#010x}"));
        }
        if self.capabilities != now.capabilities || self.extended != now.extended {
            return Some("its capabilities are not those it had".into());
        }
        None
    }
}

/// Registers that a guest may change and a reset may leave changed, with the bytes to put back.
#[derive(Clone, Debug)]
pub(crate) struct Settings(Vec<(u16, u8)>);

impl Settings {
    /// Reads them when the function is opened.
    pub(crate) fn take(read: ReadDword<'_>) -> Result<Self> {
        // Command without its bus master bit; cache line and latency; interrupt line.
        let mut spans = vec![(0x04, 2), (0x0c, 2), (0x3c, 1)];
        if let Some(pcie) = capabilities::find(read, capabilities::PCIE)?.filter(|at| *at <= 0x100 - 0x2c) {
            // Device, link and second device control (PCIe 7.5.3.4, .7, .16); the last only in version 2.
            spans.extend([(pcie + 0x08, 2), (pcie + 0x10, 2)]);
            if read(pcie)? >> 16 & 0xf >= 2 {
                spans.push((pcie + 0x28, 2));
            }
        }
        let mut bytes = vec![];
        for at in spans.into_iter().flat_map(|(at, len)| at..at + len) {
            bytes.push((at, (read(at & !3)? >> (8 * (at & 3))) as u8));
        }
        bytes.iter_mut().filter(|b| b.0 == 0x04).for_each(|b| b.1 &= !4);
        Ok(Self(bytes))
    }

    /// Those that are different now, with what they were.
    pub(crate) fn changed(&self, read: ReadDword<'_>) -> Result<Vec<(u16, u8)>> {
        let mut changed = vec![];
        for (at, was) in &self.0 {
            if (read(at & !3)? >> (8 * (at & 3))) as u8 != *was {
                changed.push((*at, *was));
            }
        }
        Ok(changed)
    }
}
