use crate::config::{BOOT_0, Bars, Device, Facts, Features, Image, Layout, Registers};
use crate::health::{Health, Loss};
use crate::interrupts::Mode;
use crate::intx::Intx;
use crate::mapping::Mappings;
use crate::vectors::Vectors;
use crate::{Error, Wiring};
use outboard_bus::{AccessError, Event, Width, warn_limited};
use outboard_host_pci::{HostBar, HostBarKind, HostFunction, InterruptCounts};
use outboard_pci::regs::{COMMAND_IO, COMMAND_MEMORY};
use outboard_pci::{BAR_COUNT, ConfigAccess, Decoded, PciFunction, ROM_BAR, Space};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

/// A function of the host as the guest's.
///
/// Lock order: the root complex's topology, `state`, `reachable`, a vector, the back end. Trapped BAR accesses take only `reachable` (those
/// to registers that mirror config space, `state` too), interrupts only their vector, so neither waits for a config access or a reset of
/// another kind than their own device's.
pub struct Function {
    pub(crate) name: String,
    pub(crate) host: Arc<dyn HostFunction>,
    pub(crate) wiring: Wiring,
    pub(crate) features: Features,
    pub(crate) counts: InterruptCounts,
    pub(crate) fingerprint: Vec<(u16, u32, u32)>,
    pub(crate) bars: Bars,
    /// Registers in BARs that lead past the rules of config space.
    pub(crate) registers: Vec<Registers>,
    /// Dwords of config space that are the vendor's own.
    pub(crate) vendor: Vec<bool>,
    rom: Vec<u8>,
    pub(crate) msi: Option<Arc<Vectors>>,
    pub(crate) msix: Option<Arc<Vectors>>,
    pub(crate) health: Health,
    /// Whether trapped accesses may go to the device. Held for reading while one does, so that whoever closes it waits for them.
    pub(crate) reachable: RwLock<bool>,
    state: Mutex<State>,
}

/// What changes while the guest runs.
pub(crate) struct State {
    pub(crate) table: crate::config::Table,
    /// In D3hot.
    pub(crate) asleep: bool,
    pub(crate) mode: Mode,
    pub(crate) intx: Option<Intx>,
    pub(crate) mappings: Mappings,
    /// No bus master in hardware, whatever the guest's COMMAND says.
    pub(crate) held: bool,
}

