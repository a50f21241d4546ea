//! The function and its registers.

use crate::batch::{Batch, Queue};
use crate::core::Core;
use crate::worker::Worker;
use crate::{GuestMemory, Published, ServedSlot};
use outboard_abi as abi;
use outboard_abi::published::Layout;
use outboard_bus::{AccessError, Width};
use outboard_host_pci::{DmaDomain, DmaLimits, DmaUsage};
use outboard_pci::{BarKind, ConfigAccess, ConfigSpace, Decoded, Identity, PciFunction, RootPort};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a companion is made of.
pub struct Config {
    /// Device number on bus 0 of the root port whose slot it serves, 1 to 31: one for each companion of a machine.
    pub port: u8,
    /// The guest's vCPUs: there is a queue for each, and one more, up to [`abi::MAX_QUEUES`].
    pub vcpus: u32,
    /// Guest RAM.
    pub ram: GuestMemory,
    /// What the registers say while the slot is empty: what is to be expected of a device there.
    pub limits: DmaLimits,
}

/// The DMA device of a slot, as a PCI function.
///
/// Dropped before [`Companion::detach`] was called, it leaves what is mapped as it is, and leaks the memory behind it.
pub struct Companion {
    core: Arc<Core>,
    queues: Arc<[Queue]>,
    worker: Worker,
    limits: Mutex<DmaLimits>,
    /// Root port by device number.
    port: u8,
    config: Mutex<ConfigSpace>,
    /// Taken when the guest's kernel has panicked: it does so once.
    guest_panic: Mutex<Option<PanicListener>>,
}

/// Called on a vCPU's thread when the guest's kernel says that it has panicked; must not block.
pub type PanicListener = Box<dyn FnOnce() + Send>;

/// What a register holds.
enum Value {
    Word(u32),
    Long(u64),
}

impl Companion {
    /// Makes it, with an empty slot.
    ///
    /// # Errors
    /// The operating system's, when it has no thread.
    pub fn new(config: Config) -> io::Result<Arc<Self>> {
        let Config { port, vcpus, ram, limits } = config;
        let name = format!("dma{port}");
        let core = Arc::new(Core::new(name, port, ram));
        let queues = vcpus.saturating_add(1).clamp(2, abi::MAX_QUEUES);
        let queues: Arc<[Queue]> = (0..queues).map(|_| Queue::default()).collect();
        let worker = Worker::start(&core, &queues)?;
        let mut space = ConfigSpace::endpoint(Identity {
            vendor: abi::PCI_VENDOR,
            device: abi::PCI_DEVICE,
            class: abi::PCI_CLASS,
            revision: 0,
            subsystem_vendor: abi::PCI_VENDOR,
            subsystem: 0,
        });
        space.add_bar(0, u64::from(abi::BAR_BYTES), BarKind::Memory32);
        let config = Mutex::new(space);
        let limits = Mutex::new(limits);
        let guest_panic = Mutex::new(None);
        Ok(Arc::new(Self { core, queues, worker, limits, port, config, guest_panic }))
    }

