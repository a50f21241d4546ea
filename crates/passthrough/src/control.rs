//! What config writes do besides changing registers: bus master, power states, resets. And how a function is lost.

use crate::config::COMMAND;
use crate::function::{Function, State};
use crate::health::Loss;
use outboard_bus::{Width, error_limited, warn_limited};
use outboard_host_pci::Error;
use outboard_pci::ConfigAccess;
use outboard_pci::regs::{COMMAND_BUS_MASTER, COMMAND_IO, COMMAND_MEMORY};
use std::time::Duration;

/// DEVCTL: initiate function level reset.
const DEVCTL_FLR: u32 = 1 << 15;
/// From D3hot to D0 (PCIe 5.9, table 5-7); before that the function need not answer.
const D3_RECOVERY: Duration = Duration::from_millis(10);
const D3HOT: u32 = 3;

impl Function {
    /// A guest's config write.
    ///
    /// Decoding: the guest's memory decode bit is not passed on. The hardware decodes from open to close (but for resets and D3), so that
    /// no access of the guest, however late, meets a device that does not answer (CVE-2015-2756, CVE-2020-12888: an unsupported
    /// request may bring the host down). When the guest turns decoding off, the root complex takes the BARs out of the guest before
    /// the write completes; on: it puts them there before the write completes.
    pub(crate) fn write(&self, state: &mut State, access: ConfigAccess, value: u32) {
        let before = state.table.value(COMMAND);
        if let Err(error) = state.table.write(&*self.host, access, value) {
            return self.report("a config write failed", &error);
        }
        if self.asks_for_reset(access, value) {
            self.reset_device(state);
            return;
        }
        if let Some(power) = self.features.power.filter(|power| access.covers(power.control)) {
            self.set_power(state, power.control, value & 3);
        }
        if self.features.express.is_some_and(|express| access.covers(express.control + 1)) {
            self.set_read_request(state);
        }
        let changed = before ^ state.table.value(COMMAND);
        if changed & u32::from(COMMAND_BUS_MASTER) != 0 {
            self.set_bus_master(state);
        }
        self.sync_interrupts(state);
    }

    fn asks_for_reset(&self, access: ConfigAccess, value: u32) -> bool {
        let flr = self
            .features
            .express
            .filter(|express| express.flr)
            .is_some_and(|express| access.covers(express.control + 1) && value & DEVCTL_FLR != 0);
        flr || self.features.af_control.is_some_and(|control| access.covers(control) && value & 1 != 0)
    }

    /// Messages are requests too: vectors open before the device may send, and close after it has stopped and what it had sent is in.
    fn set_bus_master(&self, state: &mut State) {
        let on = state.table.value(COMMAND) & u32::from(COMMAND_BUS_MASTER) != 0;
        if on {
            self.sync_interrupts(state);
        }
        if on && state.held {
            return;
        }
        if let Err(error) = self.host.set_bus_master(on) {
            self.report(if on { "it cannot be bus master" } else { "it does not stop its DMA" }, &error);
            if on {
                state.table.set(COMMAND, u32::from(COMMAND_BUS_MASTER), 0);
            }
        }
    }

    /// Holds the function back from DMA (and with it from messages) in hardware, or no longer: what the guest writes to COMMAND reads back as
    /// written, and counts once it is let go. Of use where a guest has to say first that it knows the rules of this host's IOMMU.
    pub fn hold_dma(&self, held: bool) {
        let mut state = self.lock();
        let was = std::mem::replace(&mut state.held, held);
        let on = state.table.value(COMMAND) & u32::from(COMMAND_BUS_MASTER) != 0;
        if was == held || !on || !self.health.usable() {
            return;
        }
        if held {
            if let Err(error) = self.host.set_bus_master(false) {
                self.report("it does not stop its DMA", &error);
            }
        } else {
            self.set_bus_master(&mut state);
        }
    }

    /// Whether the guest's driver wants to do DMA and is held back from it.
    pub fn waits_for_dma(&self) -> bool {
        let state = self.lock();
        state.held && self.health.usable() && state.table.value(COMMAND) & u32::from(COMMAND_BUS_MASTER) != 0
    }

