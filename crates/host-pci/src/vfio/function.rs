//! One PCI function behind VFIO.

use super::domain::VfioDomain;
use super::interrupts::{self, Enabled};
use super::region::{Bar, Region};
use super::reset::COMMAND;
use super::sys::{self, failed};
use crate::capabilities::{self, PCIE};
use crate::fingerprint::{Fingerprint, Settings};
use crate::{
    Error, FunctionIdentity, HostBar, HostBarKind, HostFunction, InterruptCounts, InterruptKind,
    InterruptSink, IoPorts, MappedBar, PciAddress, Result,
};
use outboard_bus::{Event, Width, warn_limited};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use vfio_bindings::bindings::vfio as raw;

/// A function that is bound to vfio-pci and open here.
///
/// Locks: `interrupts`, then `command`; none is held while a sink is called.
pub struct VfioFunction {
    pub(super) identity: FunctionIdentity,
    pub(super) device: OwnedFd,
    /// sysfs's `config`: the hardware's registers.
    pub(super) header: File,
    /// sysfs's `driver_override`, open before the process is confined: a thread that resets a device must not open files. The reason where it
    /// cannot be written.
    pub(super) driver_override: std::result::Result<File, io::ErrorKind>,
    config: Region,
    pub(super) config_len: u16,
    bars: [Option<Bar>; 6],
    io_ports: IoPorts,
    rom: Option<Region>,
    msix_pages: [Vec<Range<u64>>; 6],
    counts: InterruptCounts,
    /// Offset of the PCIe capability.
    pub(super) pcie: Option<u16>,
    /// It can be reset without the others of its bus.
    pub(super) has_own_reset: bool,
    pub(super) fingerprint: Fingerprint,
    pub(super) settings: Settings,
    /// Why it must not be used any more.
    pub(super) quarantined: OnceLock<String>,
    /// Held while the command register is changed.
    pub(super) command: Mutex<()>,
    interrupts: Mutex<Option<Enabled>>,
    removal: Event,
    /// Last: mappings go only once the device is closed.
    pub(super) domain: Arc<VfioDomain>,
}

impl VfioFunction {
    /// Opens the function at `address`, which is in group `group` of `domain`; `sysfs` is its folder there. The kernel resets it, if it
    /// can.
    ///
    /// # Errors
    /// [`Error::Host`] when it is not bound to vfio-pci or the kernel refuses otherwise, [`Error::Gone`].
    pub fn open(address: PciAddress, group: u32, domain: &Arc<VfioDomain>, sysfs: &Path) -> Result<Self> {
        let group =
            domain.group(group).ok_or_else(|| Error::OutOfRange { what: format!("group {group}") })?;
        let name = CString::new(address.to_string()).expect("an address has no NUL in it");
        let device = sys::device_fd(group, &name)?;
        let path = sysfs.join("config");
        let header = File::open(&path).map_err(failed("open", path.display()))?;
        let info = device_info(device.as_fd(), address)?;
        let config = Region::open(device.as_fd(), address, raw::VFIO_PCI_CONFIG_REGION_INDEX)?;
        let config =
            config.ok_or_else(|| Error::OutOfRange { what: format!("config space of {address}") })?;
        let dword = |at| read_dword(&header, at).map_err(failed("read config of", address));
        let identity = identify(address, &dword)?;
        let chains = |at| {
            let mut bytes = [0; 4];
            config
                .read(device.as_fd(), u64::from(at), &mut bytes)
                .map_err(failed("read config of", address))?;
            Ok(u32::from_le_bytes(bytes))
        };
        let config_len = config.len.clamp(0x100, 0x1000) as u16;
        let removal = Event::new().map_err(failed("eventfd", address))?;
        interrupts::watch_removal(device.as_fd(), &removal)?;
        let (bars, io_ports) = open_bars(device.as_fd(), address, &dword)?;
        let function = Self {
            bars,
            io_ports,
            rom: Region::open(device.as_fd(), address, raw::VFIO_PCI_ROM_REGION_INDEX)?,
            msix_pages: capabilities::msix_pages(&chains)?,
            counts: interrupts::counts(device.as_fd())?,
            pcie: capabilities::find(&chains, PCIE)?.filter(|at| *at <= 0x100 - 0x14),
            has_own_reset: info.flags & raw::VFIO_DEVICE_FLAGS_RESET != 0,
            fingerprint: Fingerprint::take(&dword, &chains, config_len)?,
            settings: Settings::take(&chains)?,
            identity,
            driver_override: File::options()
                .write(true)
                .open(sysfs.join("driver_override"))
                .map_err(|e| e.kind()),
            config_len,
            quarantined: OnceLock::new(),
            command: Mutex::default(),
            interrupts: Mutex::default(),
            removal,
            domain: Arc::clone(domain),
            config,
            header,
            device,
        };
        function.write_bus_master(false)?;
        Ok(function)
    }

