//! Virtio over PCI, the modern transport (virtio 1.2, section 4.1).

mod common;
mod shared;

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use common::{feature, status};

use crate::{GuestMemory, VirtioDevice};
use common::{COMMON_LEN, Common};
use outboard_bus::{AccessError, Event, MsiSink, Width};
use outboard_pci::{
    BarKind, ConfigAccess, ConfigSpace, Decoded, Identity, Msix, MsixLayout, PciFunction, regs::CAP_ID_VENDOR,
};
use shared::Shared;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// Lets the kernel take a queue's doorbell, so that ringing it makes no exit to this process. The machine implements it
/// with `Vm::bind_doorbell`. A failure is the binder's to log: the doorbell then works through the MMIO handler.
pub trait DoorbellBinder: Send + Sync {
    /// A guest store of `width` bytes of `value` (any value if `None`) at `ipa` shall signal `event` from now on.
    fn bind(&self, ipa: u64, width: u8, value: Option<u32>, event: &Event);

    /// Ends what `bind` with the same arguments began, if it succeeded.
    fn unbind(&self, ipa: u64, width: u8, value: Option<u32>, event: &Event);
}

/// BAR 0, the only one: a 4 KiB page for each structure, then the MSI-X table (up to 512 vectors) and its PBA.
const BAR_LEN: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PBA: u64 = 0x6000;
/// Bytes between the doorbells of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Width in bytes of a doorbell write: the queue's index (virtio 1.2, section 4.1.5.2).
const NOTIFY_WIDTH: u8 = 2;
/// As many as have room for a vector each.
const MAX_QUEUES: usize = 511;

/// `cfg_type` of the structures (virtio 1.2, section 4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// A virtio device as a PCI function.
///
/// Lock order: `common` and `config` are leaves for vCPU threads; the device's `reset` and `activate` run under
/// `common`, which is free of deadlock because workers never take it: what they need is in [`Shared`]. Doorbells, ISR
/// and the MSI-X table take neither.
pub struct VirtioPci {
    shared: Arc<Shared>,
    config: Mutex<ConfigSpace>,
    common: Mutex<Common>,
    doorbells: Vec<Arc<Event>>,
    binder: Option<Arc<dyn DoorbellBinder>>,
    /// Where BAR 0 is, for `unbind`.
    bound_at: Mutex<Option<u64>>,
    /// Offset of the capability that is a window into BAR 0.
    window: u16,
}

impl VirtioPci {
    /// Makes a function out of `device`, which works on `memory` and interrupts through `msi`. Without `binder`,
    /// doorbells are MMIO writes.
    ///
    /// # Errors
    /// The operating system's, when the process is out of file descriptors.
    ///
    /// # Panics
    /// If the device has more than 511 queues, or one whose size is not a power of two up to 32768.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        msi: Arc<dyn MsiSink>,
        binder: Option<Arc<dyn DoorbellBinder>>,
    ) -> io::Result<Arc<Self>> {
        let sizes = device.queue_sizes();
        assert!(sizes.len() <= MAX_QUEUES, "{} queues", sizes.len());
        assert!(sizes.iter().all(|s| s.is_power_of_two()), "queue sizes {sizes:?}");
        let doorbells = sizes.iter().map(|_| Event::new().map(Arc::new)).collect::<io::Result<Vec<_>>>()?;
        // One vector for each queue and one for configuration changes.
        let msix = Arc::new(Msix::new(sizes.len() as u16 + 1, msi));
        let (config, window) = config_space(&*device, Arc::clone(&msix));
        let shared = Arc::new(Shared::new(device.name().to_owned(), msix, sizes.len()));
        let common = Common::new(device, memory, Arc::clone(&shared), doorbells.clone());
        Ok(Arc::new(Self {
            shared,
            config: Mutex::new(config),
            common: Mutex::new(common),
            doorbells,
            binder,
            bound_at: Mutex::new(None),
            window,
        }))
    }

    /// Takes the function apart, reset, to make another one of the device: after a reboot, for a new VM.
    pub fn into_device(self) -> Box<dyn VirtioDevice> {
        self.reset();
        self.common.into_inner().unwrap_or_else(|e| e.into_inner()).into_device()
    }

    fn common(&self) -> MutexGuard<'_, Common> {
        self.common.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What the PCI configuration access capability points at (virtio 1.2, section 4.1.4.9), if it is an access that
    /// the BAR could see.
    fn window_target(&self) -> Option<(u64, Width)> {
        let config = self.config();
        let bar = config.dword(self.window + 4) as u8;
        let offset = u64::from(config.dword(self.window + 8));
        let width = match config.dword(self.window + 12) {
            1 => Width::B1,
            2 => Width::B2,
            4 => Width::B4,
            _ => return None,
        };
        let inside = offset.is_multiple_of(width.bytes()) && offset + width.bytes() <= BAR_LEN;
        (bar == 0 && inside).then_some((offset, width))
    }

    /// The queue's doorbell at `offset` from the notification structure.
    fn doorbell(&self, offset: u64) -> Result<&Event, AccessError> {
        let queue = (offset / u64::from(NOTIFY_MULTIPLIER)) as usize;
        let doorbell = self.doorbells.get(queue).ok_or(AccessError::NoRegister)?;
        if offset.is_multiple_of(NOTIFY_MULTIPLIER.into()) {
            Ok(doorbell)
        } else {
            Err(AccessError::BadWidth)
        }
    }
}

