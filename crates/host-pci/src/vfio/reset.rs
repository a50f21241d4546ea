//! Stopping a function's DMA, resetting it, and seeing to it that it came back.

use super::function::VfioFunction;
use super::sys::{self, failed};
use crate::fingerprint::Fingerprint;
use crate::{Error, Result};
use outboard_bus::{Width, error_limited, warn_limited};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// Command register (PCIe 7.5.1.1.3), and its bus master bit.
pub(super) const COMMAND: u16 = 0x04;
const BUS_MASTER: u32 = 1 << 2;
/// Device status in the PCIe capability, and its Transactions Pending bit (PCIe 7.5.3.5).
const DEVICE_STATUS: u16 = 0x0a;
const PENDING: u32 = 1 << 5;

/// A request that is not answered times out within 50 ms by default (PCIe 7.5.3.16); a device that needs longer than this is stuck.
const DRAIN: Duration = Duration::from_secs(1);
/// How long a function may take to answer config reads once the kernel says that the reset is done. The kernel itself has
/// waited before, for up to a minute.
const RETURN: Duration = Duration::from_secs(5);
/// The kernel refuses a reset while somebody else holds the device's lock for a moment.
const LOCK_RETRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(2);

impl VfioFunction {
    pub(super) fn write_bus_master(&self, on: bool) -> Result<()> {
        let _command = self.command.lock().unwrap_or_else(PoisonError::into_inner);
        let was = self.read_hardware(COMMAND, Width::B2)?;
        let is = if on { was | BUS_MASTER } else { was & !BUS_MASTER };
        self.write_hardware(COMMAND, Width::B2, is)
    }

    /// Waits until no request of the function is under way. Bus master is off.
    pub(super) fn drain(&self) -> Result<()> {
        let Some(pcie) = self.pcie else { return Ok(()) };
        let deadline = Instant::now() + DRAIN;
        while self.read_hardware(pcie + DEVICE_STATUS, Width::B2)? & PENDING != 0 {
            if Instant::now() > deadline {
                return Err(Error::Busy(self.identity.address));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Interrupts and bus master off, reset, wait, compare, put back what a guest had set.
    pub(super) fn reset_and_check(&self) -> Result<()> {
        let address = self.identity.address;
        self.interrupts_off()?;
        self.write_bus_master(false)?;
        match self.drain() {
            // A reset is what ends them.
            Err(Error::Busy(_)) => {
                warn_limited!("{address} has transactions pending; resetting it all the same")
            }
            drained => drained?,
        }
        self.reset_by_kernel()?;
        let different = match self.wait_for_return() {
            Ok(()) => {
                self.put_back().and_then(|()| Ok(self.fingerprint.difference(&self.take_fingerprint()?)))?
            }
            Err(why) => Some(why),
        };
        match different {
            None => Ok(()),
            Some(why) => {
                self.quarantine(&why);
                Err(Error::ResetFailed { address, why })
            }
        }
    }

    fn reset_by_kernel(&self) -> Result<()> {
        let address = self.identity.address;
        let mut attempts = 0;
        loop {
            let result = if self.has_own_reset {
                sys::DEVICE_RESET.number(self.device.as_fd(), 0).map(drop)
            } else {
                sys::hot_reset(self.device.as_fd(), &self.domain.groups())
            };
            let Err(error) = result else { return Ok(()) };
            attempts += 1;
            match error.raw_os_error() {
                Some(libc::EAGAIN) if attempts < LOCK_RETRIES => std::thread::sleep(PAUSE),
                // No way to reset the bus, or somebody else's device is on it.
                Some(libc::ENODEV | libc::EINVAL | libc::EPERM | libc::ENOTTY) if !self.has_own_reset => {
                    return Err(if self.is_there() { Error::NoReset(address) } else { Error::Gone(address) });
                }
                _ => return Err(self.lost_or(failed("VFIO_DEVICE_RESET", address)(error))),
            }
        }
    }

    /// Waits until the hardware answers with its vendor ID, which VFIO itself would answer from its own memory.
    fn wait_for_return(&self) -> std::result::Result<(), String> {
        let deadline = Instant::now() + RETURN;
        loop {
            let seen = self.read_header(0);
            match &seen {
                Ok(ids) if *ids as u16 == self.identity.vendor => return Ok(()),
                // All-ones: nothing answers. Vendor 1: it asks for patience (PCIe 2.3.2, configuration retry status).
                _ if Instant::now() > deadline => {
                    return Err(match seen {
                        Ok(ids) => format!("its vendor and device ID read {ids:#010x} for {RETURN:?}"),
                        Err(error) => format!("its config space cannot be read: {error}"),
                    });
                }
                _ => std::thread::sleep(PAUSE),
            }
        }
    }

    fn put_back(&self) -> Result<()> {
        for (at, was) in self.settings.changed(&|at| self.read_hardware(at, Width::B4))? {
            self.write_hardware(at, Width::B1, u32::from(was))?;
        }
        Ok(())
    }

    pub(super) fn take_fingerprint(&self) -> Result<Fingerprint> {
        let header = |at| self.read_header(at).map_err(failed("read config of", self.identity.address));
        Fingerprint::take(&header, &|at| self.read_hardware(at, Width::B4), self.config_len)
    }

    /// The hardware's own first 64 bytes of config space.
    pub(super) fn read_header(&self, at: u16) -> io::Result<u32> {
        let mut bytes = [0; 4];
        sys::read_at(self.header.as_fd(), u64::from(at), &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Sees to it that the function is used no more, by this process or another, until it was unplugged or released.
    fn quarantine(&self, why: &str) {
        let address = self.identity.address;
        error_limited!(
            "{address} did not come back from a reset ({why}); it is not used again until it is released"
        );
        let _ = self.quarantined.set(why.to_owned());
        let marked = match &self.driver_override {
            Ok(file) => file.write_all_at(crate::QUARANTINED.as_bytes(), 0),
            Err(kind) => Err((*kind).into()),
        };
        if let Err(error) = marked {
            warn_limited!("{address} could not be marked: {error}; only this process keeps away from it");
        }
    }
}