    /// Refuses to go on with a function that did not come back from a reset.
    fn usable(&self) -> Result<()> {
        match self.quarantined.get() {
            None => Ok(()),
            Some(why) => Err(Error::ResetFailed { address: self.identity.address, why: why.clone() }),
        }
    }

    /// The function does no DMA any more if it could be stopped or reset, or is no longer there.
    fn note_silent(&self, stopped: &Result<()>) {
        if matches!(stopped, Ok(()) | Err(Error::Gone(_))) {
            self.domain.note_master(self.identity.address, false);
        }
    }

    /// Whether the hardware still answers: class and revision are never all-ones, and VFIO has no shadow of them.
    pub(super) fn is_there(&self) -> bool {
        let mut bytes = [0; 4];
        self.config.read(self.device.as_fd(), 8, &mut bytes).is_ok() && bytes != [0xff; 4]
    }

    /// `error`, or that the device is gone if it is.
    pub(super) fn lost_or(&self, error: Error) -> Error {
        if self.is_there() { error } else { Error::Gone(self.identity.address) }
    }

    pub(super) fn read_hardware(&self, offset: u16, width: Width) -> Result<u32> {
        let mut bytes = [0; 8];
        let len = self.check_config(offset, width)?;
        self.config
            .read(self.device.as_fd(), u64::from(offset), &mut bytes[..len])
            .map_err(failed("read config of", self.identity.address))
            .map_err(|e| self.lost_or(e))?;
        self.check_all_ones(u64::from_le_bytes(bytes), width).map(|value| value as u32)
    }

    pub(super) fn write_hardware(&self, offset: u16, width: Width, value: u32) -> Result<()> {
        let len = self.check_config(offset, width)?;
        self.config
            .write(self.device.as_fd(), u64::from(offset), &u64::from(value).to_le_bytes()[..len])
            .map_err(failed("write config of", self.identity.address))
            .map_err(|e| self.lost_or(e))
    }

    fn check_config(&self, offset: u16, width: Width) -> Result<usize> {
        let len = width.bytes() as u16;
        if width == Width::B8 || !offset.is_multiple_of(len) || offset > self.config_len - len {
            return Err(Error::OutOfRange { what: format!("{len} bytes of config space at {offset:#x}") });
        }
        Ok(usize::from(len))
    }

    /// All-ones is what a bus reads where nothing is: worth another look.
    fn check_all_ones(&self, value: u64, width: Width) -> Result<u64> {
        if value == width.all_ones() && !self.is_there() {
            return Err(Error::Gone(self.identity.address));
        }
        Ok(value)
    }

    fn bar(&self, bar: usize, offset: u64, width: Width) -> Result<(&Region, usize)> {
        self.usable()?;
        let found = self.bars.get(bar).and_then(Option::as_ref);
        let found = found.filter(|b| b.info.kind != HostBarKind::Io || width != Width::B8);
        let region = found.map(|b| &b.region).filter(|r| r.holds(offset, width.bytes()));
        let what = || format!("{} bytes at {offset:#x} of BAR {bar}", width.bytes());
        Ok((region.ok_or_else(|| Error::OutOfRange { what: what() })?, width.bytes() as usize))
    }

