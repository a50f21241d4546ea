//! The common configuration structure (virtio 1.2, section 4.1.4.3): register table, negotiation, queue set-up.

use super::shared::Shared;
use crate::{Activation, ActiveQueue, GuestMemory, VirtioDevice, VirtioInterrupt};
use outboard_bus::{AccessError, Event, Width, warn_limited};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

/// Device status bits (virtio 1.2, section 2.1).
pub mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
}

/// Feature bits of the transport and the queues (virtio 1.2, section 6).
pub mod feature {
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Bytes of the structure: up to and with `queue_device`.
pub const COMMON_LEN: u32 = 0x38;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOff,
    QueueDesc,
    QueueDriver,
    QueueDevice,
}

/// Offset, width, register.
const REGISTERS: [(u64, Width, Register); 16] = [
    (0x00, Width::B4, Register::DeviceFeatureSelect),
    (0x04, Width::B4, Register::DeviceFeature),
    (0x08, Width::B4, Register::DriverFeatureSelect),
    (0x0c, Width::B4, Register::DriverFeature),
    (0x10, Width::B2, Register::ConfigVector),
    (0x12, Width::B2, Register::NumQueues),
    (0x14, Width::B1, Register::DeviceStatus),
    (0x15, Width::B1, Register::ConfigGeneration),
    (0x16, Width::B2, Register::QueueSelect),
    (0x18, Width::B2, Register::QueueSize),
    (0x1a, Width::B2, Register::QueueVector),
    (0x1c, Width::B2, Register::QueueEnable),
    (0x1e, Width::B2, Register::QueueNotifyOff),
    (0x20, Width::B8, Register::QueueDesc),
    (0x28, Width::B8, Register::QueueDriver),
    (0x30, Width::B8, Register::QueueDevice),
];

/// The register that an access means, and the bits of it that take part: a register is accessed whole, a 64-bit one
/// also by its halves (virtio 1.2, section 4.1.3.1).
fn locate(offset: u64, width: Width) -> Result<(Register, u32, u64), AccessError> {
    let at = REGISTERS.iter().rev().find(|(start, ..)| *start <= offset);
    let (start, full, register) = *at.ok_or(AccessError::NoRegister)?;
    if offset >= u64::from(COMMON_LEN) {
        return Err(AccessError::NoRegister);
    }
    match (full, offset - start, width) {
        (full, 0, width) if full == width => Ok((register, 0, width.all_ones())),
        (Width::B8, 0, Width::B4) => Ok((register, 0, 0xffff_ffff)),
        (Width::B8, 4, Width::B4) => Ok((register, 32, 0xffff_ffff_0000_0000)),
        _ => Err(AccessError::BadWidth),
    }
}

struct QueueRegisters {
    max: u16,
    size: u16,
    enabled: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self { max, size: max, enabled: false, desc: 0, driver: 0, device: 0 }
    }

    /// Whether the three areas are aligned and in RAM (virtio 1.2, section 2.7), with the fields of EVENT_IDX.
    fn is_usable(&self, memory: &GuestMemory) -> bool {
        let size = usize::from(self.size);
        [
            (self.desc, 16, 16 * size, Permissions::Read),
            (self.driver, 2, 6 + 2 * size, Permissions::Read),
            (self.device, 4, 6 + 8 * size, Permissions::Write),
        ]
        .into_iter()
        .all(|(address, align, len, access)| {
            address.is_multiple_of(align) && memory.check_range(GuestAddress(address), len, access)
        })
    }

    fn build(&self, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(self.max)?;
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(GuestAddress(self.desc))?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver))?;
        queue.try_set_used_ring_address(GuestAddress(self.device))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}

/// The device and the registers through which the driver sets it up. Under the transport's lock, which no worker takes.
pub struct Common {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    shared: Arc<Shared>,
    doorbells: Vec<Arc<Event>>,
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    active: bool,
    /// The device's configuration at `config_generation`: what the driver reads changes only when the generation does.
    config: Vec<u8>,
    config_generation: u32,
}

