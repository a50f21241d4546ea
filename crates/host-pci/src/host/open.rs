//! Opening a slot for a guest.

use super::{Function, Host, Refusal};
use crate::vfio::{DmaPolicy, VfioDomain, VfioFunction};
use crate::{DmaDomain, Error, HostFunction, Selection};
use std::io;
use std::sync::Arc;

/// The functions of a slot, open for this process alone, and the domain they share.
pub struct Opened {
    /// By address.
    pub functions: Vec<Arc<dyn HostFunction>>,
    /// Where they find memory.
    pub domain: Arc<dyn DmaDomain>,
}

impl Host {
    /// Opens what `selection` means, which is bound to vfio-pci already.
    ///
    /// # Errors
    /// Any [`Refusal`]: everything that stands against it has a name.
    pub fn open_slot(&self, selection: Selection, policy: DmaPolicy) -> Result<Opened, Refusal> {
        let functions = self.select(selection)?;
        let mut groups = vec![];
        for function in &functions {
            groups.push(self.check_open(selection, function, &functions)?);
        }
        let mut distinct = groups.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let refused = |error| refusal(error, &functions, &groups);
        let domain = VfioDomain::new(&distinct, policy).map_err(refused)?;
        let open = |(function, group): (&Function, &u32)| {
            let sysfs = self.function_path(function.address);
            let opened = VfioFunction::open(function.address, *group, &domain, &sysfs)?;
            Ok(Arc::new(opened) as Arc<dyn HostFunction>)
        };
        let opened = functions.iter().zip(&groups).map(open).collect::<crate::Result<Vec<_>>>();
        Ok(Opened { functions: opened.map_err(refused)?, domain })
    }

    /// The function's group, if nothing stands against opening it.
    fn check_open(
        &self,
        selection: Selection,
        function: &Function,
        with: &[Function],
    ) -> Result<u32, Refusal> {
        if let Some(obstacle) = self.obstacles(function, with).into_iter().next() {
            return Err(obstacle);
        }
        if !function.bound() {
            let driver = function.driver.clone().unwrap_or_else(|| "no driver".into());
            return Err(Refusal::NotBound { selection, address: function.address, driver });
        }
        function.group.ok_or(Refusal::NoIommu(function.address))
    }
}

/// The named refusal behind a failure to open.
fn refusal(error: Error, functions: &[Function], groups: &[u32]) -> Refusal {
    let Error::Host { ref call, ref source } = error else { return error.into() };
    let in_call = |group: &&u32| call.ends_with(&format!("/dev/vfio/{group}"));
    match source.kind() {
        io::ErrorKind::ResourceBusy => match groups.iter().find(in_call).zip(functions.first()) {
            Some((group, function)) => Refusal::Busy { address: function.address, group: *group },
            None => error.into(),
        },
        io::ErrorKind::PermissionDenied => {
            let path = call.rsplit(' ').next().unwrap_or(call);
            if path.starts_with('/') { Refusal::Denied { path: path.into() } } else { error.into() }
        }
        io::ErrorKind::NotFound if call.ends_with("/dev/vfio/vfio") => Refusal::NoVfio,
        _ => error.into(),
    }
}
