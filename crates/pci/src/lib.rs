//! PCI Express as the guest sees it: config space tables, BARs, MSI-X, the root complex with its ECAM, and root ports.
//!
//! A function implements [`PciFunction`]; [`RootComplex`] routes config accesses to it, follows its BARs on the
//! [`outboard_bus::MmioBus`] and keeps them inside the machine's windows. References are to the PCI Express Base
//! Specification 5.0 ("PCIe") and the PCI Local Bus Specification 3.0 ("PCI").

mod access;
mod config;
mod function;
mod hotplug;
mod msix;
mod port;
pub mod regs;
mod root;

pub use access::ConfigAccess;
pub use config::{BarKind, ConfigSpace, Identity};
pub use function::{BAR_COUNT, BarRange, Decoded, PciFunction, REGION_COUNT, ROM_BAR, Space};
pub use hotplug::HotPlug;
pub use msix::{Msix, MsixLayout, VectorRoutes};
pub use port::RootPort;
pub use root::{AddError, Ecam, RootComplex, Windows};
