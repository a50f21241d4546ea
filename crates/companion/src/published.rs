//! The published version-2 protocol (`dart-and-dma.md` 1.1 to 1.3), so that a guest with the reference module works.

use crate::core::Core;
use crate::device::register;
use crate::ram::{self, number};
use outboard_abi::PCI_CLASS;
use outboard_abi::published::*;
use outboard_bus::{AccessError, Width};
use outboard_pci::{BarKind, ConfigAccess, ConfigSpace, Decoded, Identity, PciFunction, RootPort};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::{Bytes, VolatileSlice};

/// The function of a companion that speaks the published protocol.
pub struct Published {
    name: String,
    core: Arc<Core>,
    layout: Layout,
    /// The slot's root port: it knows which bus number the guest has given.
    port: Arc<RootPort>,
    command: AtomicU64,
    status: AtomicU32,
    /// Commands run one after the other, as under the lock that the published device has.
    running: Mutex<()>,
    config: Mutex<ConfigSpace>,
}

/// Bytes of requests and responses, and where a response has its length and status.
struct Shape {
    map_request: usize,
    map_response: usize,
    /// Bytes of a length.
    len: usize,
}

/// Both kinds of unmap entries, in both layouts.
const UNMAP_BYTES: usize = 16;
/// In an unmap response.
const UNMAP_STATUS: usize = 8;
/// In a map response: the length; the status follows it.
const MAP_LEN: usize = 16;

impl Shape {
    const fn of(layout: Layout) -> Self {
        match layout {
            Layout::A => Self { map_request: 16, map_response: 24, len: 4 },
            Layout::B => Self { map_request: 20, map_response: 28, len: 8 },
        }
    }
}