    /// Stops the function's DMA and resets it like [`outboard_pci::PciFunction::reset`], but leaves it where the guest has put it: a guest can
    /// ask for this (through another device) after its kernel has assigned addresses. Whether it can no longer write to memory.
    pub fn restart(&self) -> bool {
        let mut state = self.lock();
        let placed = self.bars.registers(&state.table);
        let decoding = state.table.value(COMMAND);
        let shown = state.mappings.shown();
        let silent = self.reset_device(&mut state);
        for (register, value) in placed {
            state.table.set(register, u32::MAX, value);
        }
        state.table.set(COMMAND, u32::from(COMMAND_MEMORY | COMMAND_IO), decoding);
        for (index, ipa) in shown.into_iter().enumerate() {
            if let (Some(ipa), Some(bar)) = (ipa.filter(|_| self.health.usable()), self.bars.get(index)) {
                state.mappings.show(&*self.host, &*self.wiring.mapper, (index, bar), ipa);
            }
        }
        silent
    }

    /// D0 and D3hot; writes of other states are discarded, as for states a function does not have (PCIe 7.5.2.2).
    fn set_power(&self, state: &mut State, control: u16, wanted: u32) {
        match (wanted, state.asleep) {
            (D3HOT, false) => {
                // In D3hot the device answers no memory request: guest and traps are kept away before it gets there.
                self.close(state);
                self.write_power(control, D3HOT);
                state.table.set(control, 3, D3HOT);
                state.asleep = true;
            }
            (0, true) => {
                self.wake(state, control);
                // Without NoSoftRst it comes back as from a reset (PCIe 5.3.1.4); the host's reset gives it back what the host had set up.
                if self.features.power.is_some_and(|power| power.no_soft_reset) {
                    self.open();
                } else {
                    self.reset_device(state);
                }
            }
            _ => {}
        }
    }

    /// Back in D0, and past the time that takes, before anybody reaches its memory.
    fn wake(&self, state: &mut State, control: u16) {
        self.write_power(control, 0);
        std::thread::sleep(D3_RECOVERY);
        state.table.set(control, 3, 0);
        state.asleep = false;
    }

    fn write_power(&self, control: u16, power: u32) {
        let real = self.host.config_read(control, Width::B1);
        let written = real.and_then(|real| self.host.config_write(control, Width::B1, real & !3 | power));
        if let Err(error) = written {
            self.report("its power state cannot be changed", &error);
        }
    }

    /// Read requests are never smaller than the payloads that the host set up (Linux's pcie_set_readrq says why).
    fn set_read_request(&self, state: &State) {
        let Some(express) = self.features.express else { return };
        let wanted = state.table.value(express.control) >> 12 & 7;
        let written = self.host.config_read(express.control, Width::B2).and_then(|real| {
            // 6 and 7 are reserved (PCIe 7.5.3.4).
            let request = wanted.min(5).max(real >> 5 & 7);
            let value = real & !(7 << 12) & !DEVCTL_FLR | request << 12;
            if value == real { Ok(()) } else { self.host.config_write(express.control, Width::B2, value) }
        });
        if let Err(error) = written {
            self.report("its read request size cannot be set", &error);
        }
    }

    /// Resets function and registers to what they are at power-on.
    ///
    /// Order: nobody reaches its memory; no interrupt; no DMA, and what was under way has ended; only then the reset. What the
    /// device could reach is unmapped by the owner of the DMA domain, and only after this returns with the function usable or gone.
    ///
    /// Whether it is sure that the device writes to memory no more.
    pub(crate) fn reset_device(&self, state: &mut State) -> bool {
        self.close(state);
        self.interrupts_off(state);
        let silent = self.health.usable() && self.reset_hardware(state);
        // Every field is named, so that a new one cannot be forgotten.
        let State { table, asleep, mode: _, intx: _, mappings: _, held: _ } = state;
        // `mode`, `intx`: off by interrupts_off. `mappings`: the guest's are gone by close; the host's stay good over a reset. `held`: not the
        // guest's to change.
        table.reset();
        *asleep = false;
        self.msi.iter().chain(&self.msix).for_each(|vectors| vectors.state.reset());
        if self.health.usable() {
            self.open();
        }
        silent || self.health.loss() == Some(&Loss::Gone)
    }