impl Common {
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        shared: Arc<Shared>,
        doorbells: Vec<Arc<Event>>,
    ) -> Self {
        let offered = device.features() | feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX;
        let queues = device.queue_sizes().into_iter().map(QueueRegisters::new).collect();
        let (config, config_generation) = (device.config(), shared.generation());
        Self {
            device,
            memory,
            shared,
            doorbells,
            offered,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            queues,
            active: false,
            config,
            config_generation,
        }
    }

    pub fn into_device(self) -> Box<dyn VirtioDevice> {
        self.device
    }

    pub fn read(&self, offset: u64, width: Width) -> Result<u64, AccessError> {
        let (register, shift, mask) = locate(offset, width)?;
        Ok((self.register(register) & mask) >> shift)
    }

    fn register(&self, register: Register) -> u64 {
        let queue = self.queues.get(usize::from(self.queue_select));
        match register {
            Register::DeviceFeatureSelect => self.device_feature_select.into(),
            Register::DeviceFeature => feature_word(self.offered, self.device_feature_select),
            Register::DriverFeatureSelect => self.driver_feature_select.into(),
            Register::DriverFeature => feature_word(self.accepted, self.driver_feature_select),
            Register::ConfigVector => self.shared.config_vector().into(),
            Register::NumQueues => self.queues.len() as u64,
            Register::DeviceStatus => self.shared.status.load(Ordering::SeqCst).into(),
            Register::ConfigGeneration => self.shared.generation().into(),
            Register::QueueSelect => self.queue_select.into(),
            Register::QueueVector => self.shared.queue_vector(self.queue_select).into(),
            Register::QueueSize => queue.map_or(0, |q| q.size.into()),
            Register::QueueEnable => queue.map_or(0, |q| q.enabled.into()),
            Register::QueueNotifyOff => queue.map_or(0, |_| self.queue_select.into()),
            Register::QueueDesc => queue.map_or(0, |q| q.desc),
            Register::QueueDriver => queue.map_or(0, |q| q.driver),
            Register::QueueDevice => queue.map_or(0, |q| q.device),
        }
    }

    pub fn write(&mut self, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        let (register, shift, mask) = locate(offset, width)?;
        let value = self.register(register) & !mask | value << shift & mask;
        match register {
            Register::DeviceFeatureSelect => self.device_feature_select = value as u32,
            Register::DriverFeatureSelect => self.driver_feature_select = value as u32,
            Register::DriverFeature => self.accept(value),
            Register::ConfigVector => self.shared.set_config_vector(value as u16),
            Register::QueueSelect => self.queue_select = value as u16,
            Register::QueueVector => self.shared.set_queue_vector(self.queue_select, value as u16),
            Register::DeviceStatus => self.set_status(value as u8),
            Register::QueueSize
            | Register::QueueEnable
            | Register::QueueDesc
            | Register::QueueDriver
            | Register::QueueDevice => self.set_queue(register, value),
            Register::DeviceFeature
            | Register::NumQueues
            | Register::ConfigGeneration
            | Register::QueueNotifyOff => {}
        }
        Ok(())
    }

    /// Features are settled with FEATURES_OK.
    fn accept(&mut self, word: u64) {
        if self.shared.status.load(Ordering::SeqCst) & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | word,
            1 => self.accepted = self.accepted & 0xffff_ffff | word << 32,
            _ => {}
        }
    }

    /// Nothing about a queue changes once it is enabled: its worker has checked what it was (the fault of
    /// CVE-2026-5747 was to let it).
    fn set_queue(&mut self, register: Register, value: u64) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)).filter(|q| !q.enabled) else {
            return;
        };
        match register {
            Register::QueueSize if value.is_power_of_two() && value <= queue.max.into() => {
                queue.size = value as u16
            }
            Register::QueueDesc => queue.desc = value,
            Register::QueueDriver => queue.driver = value,
            Register::QueueDevice => queue.device = value,
            Register::QueueEnable if value == 1 && !self.active => {
                queue.enabled = queue.is_usable(&self.memory);
                if !queue.enabled {
                    let (name, index) = (&self.shared.name, self.queue_select);
                    warn_limited!("{name}: queue {index} stays off: its rings are unaligned or not in RAM");
                }
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let old = self.shared.status.load(Ordering::SeqCst);
        // Bits are never cleared but by a reset (virtio 1.2, section 2.1.1); NEEDS_RESET is the device's own.
        let mut added = value & !old & !status::NEEDS_RESET;
        if added & status::FEATURES_OK != 0 && !self.features_acceptable() {
            added &= !status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && (old | added) & status::FEATURES_OK == 0 {
            warn_limited!("{}: driver is ready without agreeing on features", self.shared.name);
            added &= !status::DRIVER_OK;
        }
        self.shared.status.fetch_or(added, Ordering::SeqCst);
        if added & status::DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn features_acceptable(&self) -> bool {
        let acceptable = self.accepted & !self.offered == 0 && self.accepted & feature::VERSION_1 != 0;
        if !acceptable {
            let (name, accepted, offered) = (&self.shared.name, self.accepted, self.offered);
            warn_limited!(
                "{name}: features {accepted:#x} refused: {offered:#x} are offered, version 1 is required"
            );
        }
        acceptable
    }

    fn activate(&mut self) {
        let event_idx = self.accepted & feature::EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, (registers, doorbell)) in (0..).zip(self.queues.iter().zip(&self.doorbells)) {
            let queue = registers.enabled.then(|| registers.build(event_idx)).transpose();
            let queue = queue.expect("size and alignment were checked when they were set");
            queues.push(queue.map(|queue| ActiveQueue { index, queue, doorbell: Arc::clone(doorbell) }));
        }
        let interrupt = Arc::clone(&self.shared) as Arc<dyn VirtioInterrupt>;
        let activation =
            Activation { memory: self.memory.clone(), features: self.accepted, queues, interrupt };
        self.active = true;
        if let Err(error) = self.device.activate(activation) {
            self.shared.device_broken(&format!("host error at its start: {error}"));
        }
    }

    /// Stops the device and forgets everything the driver set.
    pub fn reset(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        self.accepted = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max);
        }
        for doorbell in &self.doorbells {
            doorbell.take();
        }
        self.refresh_config();
        // Last: the driver polls the status to see the reset done.
        self.shared.reset();
    }

    pub fn read_config(&mut self, offset: u64, width: Width) -> Result<u64, AccessError> {
        if self.config_generation != self.shared.generation() {
            self.refresh_config();
        }
        let start = usize::try_from(offset).map_err(|_| AccessError::NoRegister)?;
        let bytes = start.checked_add(width.bytes() as usize).and_then(|end| self.config.get(start..end));
        let bytes = bytes.ok_or(AccessError::NoRegister)?;
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    pub fn write_config(&mut self, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        let end = offset.checked_add(width.bytes()).ok_or(AccessError::NoRegister)?;
        if end > self.config.len() as u64 {
            return Err(AccessError::NoRegister);
        }
        self.device.write_config(offset, &value.to_le_bytes()[..width.bytes() as usize]);
        self.refresh_config();
        Ok(())
    }

    fn refresh_config(&mut self) {
        // The generation first: if the device changes its configuration in between, it is read once more.
        self.config_generation = self.shared.generation();
        self.config = self.device.config();
    }
}

fn feature_word(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}
