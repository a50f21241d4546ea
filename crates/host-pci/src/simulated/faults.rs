use crate::{Error, PciAddress, Result};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What of a function or domain can be made to fail or to take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is the trait's method of that name")]
pub enum Operation {
    Open,
    ConfigRead,
    ConfigWrite,
    Rom,
    MapBar,
    BarRead,
    BarWrite,
    EnableInterrupts,
    DisableInterrupts,
    UnmaskIntx,
    SetBusMaster,
    Reset,
    DmaMap,
    DmaUnmap,
}

/// What happens to the next calls of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// How many calls go as they should first.
    pub after: u32,
    /// How many calls it happens to.
    pub times: u32,
    /// The call takes this long first.
    pub delay: Duration,
    /// Then it fails with this, without having done anything; `None`: it does what it should.
    pub error: Option<fn(PciAddress) -> Error>,
}

impl Fault {
    /// The next call fails.
    pub fn once(error: fn(PciAddress) -> Error) -> Self {
        Self { after: 0, times: 1, delay: Duration::ZERO, error: Some(error) }
    }

    /// The call after the next `after` ones fails.
    pub fn nth(after: u32, error: fn(PciAddress) -> Error) -> Self {
        Self { after, ..Self::once(error) }
    }

    /// Every call takes `delay`.
    pub fn slow(delay: Duration) -> Self {
        Self { after: 0, times: u32::MAX, delay, error: None }
    }
}

/// The faults that are yet to happen.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<HashMap<Operation, Fault>>);

impl Faults {
    /// Lets `fault` happen from now on, instead of any set before.
    pub(super) fn inject(&self, operation: Operation, fault: Fault) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(operation, fault);
    }

    /// What a call of `operation` does first.
    pub(super) fn meet(&self, operation: Operation, address: PciAddress) -> Result<()> {
        let met = {
            let mut faults = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match faults.get_mut(&operation) {
                Some(fault) if fault.after > 0 => {
                    fault.after -= 1;
                    None
                }
                Some(fault) if fault.times > 0 => {
                    fault.times -= 1;
                    Some(*fault)
                }
                _ => None,
            }
        };
        let Some(Fault { delay, error, .. }) = met else { return Ok(()) };
        std::thread::sleep(delay);
        error.map_or(Ok(()), |error| Err(error(address)))
    }
}