/// PCI class code (PCI Code and ID Assignment 1.11) for a virtio device number.
fn class(device_id: u16) -> u32 {
    match device_id {
        1 => 0x02_0000,
        2 => 0x01_0000,
        3 | 19 => 0x07_8000,
        _ => 0x00_ff00,
    }
}

fn config_space(device: &dyn VirtioDevice, msix: Arc<Msix>) -> (ConfigSpace, u16) {
    let id = device.device_id();
    let mut config = ConfigSpace::endpoint(Identity {
        vendor: 0x1af4,
        device: 0x1040 + id,
        class: class(id),
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x40 + id,
    });
    config.add_bar(0, BAR_LEN, BarKind::Memory32);
    let layout = MsixLayout { bar: 0, table: MSIX_TABLE as u32, pba: MSIX_PBA as u32 };
    let config_len = device.config().len() as u32;
    let queues = device.queue_sizes().len() as u32;
    config.add_msix(msix, layout);
    add_structure(&mut config, CAP_COMMON, COMMON, COMMON_LEN, &[]);
    add_structure(&mut config, CAP_ISR, ISR, 1, &[]);
    if config_len > 0 {
        add_structure(&mut config, CAP_DEVICE, DEVICE, config_len, &[]);
    }
    let notify_len = queues * NOTIFY_MULTIPLIER;
    add_structure(&mut config, CAP_NOTIFY, NOTIFY, notify_len, &NOTIFY_MULTIPLIER.to_le_bytes());
    let window = add_structure(&mut config, CAP_PCI, 0, 0, &[0; 4]);
    (config, window)
}

/// A `virtio_pci_cap` (virtio 1.2, section 4.1.4) for `len` bytes at `offset` of BAR 0, and `more` after it.
fn add_structure(config: &mut ConfigSpace, kind: u8, offset: u64, len: u32, more: &[u8]) -> u16 {
    let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(more);
    let mut writable = vec![0; body.len()];
    if kind == CAP_PCI {
        // BAR, offset, length and data are the driver's.
        writable[2] = 0xff;
        writable[6..].fill(0xff);
    }
    config.add_capability(CAP_ID_VENDOR, &body, &writable)
}

impl PciFunction for VirtioPci {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn config_read(&self, access: ConfigAccess) -> u32 {
        if access.offset() == self.window + 16
            && let Some((offset, width)) = self.window_target()
        {
            return self.bar_read(0, offset, width).unwrap_or(width.all_ones()) as u32;
        }
        self.config().read(access)
    }

    fn config_write(&self, access: ConfigAccess, value: u32) {
        self.config().write(access, value);
        if access.offset() == self.window + 16
            && let Some((offset, width)) = self.window_target()
        {
            let data = self.config().dword(self.window + 16);
            // A register that does not take it drops it, as it would through the BAR.
            let _ = self.bar_write(0, offset, width, width.truncate(data.into()));
        }
    }

    fn decoded(&self) -> Decoded {
        self.config().decoded()
    }

    fn bar_mapped(&self, _: usize, address: Option<u64>) {
        let Some(binder) = &self.binder else { return };
        let mut bound_at = self.bound_at.lock().unwrap_or_else(|e| e.into_inner());
        let doorbell = |bar: u64, queue: usize| bar + NOTIFY + queue as u64 * u64::from(NOTIFY_MULTIPLIER);
        for (queue, event) in self.doorbells.iter().enumerate() {
            if let Some(old) = *bound_at {
                binder.unbind(doorbell(old, queue), NOTIFY_WIDTH, None, event);
            }
            if let Some(new) = address {
                binder.bind(doorbell(new, queue), NOTIFY_WIDTH, None, event);
            }
        }
        *bound_at = address;
    }

    fn bar_read(&self, _: usize, offset: u64, width: Width) -> Result<u64, AccessError> {
        match offset {
            COMMON..ISR => self.common().read(offset, width),
            ISR if width == Width::B1 => Ok(self.shared.take_isr().into()),
            DEVICE..NOTIFY => self.common().read_config(offset - DEVICE, width),
            NOTIFY..MSIX_TABLE => self.doorbell(offset - NOTIFY).map(|_| 0),
            MSIX_TABLE..MSIX_PBA => self.shared.msix.table_read(offset - MSIX_TABLE, width),
            MSIX_PBA.. => self.shared.msix.pba_read(offset - MSIX_PBA, width),
            _ => Err(AccessError::NoRegister),
        }
    }

    fn bar_write(&self, _: usize, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        match offset {
            COMMON..ISR => self.common().write(offset, width, value),
            DEVICE..NOTIFY => self.common().write_config(offset - DEVICE, width, value),
            NOTIFY..MSIX_TABLE => self.doorbell(offset - NOTIFY).map(Event::signal),
            MSIX_TABLE..MSIX_PBA => self.shared.msix.table_write(offset - MSIX_TABLE, width, value),
            _ => Err(AccessError::NoRegister),
        }
    }

    fn reset(&self) {
        self.common().reset();
        self.config().reset();
    }
}
