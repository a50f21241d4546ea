//! Taking a function from the host's driver for a guest, and giving it back.

use super::{Function, Host, Refusal, VFIO_DRIVER, link_name};
use crate::{PciAddress, Selection};
use std::io;

impl Host {
    /// Binds what `selection` means to vfio-pci: whole slots unless it names one function. All or nothing.
    ///
    /// # Errors
    /// Any [`Refusal`]; nothing is changed then.
    pub fn bind(&self, selection: Selection) -> Result<Vec<PciAddress>, Refusal> {
        let functions = self.select(selection)?;
        for function in &functions {
            if let Some(obstacle) = self.obstacles(function, &functions).into_iter().next() {
                return Err(obstacle);
            }
        }
        if functions.iter().all(Function::bound) {
            return Err(Refusal::AlreadyBound(selection));
        }
        if !self.path("sys/bus/pci/drivers").join(VFIO_DRIVER).is_dir() {
            return Err(Refusal::NoVfio);
        }
        let mut bound = vec![];
        for function in functions.iter().filter(|f| !f.bound()) {
            if let Err(error) = self.bind_one(function, &functions) {
                for address in bound.into_iter().chain([function.address]) {
                    self.undo(address);
                }
                return Err(error);
            }
            bound.push(function.address);
        }
        Ok(bound)
    }

    /// Gives what `selection` means back to the host's drivers, and takes it out of quarantine. Says which driver has each now.
    ///
    /// # Errors
    /// [`Refusal::Unknown`], [`Refusal::NotOurs`], [`Refusal::Busy`] while a virtual machine uses it, [`Refusal::Denied`], [`Refusal::Sysfs`].
    pub fn release(&self, selection: Selection) -> Result<Vec<(PciAddress, Option<String>)>, Refusal> {
        let mut ours = self.select(selection)?;
        ours.retain(|f| f.bound() || f.quarantined());
        if ours.is_empty() {
            return Err(Refusal::NotOurs(selection));
        }
        // Unbinding would wait until the virtual machine ends.
        for function in &ours {
            self.check_idle(function)?;
        }
        ours.iter().map(|f| Ok((f.address, self.release_one(f)?))).collect()
    }

    fn bind_one(&self, function: &Function, with: &[Function]) -> Result<(), Refusal> {
        let address = function.address;
        let folder = self.function_path(address);
        self.write(&folder.join("driver_override"), VFIO_DRIVER)?;
        if function.driver.is_some() {
            self.write(&folder.join("driver/unbind"), &address.to_string())?;
        }
        self.write(&self.path("sys/bus/pci/drivers_probe"), &address.to_string())?;
        let now = self.function(address);
        if now.bound() {
            // Some hosts tell only now which group it is in, and so with whom.
            return self.sharers(&now, with).map_or(Ok(()), Err);
        }
        // vfio-pci does not take what has no group.
        Err(if now.group.is_none() {
            Refusal::NoIommu(address)
        } else {
            Refusal::NotTaken { address, driver: VFIO_DRIVER.into() }
        })
    }

    fn release_one(&self, function: &Function) -> Result<Option<String>, Refusal> {
        let address = function.address;
        let folder = self.function_path(address);
        // A newline alone clears it.
        self.write(&folder.join("driver_override"), "\n")?;
        if function.driver.is_some() {
            self.write(&folder.join("driver/unbind"), &address.to_string())?;
        }
        self.write(&self.path("sys/bus/pci/drivers_probe"), &address.to_string())?;
        Ok(self.driver(address))
    }

    /// After a failed binding: back to the host's driver as far as possible.
    fn undo(&self, address: PciAddress) {
        let function = self.function(address);
        if function.driver_override.as_deref() != Some(VFIO_DRIVER) {
            // It failed before anything was changed.
            return;
        }
        if let Err(error) = self.release_one(&function) {
            tracing::warn!("{address} could not be given back to the host's driver: {error}");
        }
    }

    fn driver(&self, address: PciAddress) -> Option<String> {
        link_name(&self.function_path(address).join("driver"))
    }

    /// A group can be opened once; opening it tells whether somebody has.
    fn check_idle(&self, function: &Function) -> Result<(), Refusal> {
        let Some(group) = function.group.filter(|_| function.bound()) else { return Ok(()) };
        let path = self.path(&format!("dev/vfio/{group}"));
        match std::fs::OpenOptions::new().read(true).write(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
                Err(Refusal::Busy { address: function.address, group })
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(Refusal::Denied { path }),
            _ => Ok(()),
        }
    }
}