    /// Whether it stopped by itself or was reset.
    fn reset_hardware(&self, state: &mut State) -> bool {
        if let Some(power) = self.features.power.filter(|_| state.asleep) {
            // A function in D3hot need not take a reset.
            self.wake(state, power.control);
        }
        let stopped = self.host.set_bus_master(false);
        let mut silent = stopped.is_ok();
        if let Err(error) = stopped {
            // The reset ends what did not end by itself.
            self.report("it does not stop its DMA", &error);
        }
        match self.host.reset().map_err(|error| (self.health.note(&error), error).1) {
            Ok(()) => silent = true,
            // Said when it was opened, and not again for each boot of the guest. Its DMA has ended, its interrupts are off.
            Err(Error::NoReset(_)) => tracing::debug!("{} has no reset", self.name),
            Err(error) => self.health.lose(Loss::Broken(format!("it cannot be reset ({error})"))),
        }
        if self.health.usable() {
            self.verify();
        }
        if self.health.usable() {
            self.decode();
        }
        silent
    }

    /// Whether it is still the device it was, down to its capabilities.
    fn verify(&self) {
        for (offset, mask, expected) in &self.fingerprint {
            match self.host.config_read(*offset, Width::B4) {
                Ok(value) if value & mask == *expected => {}
                Ok(value) => {
                    let why = format!(
                        "after a reset its config space at {offset:#x} holds {:#x}, not {expected:#x}",
                        value & mask
                    );
                    return self.health.lose(Loss::Broken(why));
                }
                Err(error) => {
                    self.health.note(&error);
                    return self
                        .health
                        .lose(Loss::Broken(format!("after a reset it cannot be read ({error})")));
                }
            }
        }
    }

    /// The hardware decodes its BARs from here on.
    fn decode(&self) {
        let real = self.host.config_read(COMMAND, Width::B2);
        let io = if self.bars.has_ports() { COMMAND_IO } else { 0 };
        let wanted = u32::from(COMMAND_MEMORY | io);
        let written = real.and_then(|real| match real & wanted {
            on if on == wanted => Ok(()),
            _ => self.host.config_write(COMMAND, Width::B2, real | wanted),
        });
        if let Err(error) = written {
            self.report("its decoding cannot be turned on", &error);
        }
    }

    /// Nobody reaches the device's memory: not the guest by itself, not a trapped access; those under way have ended.
    fn close(&self, state: &mut State) {
        *self.reachable.write().unwrap_or_else(|e| e.into_inner()) = false;
        state.mappings.hide_all(&*self.wiring.mapper);
    }

    fn open(&self) {
        *self.reachable.write().unwrap_or_else(|e| e.into_inner()) = true;
    }

    /// Takes the device from the guest for good, after it was lost or asked back: what was mapped is trapped from here on, and reads
    /// all-ones. A device that is still there is quiet when this returns, as far as it lets itself be.
    ///
    /// Called by whoever watches [`Function::lost`] and [`Function::removal`], as [`crate::Slot`] does; again does nothing.
    pub fn withdraw(&self) {
        let mut state = self.lock();
        let first = self.health.usable();
        self.health.lose(Loss::Gone);
        self.close(&mut state);
        state.mappings.forget(&*self.wiring.mapper);
        self.interrupts_off(&mut state);
        self.msi.iter().chain(&self.msix).for_each(|vectors| vectors.state.reset());
        match self.host.set_bus_master(false) {
            Err(error) if first && !matches!(error, Error::Gone(_)) => {
                error_limited!("{}: its DMA may go on until it is reset: {error}", self.name);
            }
            _ => {}
        }
    }

    pub(crate) fn report(&self, what: &str, error: &Error) {
        self.health.note(error);
        if self.health.usable() {
            warn_limited!("{}: {what}: {error}", self.name);
        }
    }
}
