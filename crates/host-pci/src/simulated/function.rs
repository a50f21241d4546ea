//! What a back end hands over of the simulated hardware.

use super::device::{Enabled, SimulatedDevice};
use super::domain::SimulatedDomain;
use super::faults::Operation;
use super::memory::{Memory, Part};
use crate::capabilities;
use crate::fingerprint::{Fingerprint, Settings};
use crate::{
    Error, FunctionIdentity, HostBar, HostBarKind, HostFunction, InterruptCounts, InterruptKind,
    InterruptSink, IoPorts, MappedBar, Result, check_mappable,
};
use outboard_bus::{Width, error_limited};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

/// An open simulated function.
pub struct SimulatedFunction {
    device: Arc<SimulatedDevice>,
    identity: FunctionIdentity,
    counts: InterruptCounts,
    msix_pages: [Vec<Range<u64>>; 6],
    fingerprint: Fingerprint,
    settings: Settings,
}

impl SimulatedFunction {
    pub(super) fn open(device: &Arc<SimulatedDevice>, domain: &Arc<SimulatedDomain>) -> Result<Self> {
        let address = device.address;
        {
            let mut state = device.lock();
            if state.removed {
                return Err(Error::Gone(address));
            }
            if let Some(why) = state.quarantined.clone() {
                return Err(Error::ResetFailed { address, why });
            }
            if std::mem::replace(&mut state.open, true) {
                let source = io::Error::from(io::ErrorKind::ResourceBusy);
                return Err(Error::Host { call: format!("open {address}"), source });
            }
            state.domain = Some(Arc::clone(domain));
        }
        device.reset_hardware();
        let read = |at| Ok(dword(device, at));
        let (ids, class) = (dword(device, 0), dword(device, 8));
        let identity = FunctionIdentity {
            address,
            vendor: ids as u16,
            device: (ids >> 16) as u16,
            class: class >> 8,
            revision: class as u8,
        };
        Ok(Self {
            identity,
            counts: counts(&read)?,
            msix_pages: capabilities::msix_pages(&read)?,
            fingerprint: Fingerprint::take(&read, &read, device.model.config.len() as u16)?,
            settings: Settings::take(&read)?,
            device: Arc::clone(device),
        })
    }

    /// Lets a fault happen; then whether the device is there and fit for use.
    fn begin(&self, operation: Operation) -> Result<()> {
        let address = self.identity.address;
        self.device.faults.meet(operation, address)?;
        let state = self.device.lock();
        match &state.quarantined {
            _ if state.removed => Err(Error::Gone(address)),
            Some(why) => Err(Error::ResetFailed { address, why: why.clone() }),
            None => Ok(()),
        }
    }

    fn check_config(&self, offset: u16, width: Width) -> Result<Range<usize>> {
        let (at, len) = (usize::from(offset), width.bytes() as usize);
        if width == Width::B8 || !at.is_multiple_of(len) || at + len > usize::from(self.config_len()) {
            return Err(Error::OutOfRange { what: format!("{len} bytes of config space at {offset:#x}") });
        }
        Ok(at..at + len)
    }

    /// The memory of a BAR that is decoded.
    fn memory(&self, bar: usize) -> Result<&Arc<Memory>> {
        let absent = || Error::OutOfRange { what: format!("BAR {bar}") };
        let memory = self.device.bars.get(bar).and_then(Option::as_ref).ok_or_else(absent)?;
        // Command bits 0 and 1 let it answer to I/O and memory.
        let (bit, space) = if self.is_io(bar) { (1, "I/O") } else { (2, "memory") };
        if self.device.lock().config[4] & bit == 0 {
            let source = io::Error::other(format!("{space} decode is off"));
            return Err(Error::Host {
                call: format!("access BAR {bar} of {}", self.identity.address),
                source,
            });
        }
        Ok(memory)
    }

    fn is_io(&self, bar: usize) -> bool {
        self.device.model.bars.get(bar).is_some_and(|b| b.is_some_and(|b| b.kind == HostBarKind::Io))
    }

    /// Refuses what no I/O port takes.
    fn check_width(&self, bar: usize, offset: u64, width: Width) -> Result<()> {
        let wrong = width == Width::B8 && self.is_io(bar);
        if wrong { Err(Self::out_of_range(bar, offset, width)()) } else { Ok(()) }
    }

    fn out_of_range(bar: usize, offset: u64, width: Width) -> impl FnOnce() -> Error {
        move || Error::OutOfRange { what: format!("{} bytes at {offset:#x} of BAR {bar}", width.bytes()) }
    }

    fn write_bus_master(&self, on: bool) {
        {
            let mut state = self.device.lock();
            let command = state.config[4] & !4;
            state.config[4] = command | if on { 4 } else { 0 };
        }
        if !on {
            // Waits for DMA that is under way.
            drop(self.device.dma.write().unwrap_or_else(PoisonError::into_inner));
        }
        self.note_master(on || self.device.lock().pending);
    }

    fn note_master(&self, on: bool) {
        let domain = self.device.lock().domain.clone();
        domain.iter().for_each(|domain| domain.note_master(self.identity.address, on));
    }

