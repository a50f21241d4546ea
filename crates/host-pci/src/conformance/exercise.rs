//! How devices that the suite knows are told to interrupt and to do DMA.

use crate::simulated::registers;
use crate::{BusAddress, FunctionIdentity, HostFunction, InterruptKind, Result};
use outboard_bus::Width;
use std::time::{Duration, Instant};

/// Drives one kind of device through its registers.
pub trait Exerciser {
    /// Makes it fire `vector` of `kind`; `false` if it cannot fire that one.
    ///
    /// # Errors
    /// Those of the function.
    fn fire(&self, f: &dyn HostFunction, kind: InterruptKind, vector: u16) -> Result<bool>;

    /// Takes back the pin's level.
    ///
    /// # Errors
    /// Those of the function.
    fn acknowledge(&self, f: &dyn HostFunction) -> Result<()>;

    /// Makes it copy `len` bytes of memory by DMA and waits until it says that it has; `None` if it has no way to.
    ///
    /// # Errors
    /// Those of the function.
    fn copy(&self, f: &dyn HostFunction, from: BusAddress, to: BusAddress, len: u32) -> Result<Option<()>>;
}

/// The exerciser for a device, if the suite knows one.
pub fn exerciser_for(id: &FunctionIdentity) -> Option<Box<dyn Exerciser>> {
    match (id.vendor, id.device) {
        (0x1234, 0x11e8) => Some(Box::new(Edu)),
        registers::IDS => Some(Box::new(Simulated)),
        (0x8086, 0x10d3) => Some(Box::new(E1000e)),
        _ => None,
    }
}

/// QEMU's `edu` device (its docs/specs/edu.txt): a DMA buffer of 4 KiB, an interrupt on demand. With `dma_mask` at all 64 bits.
struct Edu;

impl Exerciser for Edu {
    fn fire(&self, f: &dyn HostFunction, kind: InterruptKind, vector: u16) -> Result<bool> {
        if kind == InterruptKind::MsiX || vector > 0 {
            return Ok(false);
        }
        f.bar_write(0, 0x60, Width::B4, 1)?;
        Ok(true)
    }

    fn acknowledge(&self, f: &dyn HostFunction) -> Result<()> {
        f.bar_write(0, 0x64, Width::B4, 1)
    }

    fn copy(&self, f: &dyn HostFunction, from: BusAddress, to: BusAddress, len: u32) -> Result<Option<()>> {
        const BUFFER: u64 = 0x40000;
        // Bit 0 starts, bit 1 is the direction: set, it is from the device.
        for (source, target, command) in [(from.0, BUFFER, 1), (BUFFER, to.0, 3)] {
            f.bar_write(0, 0x80, Width::B8, source)?;
            f.bar_write(0, 0x88, Width::B8, target)?;
            f.bar_write(0, 0x90, Width::B8, u64::from(len))?;
            f.bar_write(0, 0x98, Width::B8, command)?;
            wait_until(|| Ok(f.bar_read(0, 0x98, Width::B8)? & 1 == 0))?;
        }
        Ok(Some(()))
    }
}

/// Intel 82574L (its datasheet, 10.2): causes of interrupts can be set by software.
struct E1000e;

impl Exerciser for E1000e {
    fn fire(&self, f: &dyn HostFunction, kind: InterruptKind, vector: u16) -> Result<bool> {
        // Interrupt cause set, mask set, vector allocation.
        let (ics, ims, ivar) = (0xc8, 0xd0, 0xe4);
        if vector > 4 || (kind != InterruptKind::MsiX && vector > 0) {
            return Ok(false);
        }
        // Cause 24, "other", goes by bits 16 to 19 of IVAR: the vector, and that it is valid. Cause 2: link status change.
        let cause = if kind == InterruptKind::MsiX { 1 << 24 } else { 1 << 2 };
        f.bar_write(0, ivar, Width::B4, (8 | u64::from(vector)) << 16)?;
        f.bar_write(0, ims, Width::B4, cause)?;
        f.bar_write(0, ics, Width::B4, cause)?;
        Ok(true)
    }

    fn acknowledge(&self, f: &dyn HostFunction) -> Result<()> {
        // Interrupt causes: written bits are taken back.
        f.bar_write(0, 0xc0, Width::B4, 0xffff_ffff)
    }

    fn copy(&self, _: &dyn HostFunction, _: BusAddress, _: BusAddress, _: u32) -> Result<Option<()>> {
        Ok(None)
    }
}

/// The simulated endpoint.
struct Simulated;

impl Simulated {
    fn command(f: &dyn HostFunction, command: u32) -> Result<()> {
        f.bar_write(0, registers::COMMAND, Width::B4, command.into())?;
        wait_until(|| Ok(f.bar_read(0, registers::COMMAND, Width::B4)? == 0)).map(drop)
    }
}

impl Exerciser for Simulated {
    fn fire(&self, f: &dyn HostFunction, kind: InterruptKind, vector: u16) -> Result<bool> {
        f.bar_write(0, registers::VECTOR, Width::B4, vector.into())?;
        Self::command(f, if kind == InterruptKind::Intx { registers::RAISE } else { registers::FIRE })?;
        Ok(true)
    }

    fn acknowledge(&self, f: &dyn HostFunction) -> Result<()> {
        Self::command(f, registers::LOWER)
    }

    fn copy(&self, f: &dyn HostFunction, from: BusAddress, to: BusAddress, len: u32) -> Result<Option<()>> {
        f.bar_write(0, registers::FROM, Width::B8, from.0)?;
        f.bar_write(0, registers::TO, Width::B8, to.0)?;
        f.bar_write(0, registers::LEN, Width::B4, len.into())?;
        Self::command(f, registers::COPY).map(Some)
    }
}

/// Waits for something that comes soon or never.
pub(super) fn wait_until(mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        if done()? {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(false)
}
