use super::{Model, SimulatedDevice, SimulatedDomain, endpoint, rtx5090};
use crate::{DmaDomain, DmaPolicy, Error, HostBarKind, HostFunction, PciAddress, Result, Selection};
use std::io;
use std::str::FromStr;
use std::sync::Arc;

/// Segment of the addresses that simulated devices pretend to have: no host has it.
const SEGMENT: u16 = 0xffff;
/// More than any guest's PCIe window.
const LARGE: u64 = 1 << 40;

/// The functions of a slot, by number, and the domain they share.
pub type Opened = (Vec<Arc<dyn HostFunction>>, Arc<dyn DmaDomain>);

/// A simulated device that can be asked for by name, to see what a guest makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimulatedKind {
    /// [`endpoint`].
    Endpoint,
    /// [`rtx5090`].
    Rtx5090,
    /// [`endpoint`] with a BAR that fits into no guest.
    LargeBar,
}

impl SimulatedKind {
    const ALL: [(Self, &str); 3] =
        [(Self::Endpoint, "endpoint"), (Self::Rtx5090, "rtx5090"), (Self::LargeBar, "large-bar")];

    /// Where it pretends to be.
    pub fn slot(self) -> Selection {
        self.address(0).slot()
    }

    fn address(self, function: u8) -> PciAddress {
        PciAddress { segment: SEGMENT, bus: 0, device: self as u8, function }
    }

    fn models(self) -> Vec<Model> {
        let wide = HostBarKind::Memory64 { prefetchable: true };
        match self {
            Self::Endpoint => vec![endpoint()],
            Self::Rtx5090 => rtx5090().into(),
            Self::LargeBar => vec![endpoint().bar(2, wide, LARGE)],
        }
    }

    /// Makes a new one and opens all its functions, in a domain of their own.
    ///
    /// # Errors
    /// [`Error::Host`] when this process is out of memory or threads, [`Error::OutOfRange`] for limits that no DART has.
    pub fn open(self, policy: DmaPolicy) -> Result<Opened> {
        let domain = match policy {
            DmaPolicy::Identity => SimulatedDomain::new(),
            DmaPolicy::Mac(config) => {
                SimulatedDomain::mac(config).map_err(|error| Error::OutOfRange { what: error.to_string() })?
            }
        };
        let mut functions: Vec<Arc<dyn HostFunction>> = vec![];
        for (number, model) in (0..).zip(self.models()) {
            let address = self.address(number);
            let failed = |source: io::Error| Error::Host { call: format!("simulate {address}"), source };
            functions.push(Arc::new(SimulatedDevice::new(address, model).map_err(failed)?.open(&domain)?));
        }
        Ok((functions, domain))
    }
}

impl FromStr for SimulatedKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let known = || Self::ALL.map(|(_, name)| name).join(", ");
        let found = Self::ALL.into_iter().find(|(_, name)| *name == text);
        found
            .map(|(kind, _)| kind)
            .ok_or_else(|| format!("no simulated device is called '{text}'; known are {}", known()))
    }
}