    fn interrupts_off(&self) {
        *self.device.interrupts.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn reset_and_check(&self) -> Result<()> {
        self.interrupts_off();
        self.write_bus_master(false);
        self.device.reset_hardware();
        let read = |at| Ok(dword(&self.device, at));
        for (at, was) in self.settings.changed(&read)? {
            self.device.lock().config[usize::from(at)] = was;
        }
        let now = Fingerprint::take(&read, &read, self.config_len())?;
        let Some(why) = self.fingerprint.difference(&now) else {
            self.note_master(false);
            return Ok(());
        };
        self.device.lock().quarantined = Some(why.clone());
        Err(Error::ResetFailed { address: self.identity.address, why })
    }
}

fn dword(device: &SimulatedDevice, at: u16) -> u32 {
    let (state, at) = (device.lock(), usize::from(at));
    state.config.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(u32::MAX, u32::from_le_bytes)
}

/// Vectors of each kind, by config space.
fn counts(read: capabilities::ReadDword<'_>) -> Result<InterruptCounts> {
    let control = |id| Ok(capabilities::find(read, id)?.map(read).transpose()?.map(|v| v >> 16));
    Ok(InterruptCounts {
        intx: u16::from((1..=4).contains(&(read(0x3c)? >> 8 & 0xff))),
        // Multiple message capable: a power of two up to 32; 6 and 7 are reserved (PCIe 7.7.1.2).
        msi: control(capabilities::MSI)?.map_or(0, |c| 1 << (c >> 1 & 7).min(5)),
        msix: control(capabilities::MSIX)?.map_or(0, |c| (c & 0x7ff) as u16 + 1),
    })
}

impl HostFunction for SimulatedFunction {
    fn identity(&self) -> FunctionIdentity {
        self.identity
    }

    fn config_read(&self, offset: u16, width: Width) -> Result<u32> {
        self.begin(Operation::ConfigRead)?;
        let range = self.check_config(offset, width)?;
        let state = self.device.lock();
        Ok(state.config[range].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn config_write(&self, offset: u16, width: Width, value: u32) -> Result<()> {
        self.begin(Operation::ConfigWrite)?;
        let range = self.check_config(offset, width)?;
        let mut state = self.device.lock();
        for (at, new) in range.zip(value.to_le_bytes()) {
            let mask = self.device.model.writable[at];
            state.config[at] = state.config[at] & !mask | new & mask;
        }
        Ok(())
    }

    fn config_len(&self) -> u16 {
        self.device.model.config.len() as u16
    }

    fn bars(&self) -> [Option<HostBar>; 6] {
        let reachable = self.io_ports() == IoPorts::Reachable;
        self.device.model.bars.map(|bar| bar.filter(|bar| reachable || bar.kind != HostBarKind::Io))
    }

    fn io_ports(&self) -> IoPorts {
        self.device.model.io_ports
    }

    fn rom(&self) -> Result<Option<Vec<u8>>> {
        self.begin(Operation::Rom)?;
        Ok(self.device.model.rom.clone())
    }

    fn map_bar(&self, bar: usize, offset: u64, len: u64) -> Result<Arc<dyn MappedBar>> {
        self.begin(Operation::MapBar)?;
        let info = self.device.model.bars.get(bar).copied().flatten().filter(|b| b.kind != HostBarKind::Io);
        let pages: &[Range<u64>] = self.msix_pages.get(bar).map_or(&[], Vec::as_slice);
        check_mappable(bar, info.map(|b| b.len), offset, len, pages)?;
        let memory = Arc::clone(self.memory(bar)?);
        Ok(Arc::new(Part { memory, offset, len }))
    }

    fn bar_read(&self, bar: usize, offset: u64, width: Width) -> Result<u64> {
        self.begin(Operation::BarRead)?;
        self.check_width(bar, offset, width)?;
        self.memory(bar)?.read(offset, width).ok_or_else(Self::out_of_range(bar, offset, width))
    }

    fn bar_write(&self, bar: usize, offset: u64, width: Width, value: u64) -> Result<()> {
        self.begin(Operation::BarWrite)?;
        self.check_width(bar, offset, width)?;
        let written = self.memory(bar)?.write(offset, width, value);
        written.ok_or_else(Self::out_of_range(bar, offset, width))?;
        self.device.notice(bar, offset);
        Ok(())
    }

    fn interrupts(&self) -> InterruptCounts {
        self.counts
    }

    fn enable_interrupts(&self, kind: InterruptKind, count: u16, sink: Arc<dyn InterruptSink>) -> Result<()> {
        self.begin(Operation::EnableInterrupts)?;
        self.counts.check(kind, count)?;
        let enabled = Enabled { kind, count, sink, masked: AtomicBool::new(false) };
        *self.device.interrupts.write().unwrap_or_else(PoisonError::into_inner) = Some(enabled);
        self.device.deliver_pin();
        Ok(())
    }

    fn disable_interrupts(&self) -> Result<()> {
        self.device.faults.meet(Operation::DisableInterrupts, self.identity.address)?;
        self.interrupts_off();
        Ok(())
    }

    fn unmask_intx(&self) -> Result<()> {
        self.begin(Operation::UnmaskIntx)?;
        if let Some(enabled) = &*self.device.interrupts.read().unwrap_or_else(PoisonError::into_inner) {
            enabled.masked.store(false, Ordering::Release);
        }
        self.device.deliver_pin();
        Ok(())
    }

    fn set_bus_master(&self, on: bool) -> Result<()> {
        if let Err(error) = self.begin(Operation::SetBusMaster) {
            if matches!(error, Error::Gone(_)) {
                self.note_master(false);
            }
            return Err(error);
        }
        self.write_bus_master(on);
        if !on && self.device.lock().pending { Err(Error::Busy(self.identity.address)) } else { Ok(()) }
    }

    fn reset(&self) -> Result<()> {
        self.begin(Operation::Reset)?;
        self.reset_and_check()
    }

    fn removal(&self) -> BorrowedFd<'_> {
        self.device.removal.as_fd()
    }
}

impl Drop for SimulatedFunction {
    fn drop(&mut self) {
        // Interrupts off, bus master off, reset: the last does all three.
        if let Err(error) = self.reset_and_check() {
            error_limited!("giving back {}: {error}", self.identity.address);
        }
        let mut state = self.device.lock();
        state.domain = None;
        state.open = false;
    }
}