    pub(super) fn interrupts_off(&self) -> Result<()> {
        let enabled = self.interrupts.lock().unwrap_or_else(PoisonError::into_inner).take();
        enabled.map_or(Ok(()), |e| {
            e.disable(self.device.as_fd(), self.identity.address).map_err(|e| self.lost_or(e))
        })
    }
}

impl HostFunction for VfioFunction {
    fn identity(&self) -> FunctionIdentity {
        self.identity
    }

    fn config_read(&self, offset: u16, width: Width) -> Result<u32> {
        self.usable()?;
        self.read_hardware(offset, width)
    }

    fn config_write(&self, offset: u16, width: Width, value: u32) -> Result<()> {
        self.usable()?;
        let _command =
            (offset / 4 == COMMAND / 4).then(|| self.command.lock().unwrap_or_else(PoisonError::into_inner));
        self.write_hardware(offset, width, value)
    }

    fn config_len(&self) -> u16 {
        self.config_len
    }

    fn bars(&self) -> [Option<HostBar>; 6] {
        self.bars.each_ref().map(|bar| bar.as_ref().map(|b| b.info))
    }

    fn io_ports(&self) -> IoPorts {
        self.io_ports
    }

    fn rom(&self) -> Result<Option<Vec<u8>>> {
        const MOST: u64 = 16 << 20;
        self.usable()?;
        let Some(rom) = self.rom.as_ref().filter(|r| r.len <= MOST) else { return Ok(None) };
        let mut bytes = vec![0; rom.len as usize];
        match rom.read(self.device.as_fd(), 0, &mut bytes) {
            // 0x55 0xaa (PCI Firmware 5.1): anything else is no image.
            Ok(()) => Ok(bytes.starts_with(&[0x55, 0xaa]).then_some(bytes)),
            Err(e) => Err(self.lost_or(failed("read the ROM of", self.identity.address)(e))),
        }
    }

    fn map_bar(&self, bar: usize, offset: u64, len: u64) -> Result<Arc<dyn MappedBar>> {
        self.usable()?;
        let why = "the function has no such BAR";
        let Some(Some(found)) = self.bars.get(bar) else {
            return Err(Error::NotMappable { bar, offset, len, why });
        };
        Ok(Arc::new(found.map(self.device.as_fd(), bar, offset, len, &self.msix_pages[bar])?))
    }

    fn bar_read(&self, bar: usize, offset: u64, width: Width) -> Result<u64> {
        let (region, len) = self.bar(bar, offset, width)?;
        let mut bytes = [0; 8];
        region
            .read(self.device.as_fd(), offset, &mut bytes[..len])
            .map_err(failed("read", format!("BAR {bar} of {} at {offset:#x}", self.identity.address)))
            .map_err(|e| self.lost_or(e))?;
        self.check_all_ones(u64::from_le_bytes(bytes), width)
    }

    fn bar_write(&self, bar: usize, offset: u64, width: Width, value: u64) -> Result<()> {
        let (region, len) = self.bar(bar, offset, width)?;
        region
            .write(self.device.as_fd(), offset, &value.to_le_bytes()[..len])
            .map_err(failed("write", format!("BAR {bar} of {} at {offset:#x}", self.identity.address)))
            .map_err(|e| self.lost_or(e))
    }

    fn interrupts(&self) -> InterruptCounts {
        self.counts
    }

    fn enable_interrupts(&self, kind: InterruptKind, count: u16, sink: Arc<dyn InterruptSink>) -> Result<()> {
        self.usable()?;
        self.counts.check(kind, count)?;
        let (device, address) = (self.device.as_fd(), self.identity.address);
        let mut enabled = self.interrupts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = enabled.take() {
            before.disable(device, address).map_err(|e| self.lost_or(e))?;
        }
        *enabled = Some(Enabled::new(device, address, kind, count, sink).map_err(|e| self.lost_or(e))?);
        Ok(())
    }