impl Published {
    pub(crate) fn new(core: Arc<Core>, layout: Layout, port: Arc<RootPort>) -> Self {
        let mut config = ConfigSpace::endpoint(Identity {
            vendor: PUBLISHED_PCI_VENDOR,
            device: PUBLISHED_PCI_DEVICE,
            class: PCI_CLASS,
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.add_bar(0, u64::from(PUBLISHED_BAR_BYTES), BarKind::Memory32);
        Self {
            name: format!("{} published", core.name),
            core,
            layout,
            port,
            command: AtomicU64::new(0),
            status: AtomicU32::new(PUBLISHED_OK),
            running: Mutex::new(()),
            config: Mutex::new(config),
        }
    }

    fn ring(&self) {
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let status = self.run(self.command.load(Ordering::Acquire));
        self.status.store(status, Ordering::Release);
    }

    /// Runs the command at `address`; its status, also written there if it can be.
    fn run(&self, address: u64) -> u32 {
        let page = (address != 0).then(|| ram::copy(self.core.ram(), address, PUBLISHED_CMD_BYTES.into()));
        let Some(Some(page)) = page else { return PUBLISHED_INVAL };
        let status = self.run_command(&page);
        if let Some(page) = ram::slice(self.core.ram(), address, PUBLISHED_CMD_BYTES.into()) {
            put(&page, PUBLISHED_CMD_STATUS as usize, &status.to_le_bytes());
        }
        status
    }

    fn run_command(&self, page: &[u8]) -> u32 {
        let (kind, count) = (number::<4>(page, 0) as u32, number::<4>(page, 4));
        let shape = Shape::of(self.layout);
        let (request, response) = match kind {
            PUBLISHED_MAP => (shape.map_request, shape.map_response),
            PUBLISHED_UNMAP => (UNMAP_BYTES, UNMAP_BYTES),
            _ => return PUBLISHED_INVAL,
        };
        if count == 0 || count > u64::from(PUBLISHED_MAX_ENTRIES_VALUE) {
            return PUBLISHED_INVAL;
        }
        let [requests, responses] = [number::<8>(page, 16), number::<8>(page, 24)];
        if requests == 0 || responses == 0 {
            return PUBLISHED_INVAL;
        }
        let requests = ram::copy(self.core.ram(), requests, count * request as u64);
        let responses = ram::slice(self.core.ram(), responses, count * response as u64);
        let (Some(requests), Some(responses)) = (requests, responses) else { return PUBLISHED_INVAL };
        let mut result = PUBLISHED_OK;
        for (index, entry) in requests.chunks_exact(request).enumerate() {
            let at = index * response;
            let done = if kind == PUBLISHED_UNMAP {
                self.unmap(entry, &responses, at)
            } else {
                self.map(&shape, entry, &responses, at)
            };
            if !done {
                self.core.stats.refused.fetch_add(1, Ordering::Relaxed);
                result = PUBLISHED_IOERR;
            }
        }
        result
    }

    /// Whether it is mapped. Of a failed entry's response only the status is written.
    fn map(&self, shape: &Shape, request: &[u8], responses: &VolatileSlice<'_>, at: usize) -> bool {
        let address = number::<8>(request, 0);
        let len = if shape.len == 4 { number::<4>(request, 8) } else { number::<8>(request, 8) };
        let flags = number::<4>(request, 8 + shape.len);
        let mapped = if flags == 0 { self.core.map_published(address, len).ok() } else { None };
        let status = if mapped.is_some() { PUBLISHED_OK } else { PUBLISHED_IOERR };
        if let Some(bus) = mapped {
            put(responses, at, &address.to_le_bytes());
            put(responses, at + 8, &bus.to_le_bytes());
            put(responses, at + MAP_LEN, len.to_le_bytes().get(..shape.len).unwrap_or_default());
        }
        put(responses, at + MAP_LEN + shape.len, &status.to_le_bytes());
        mapped.is_some()
    }

    fn unmap(&self, request: &[u8], responses: &VolatileSlice<'_>, at: usize) -> bool {
        let id = number::<8>(request, 0);
        let unmapped = self.core.unmap_published(id).is_ok();
        let status = if unmapped { PUBLISHED_OK } else { PUBLISHED_IOERR };
        put(responses, at, &id.to_le_bytes());
        put(responses, at + UNMAP_STATUS, &u64::from(status).to_le_bytes());
        unmapped
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes within what was checked to be RAM.
fn put(to: &VolatileSlice<'_>, at: usize, bytes: &[u8]) {
    let _ = to.write_slice(bytes, at);
}

impl PciFunction for Published {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, access: ConfigAccess) -> u32 {
        self.config().read(access)
    }

    fn config_write(&self, access: ConfigAccess, value: u32) {
        self.config().write(access, value);
    }

    fn decoded(&self) -> Decoded {
        self.config().decoded()
    }

    fn bar_read(&self, _: usize, offset: u64, width: Width) -> Result<u64, AccessError> {
        if width != Width::B4 {
            return Err(AccessError::BadWidth);
        }
        match register(offset, width)? {
            PUBLISHED_VERSION => Ok(PUBLISHED_VERSION_VALUE.into()),
            // The served function is number 0 of device 0 on the bus behind the port, whatever number the guest has given it.
            PUBLISHED_MANAGED_BDF => Ok(u64::from(self.port.secondary_bus()) << 8),
            PUBLISHED_MAX_ENTRIES => Ok(PUBLISHED_MAX_ENTRIES_VALUE.into()),
            PUBLISHED_STATUS => Ok(self.status.load(Ordering::Acquire).into()),
            _ => Err(AccessError::NoRegister),
        }
    }

    fn bar_write(&self, _: usize, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        if width != Width::B4 {
            return Err(AccessError::BadWidth);
        }
        let low = u64::from(u32::MAX);
        let (mask, value) = match register(offset, width)? {
            PUBLISHED_CMD_LO => (low, value & low),
            PUBLISHED_CMD_HI => (!low, value << 32),
            PUBLISHED_DOORBELL => {
                self.ring();
                return Ok(());
            }
            _ => return Err(AccessError::NoRegister),
        };
        let set = |command: u64| Some(command & !mask | value);
        let _ = self.command.fetch_update(Ordering::AcqRel, Ordering::Acquire, set);
        Ok(())
    }

    fn reset(&self) {
        self.config().reset();
        self.command.store(0, Ordering::Release);
        self.status.store(PUBLISHED_OK, Ordering::Release);
    }
}