/// Where a trapped access goes.
enum Target<'a> {
    Device,
    /// Registers that lead past the rules of config space.
    Registers(&'a Registers),
    Table(&'a Vectors, u64),
    Pending(&'a Vectors, u64),
}

impl Function {
    /// Makes a guest's function out of `host`, and resets the device: the guest gets it as from power-on.
    ///
    /// # Errors
    /// [`Error`]: what is wrong with the device, and what to do about it.
    pub fn new(host: Arc<dyn HostFunction>, wiring: Wiring) -> Result<Self, Error> {
        let address = host.identity().address;
        let failed = |source| Error::Host { address, source };
        let image = Image::read(&*host).map_err(failed)?;
        let header_type = image.u8(0x0e) & 0x7f;
        if header_type != 0 && image.u16(0) != 0xffff {
            return Err(Error::NotAnEndpoint { address, header_type });
        }
        let rom = host.rom().map_err(failed)?.unwrap_or_default();
        let counts = host.interrupts();
        let (bars, registers) = reachable(&*host);
        let facts =
            Facts { bars, rom: Some(rom.len()), interrupts: counts, line: wiring.intx.is_some(), registers };
        let malformed = |why| Error::Malformed { address, why };
        let Layout { table, bars, features, fingerprint, vendor } =
            Layout::build(&image, &facts).map_err(malformed)?;
        let vectors = |count| Vectors::new(count, Arc::clone(&wiring.msi), wiring.vectors.clone());
        let health = Health::new(address).map_err(|source| Error::Resources { what: "an event", source })?;
        let state = State {
            table,
            asleep: false,
            mode: Mode::Off,
            intx: None,
            mappings: Mappings::default(),
            held: false,
        };
        let function = Self {
            name: address.to_string(),
            msi: features.msi.map(|shape| vectors(shape.vectors)),
            msix: features.msix.as_ref().map(|shape| vectors(shape.vectors)),
            host,
            wiring,
            features,
            counts,
            fingerprint,
            bars,
            registers: facts.registers,
            vendor,
            rom,
            health,
            reachable: RwLock::new(false),
            state: Mutex::new(state),
        };
        function.reset();
        match function.loss() {
            None => Ok(function),
            Some(Loss::Gone) => Err(failed(outboard_host_pci::Error::Gone(address))),
            Some(Loss::Broken(why)) => Err(malformed(why)),
        }
    }

    /// The host's function behind it.
    pub fn host(&self) -> &Arc<dyn HostFunction> {
        &self.host
    }

    /// Why it is no longer usable, if so. While it is [`Loss::Broken`] the device may still be writing to what its DMA domain maps.
    pub fn loss(&self) -> Option<Loss> {
        self.health.loss().cloned()
    }

    /// Readable once the function is lost: [`Function::withdraw`] is due then, from a thread that holds no lock.
    pub fn lost(&self) -> &Event {
        self.health.event()
    }

    /// Readable once the device has vanished or the host wants it back: [`Function::withdraw`] is due then.
    pub fn removal(&self) -> BorrowedFd<'_> {
        self.host.removal()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // Each field is whole between assignments; a panicked holder leaves at worst a BAR that is trapped.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn target(&self, bar: usize, offset: u64, width: Width) -> Result<Target<'_>, AccessError> {
        let end = offset + width.bytes();
        let is_port = self.bars.get(bar).is_some_and(|bar| bar.space == Space::Io);
        if !offset.is_multiple_of(width.bytes()) || is_port && width == Width::B8 {
            return Err(AccessError::BadWidth);
        }
        let meets = |registers: &&Registers| {
            registers.bar == bar && offset < registers.range.end && registers.range.start < end
        };
        if let Some(registers) = self.registers.iter().find(meets) {
            return Ok(Target::Registers(registers));
        }
        let (Some(shape), Some(msix)) = (&self.features.msix, &self.msix) else { return Ok(Target::Device) };
        for ((at, range), table) in [(&shape.table, true), (&shape.pba, false)] {
            if *at != bar || end <= range.start || offset >= range.end {
                continue;
            }
            // The real structures are never reached, not even by an access that straddles their end.
            return match offset.checked_sub(range.start) {
                Some(inside) if table && end <= range.end => Ok(Target::Table(msix, inside)),
                Some(inside) if end <= range.end => Ok(Target::Pending(msix, inside)),
                _ => Err(AccessError::BadWidth),
            };
        }
        Ok(Target::Device)
    }

    fn rom_read(&self, offset: u64, width: Width) -> u64 {
        let byte =
            |i| usize::try_from(offset + i).ok().and_then(|at| self.rom.get(at)).copied().unwrap_or(0xff);
        (0..width.bytes()).fold(0, |value, i| value | u64::from(byte(i)) << (8 * i))
    }

    /// Runs `access` while the device's memory answers.
    pub(crate) fn with_device<T>(
        &self,
        access: impl FnOnce() -> outboard_host_pci::Result<T>,
    ) -> Result<T, AccessError> {
        let reachable = self.reachable.read().unwrap_or_else(|e| e.into_inner());
        if !*reachable || !self.health.usable() {
            return Err(AccessError::NoResponse);
        }
        access().map_err(|error| {
            self.report("a BAR access failed", &error);
            AccessError::NoResponse
        })
    }
}

/// The BARs of `host` that a guest gets, and what of them leads past the rules of config space. Says what is kept from it.
fn reachable(host: &dyn HostFunction) -> ([Option<HostBar>; BAR_COUNT], Vec<Registers>) {
    let identity = host.identity();
    let mut bars = host.bars();
    let (bar, offset) = BOOT_0;
    let boot = || host.bar_read(bar, offset, Width::B4).ok().map(|value| value as u32);
    let boot = if Device::has_boot_register(identity) { boot() } else { None };
    let device = Device { identity, bars: &bars, boot };
    let (registers, keep_ports) = (device.registers(), device.ports_lead_to_registers());
    if let Some(warning) = host.io_ports().warning() {
        warn_limited!("{}: {warning}", identity.address);
    }
    if keep_ports {
        // Nobody misses them: no driver of Linux for these devices uses them.
        tracing::debug!("{}: its I/O ports lead to all its registers; the guest gets none", identity.address);
        for bar in &mut bars {
            *bar = bar.filter(|bar| bar.kind != HostBarKind::Io);
        }
    }
    (bars, registers)
}

impl PciFunction for Function {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, access: ConfigAccess) -> u32 {
        let state = self.lock();
        if !self.health.usable() {
            return u32::MAX;
        }
        if let (Some(shape), Some(msi)) = (self.features.msi, &self.msi)
            && shape.pending() == Some(access.offset())
        {
            return (0..shape.vectors).fold(0, |bits, v| bits | u32::from(msi.state.is_pending(v)) << v);
        }
        state.table.read(&*self.host, access).unwrap_or_else(|error| {
            self.report("a config read failed", &error);
            u32::MAX
        })
    }

    fn config_write(&self, access: ConfigAccess, value: u32) {
        let mut state = self.lock();
        if self.health.usable() {
            self.write(&mut state, access, value);
        }
    }

    fn decoded(&self) -> Decoded {
        let state = self.lock();
        if state.asleep || !self.health.usable() {
            return Decoded::default();
        }
        let command = state.table.value(crate::config::COMMAND);
        let decodes = |space| {
            let bit = if space == Space::Io { COMMAND_IO } else { COMMAND_MEMORY };
            command & u32::from(bit) != 0
        };
        self.bars.placed(&state.table).map(|bar| bar.filter(|bar| decodes(bar.space)))
    }

    fn bar_mapped(&self, bar: usize, address: Option<u64>) {
        let mut state = self.lock();
        let Some(shape) = self.bars.get(bar) else { return };
        match address.filter(|_| self.health.usable()) {
            Some(ipa) => state.mappings.show(&*self.host, &*self.wiring.mapper, (bar, shape), ipa),
            None => state.mappings.hide(&*self.wiring.mapper, bar),
        }
    }

    fn bar_read(&self, bar: usize, offset: u64, width: Width) -> Result<u64, AccessError> {
        if bar == ROM_BAR {
            return Ok(self.rom_read(offset, width));
        }
        match self.target(bar, offset, width)? {
            Target::Device => self.with_device(|| self.host.bar_read(bar, offset, width)),
            Target::Registers(registers) => self.registers_read(registers, offset, width),
            Target::Table(msix, offset) => msix.state.table_read(offset, width),
            Target::Pending(msix, offset) => msix.state.pba_read(offset, width),
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        if bar == ROM_BAR {
            return Ok(());
        }
        match self.target(bar, offset, width)? {
            Target::Device => self.with_device(|| self.host.bar_write(bar, offset, width, value)),
            Target::Registers(registers) => self.registers_write(registers, offset, width, value),
            Target::Table(msix, offset) => msix.state.table_write(offset, width, value),
            Target::Pending(..) => Ok(()),
        }
    }

    fn reset(&self) {
        self.reset_device(&mut self.lock());
    }
}

impl Drop for Function {
    /// The guest lets go first, then the device is quiet; the host's function resets it when it goes.
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        *self.reachable.write().unwrap_or_else(|e| e.into_inner()) = false;
        state.mappings.hide_all(&*self.wiring.mapper);
        self.interrupts_off(&mut state);
        if self.health.usable()
            && let Err(error) = self.host.set_bus_master(false)
        {
            self.report("it does not stop its DMA", &error);
        }
    }
}