    fn disable_interrupts(&self) -> Result<()> {
        self.interrupts_off()
    }

    fn unmask_intx(&self) -> Result<()> {
        self.usable()?;
        Enabled::unmask_intx(self.device.as_fd(), self.identity.address).map_err(|e| self.lost_or(e))
    }

    fn set_bus_master(&self, on: bool) -> Result<()> {
        if on {
            self.usable()?;
            self.domain.note_master(self.identity.address, true);
            return self.write_bus_master(true);
        }
        let drained = self.write_bus_master(false).and_then(|()| self.drain());
        self.note_silent(&drained);
        drained
    }

    fn reset(&self) -> Result<()> {
        self.usable()?;
        let reset = self.reset_and_check();
        self.note_silent(&reset);
        reset
    }

    fn removal(&self) -> BorrowedFd<'_> {
        self.removal.as_fd()
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        let address = self.identity.address;
        type Step = fn(&VfioFunction) -> Result<()>;
        // Each on its own: the later ones matter even more where an earlier one failed.
        let steps: [(&str, Step); 3] = [
            ("interrupts off", Self::interrupts_off),
            ("bus master off", |f| f.set_bus_master(false)),
            ("reset", |f| f.usable().and_then(|()| f.reset_and_check())),
        ];
        for (step, run) in steps {
            match run(self) {
                // A failed reset was reported when it failed.
                Ok(()) | Err(Error::ResetFailed { .. }) => {}
                Err(Error::Gone(_)) => {
                    tracing::info!("{address} is gone; nothing is left to give back");
                    return;
                }
                // While the host's kernel takes the device from its driver, which is why we give it back, it lets nobody reset it.
                Err(Error::Host { source, .. }) if source.raw_os_error() == Some(libc::EAGAIN) => {
                    tracing::info!("{address} is the host's again as it is: its DMA and interrupts are off");
                }
                Err(error) => warn_limited!("giving back {address}, {step}: {error}"),
            }
        }
    }
}

fn device_info(device: BorrowedFd<'_>, address: PciAddress) -> Result<raw::vfio_device_info> {
    let argsz = size_of::<raw::vfio_device_info>() as u32;
    let mut info = raw::vfio_device_info { argsz, ..Default::default() };
    sys::DEVICE_GET_INFO.with(device, &mut info).map_err(failed(sys::DEVICE_GET_INFO.name(), address))?;
    Ok(info)
}

fn read_dword(header: &File, at: u16) -> std::io::Result<u32> {
    let mut bytes = [0; 4];
    sys::read_at(header.as_fd(), u64::from(at), &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn identify(address: PciAddress, dword: capabilities::ReadDword<'_>) -> Result<FunctionIdentity> {
    let (ids, class) = (dword(0)?, dword(8)?);
    if ids == u32::MAX {
        return Err(Error::Gone(address));
    }
    let (vendor, device) = (ids as u16, (ids >> 16) as u16);
    Ok(FunctionIdentity { address, vendor, device, class: class >> 8, revision: class as u8 })
}

fn open_bars(
    device: BorrowedFd<'_>,
    address: PciAddress,
    dword: capabilities::ReadDword<'_>,
) -> Result<([Option<Bar>; 6], IoPorts)> {
    let mut bars = [const { None }; 6];
    let mut registers = [0; 6];
    for (index, (bar, register)) in (0..).zip(bars.iter_mut().zip(&mut registers)) {
        *register = dword(0x10 + 4 * index as u16)?;
        *bar = Bar::open(device, address, index, *register)?;
    }
    let reachable = |index: usize| bars.get(index).is_some_and(Option::is_some);
    let io_ports = IoPorts::of(registers, reachable);
    Ok((bars, io_ports))
}