    /// Calls `listener` the first time that the guest's kernel says that it has panicked.
    pub fn on_guest_panic(&self, listener: PanicListener) {
        *self.guest_panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener);
    }

    /// The function that speaks the published protocol for the same slot, whose root port is `port`.
    pub fn published(&self, layout: Layout, port: Arc<RootPort>) -> Arc<Published> {
        Arc::new(Published::new(self.core.clone(), layout, port))
    }

    /// The slot is filled, with functions that find memory in `domain`: nothing is mapped in it, and nobody else maps in it. They are held back
    /// from DMA until the guest asks. `false` if the slot was not empty, or what was in it before still has memory mapped.
    pub fn attach(&self, domain: Arc<dyn DmaDomain>, slot: Arc<dyn ServedSlot>) -> bool {
        let limits = domain.limits();
        let attached = self.core.attach(domain, slot);
        if attached {
            *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
            self.worker.wake();
        }
        attached
    }

    /// The slot is empty, or the machine ends: every mapping is taken down. The functions have been stopped and reset before, or the device is
    /// gone; where it is not and may still write (`writing`), what is mapped stays, with the memory behind it.
    pub fn detach(&self, writing: bool) {
        self.core.detach(writing, || self.worker.settle());
    }

    /// What can be mapped.
    pub fn limits(&self) -> DmaLimits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the domain holds, and the mistakes in it that would have panicked a Mac.
    pub fn usage(&self) -> DmaUsage {
        self.core.usage()
    }

    /// Mappings made and taken down so far.
    pub fn counts(&self) -> (u64, u64) {
        let stats = &self.core.stats;
        (stats.maps.load(Ordering::Relaxed), stats.unmaps.load(Ordering::Relaxed))
    }

    #[cfg(test)]
    pub(crate) fn look(&self) -> bool {
        self.core.look()
    }

    fn ring(&self, index: usize, count: u32, later: bool) {
        let Some(queue) = self.queues.get(index).filter(|queue| queue.begin()) else { return };
        match Batch::take(&self.core, queue.base(), count) {
            Err(status) => queue.end((status, 0)),
            Ok(batch) => {
                self.core.stats.batches.fetch_add(1, Ordering::Relaxed);
                if later {
                    self.worker.hand_over(index, batch);
                } else {
                    queue.end(batch.run(&self.core, false));
                }
            }
        }
    }

    fn control(&self, value: u32) {
        match value {
            abi::CONTROL_ENABLE => self.core.enable(),
            abi::CONTROL_RESET => {
                self.core.reset(|| self.worker.settle());
                self.queues.iter().for_each(Queue::reset);
                self.worker.wake();
            }
            abi::CONTROL_PANICKED => {
                let listener = self.guest_panic.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(listener) = listener {
                    listener();
                }
            }
            _ => {}
        }
    }

    /// The register that begins at `at`.
    fn value(&self, at: u32) -> Option<Value> {
        use Value::{Long, Word};
        let stats = &self.core.stats;
        let stat = |stat: &AtomicU64| Long(stat.load(Ordering::Relaxed));
        Some(match at {
            abi::MAGIC => Word(abi::MAGIC_VALUE),
            abi::VERSION => Word(abi::VERSION_VALUE),
            abi::FEATURES => Word(abi::FEATURE_LATER | abi::FEATURE_PANICKED),
            abi::SERVED => Word(u32::from(self.port) << 3),
            abi::LIMIT_BYTES => Long(self.limits().bytes),
            abi::LIMIT_ENTRIES => Word(self.limits().entries),
            abi::GRANULE => Word(self.limits().granule as u32),
            abi::ADDRESS_BITS => Word(self.limits().address_bits.into()),
            abi::QUEUES => Word(self.queues.len() as u32),
            abi::BATCH => Word(abi::MAX_BATCH),
            abi::STATE => Word(self.core.register()),
            abi::STAT_BYTES => stat(&stats.bytes),
            abi::STAT_ENTRIES => stat(&stats.entries),
            abi::STAT_MAPS => stat(&stats.maps),
            abi::STAT_UNMAPS => stat(&stats.unmaps),
            abi::STAT_REFUSED => stat(&stats.refused),
            abi::STAT_BATCHES => stat(&stats.batches),
            at => {
                let (_, queue, at) = self.queue(at)?;
                match at {
                    abi::QUEUE_BASE => Long(queue.base()),
                    abi::QUEUE_STATUS => Word(queue.status()),
                    abi::QUEUE_FAILED => Word(queue.failed()),
                    _ => return None,
                }
            }
        })
    }

    /// The queue whose registers hold `at`, its number, and the offset in them.
    fn queue(&self, at: u32) -> Option<(usize, &Queue, u32)> {
        let at = at.checked_sub(abi::QUEUE_FIRST)?;
        let index = (at / abi::QUEUE_STRIDE) as usize;
        Some((index, self.queues.get(index)?, at % abi::QUEUE_STRIDE))
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The offset in the BAR, if an access of this width there can be a register's.
pub(crate) fn register(offset: u64, width: Width) -> Result<u32, AccessError> {
    let whole = matches!(width, Width::B4 | Width::B8) && offset.is_multiple_of(width.bytes());
    if whole {
        u32::try_from(offset).map_err(|_| AccessError::NoRegister)
    } else {
        Err(AccessError::BadWidth)
    }
}

impl PciFunction for Companion {
    fn name(&self) -> &str {
        &self.core.name
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
        let at = register(offset, width)?;
        match (self.value(at), width) {
            (Some(Value::Word(value)), Width::B4) => Ok(value.into()),
            (Some(Value::Long(value)), Width::B8) => Ok(value),
            (Some(Value::Long(value)), _) => Ok(value & u64::from(u32::MAX)),
            (Some(Value::Word(_)), _) => Err(AccessError::BadWidth),
            (None, Width::B4) => match at.checked_sub(4).and_then(|low| self.value(low)) {
                Some(Value::Long(value)) => Ok(value >> 32),
                _ => Err(AccessError::NoRegister),
            },
            (None, _) => Err(AccessError::NoRegister),
        }
    }

    fn bar_write(&self, _: usize, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        let at = register(offset, width)?;
        if at == abi::CONTROL && width == Width::B4 {
            self.control(value as u32);
            return Ok(());
        }
        let (index, queue, at) = self.queue(at).ok_or(AccessError::NoRegister)?;
        const HIGH: u32 = abi::QUEUE_BASE + 4;
        match (at, width) {
            (abi::QUEUE_BASE, Width::B8) => queue.set_base(u64::MAX, value),
            (abi::QUEUE_BASE, _) => queue.set_base(u32::MAX.into(), value),
            (HIGH, Width::B4) => queue.set_base(u64::MAX << 32, value << 32),
            (abi::QUEUE_DOORBELL, Width::B4) => self.ring(index, value as u32, false),
            (abi::QUEUE_DOORBELL_LATER, Width::B4) => self.ring(index, value as u32, true),
            _ => return Err(AccessError::NoRegister),
        }
        Ok(())
    }

    /// Registers only: the machine resets the served functions itself, and detaches the companion after that.
    fn reset(&self) {
        self.config().reset();
        self.queues.iter().for_each(Queue::reset);
    }
}
