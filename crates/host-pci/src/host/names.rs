//! Names out of the host's copy of the PCI ID database, which its own tools use.

use super::{Function, Host};
use pciid_parser::Database;

/// Where distributions keep it.
const PLACES: [&str; 3] =
    ["usr/share/hwdata/pci.ids", "usr/share/misc/pci.ids", "run/current-system/sw/share/pci.ids"];

/// The PCI ID database, if the host has one.
pub struct Names(Option<Database>);

impl Host {
    /// Reads the database.
    pub fn names(&self) -> Names {
        Names(PLACES.iter().find_map(|place| Database::read_from_file(self.path(place)).ok()))
    }
}

impl Names {
    /// Maker and model: `Red Hat, Inc. QEMU NVM Express Controller`; the IDs, where there is no name.
    pub fn device(&self, function: &Function) -> String {
        let Function { vendor, device, .. } = *function;
        let known = self.0.as_ref().and_then(|db| db.vendors.get(&vendor));
        match known.map(|v| (&v.name, v.devices.get(&device))) {
            Some((maker, Some(model))) => format!("{maker} {}", model.name),
            Some((maker, None)) => format!("{maker} {device:04x}"),
            None => format!("{vendor:04x}:{device:04x}"),
        }
    }

    /// What kind of device it is: `Non-Volatile memory controller`; `class 0108` where there is no name.
    pub fn class(&self, function: &Function) -> String {
        let (class, subclass) = ((function.class >> 16) as u8, (function.class >> 8) as u8);
        let known = self.0.as_ref().and_then(|db| db.classes.get(&class));
        match known.map(|c| (&c.name, c.subclasses.get(&subclass))) {
            Some((_, Some(exact))) => exact.name.clone(),
            Some((broad, None)) => broad.clone(),
            None => format!("class {class:02x}{subclass:02x}"),
        }
    }
}
