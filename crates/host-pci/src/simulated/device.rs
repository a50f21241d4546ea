//! The hardware, with the knobs that only a test has.

use super::domain::{SimulatedDomain, Stray};
use super::endpoint::registers;
use super::faults::{Fault, Faults, Operation};
use super::function::SimulatedFunction;
use super::memory::Memory;
use super::model::Model;
use crate::{BusAddress, InterruptKind, InterruptSink, PciAddress, Result};
use outboard_bus::{Event, Width, error_limited, warn_limited};
use outboard_jail::ThreadKind;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

/// Most that one command copies, bytes.
const MOST_COPIED: u32 = 64 << 10;

/// A simulated PCI function as hardware. It works on a thread of its own, as hardware does beside the CPUs.
///
/// Locks: `interrupts` before `state`. A sink is called under `interrupts` for reading, so that turning interrupts off waits for it.
pub struct SimulatedDevice {
    pub(super) address: PciAddress,
    pub(super) model: Model,
    pub(super) bars: [Option<Arc<Memory>>; 6],
    pub(super) state: Mutex<State>,
    pub(super) interrupts: RwLock<Option<Enabled>>,
    /// Held for reading during DMA.
    pub(super) dma: RwLock<()>,
    pub(super) removal: Event,
    pub(super) faults: Faults,
    resets: AtomicU64,
    commands: Mutex<Sender<u32>>,
}

pub(super) struct State {
    pub(super) config: Vec<u8>,
    pub(super) domain: Option<Arc<SimulatedDomain>>,
    pub(super) open: bool,
    pub(super) quarantined: Option<String>,
    pub(super) removed: bool,
    pub(super) pending: bool,
    pin: bool,
    after_reset: Vec<(usize, u8)>,
}

impl State {
    /// Command bit 2: it may write to memory.
    fn is_master(&self) -> bool {
        !self.removed && self.config[4] & 0x04 != 0
    }
}

/// Interrupts that are on.
pub(super) struct Enabled {
    pub(super) kind: InterruptKind,
    pub(super) count: u16,
    pub(super) sink: Arc<dyn InterruptSink>,
    /// The pin fired and was not unmasked since.
    pub(super) masked: AtomicBool,
}

impl SimulatedDevice {
    /// Puts a device at `address`.
    ///
    /// # Errors
    /// The operating system's, when there is no memory or thread for it.
    pub fn new(address: PciAddress, model: Model) -> io::Result<Arc<Self>> {
        let mut bars = [const { None }; 6];
        for (bar, memory) in model.bars.iter().zip(&mut bars) {
            *memory = bar.map(|b| Memory::new(b.len)).transpose()?.map(Arc::new);
        }
        let state = State {
            config: model.config.clone(),
            domain: None,
            open: false,
            quarantined: None,
            removed: false,
            pending: false,
            pin: false,
            after_reset: vec![],
        };
        let (commands, receiver) = mpsc::channel();
        let device = Arc::new(Self {
            address,
            model,
            bars,
            state: Mutex::new(state),
            interrupts: RwLock::default(),
            dma: RwLock::default(),
            removal: Event::new()?,
            faults: Faults::default(),
            resets: AtomicU64::new(0),
            commands: Mutex::new(commands),
        });
        device.reset_hardware();
        let weak = Arc::downgrade(&device);
        outboard_jail::spawn(ThreadKind::Pci, "simulated-pci", move || obey(&weak, &receiver))?;
        Ok(device)
    }

    /// Hands the function over, as VFIO does one that is bound to it: for one owner at a time.
    ///
    /// # Errors
    /// [`crate::Error::Host`] while it is open, [`crate::Error::ResetFailed`] after a reset failed, [`crate::Error::Gone`].
    pub fn open(self: &Arc<Self>, domain: &Arc<SimulatedDomain>) -> Result<SimulatedFunction> {
        self.faults.meet(Operation::Open, self.address)?;
        SimulatedFunction::open(self, domain)
    }

    /// Lets `fault` happen to the next calls of `operation` on the function.
    pub fn inject(&self, operation: Operation, fault: Fault) {
        self.faults.inject(operation, fault);
    }

    /// Fires vector `vector`, which is a memory write: nothing happens without bus master, or beyond the vectors that are on. Says whether it
    /// was delivered.
    pub fn fire(&self, vector: u16) -> bool {
        let interrupts = self.interrupts.read().unwrap_or_else(PoisonError::into_inner);
        let Some(enabled) = interrupts.as_ref() else { return false };
        let message =
            enabled.kind != InterruptKind::Intx && vector < enabled.count && self.lock().is_master();
        if message {
            signal(&*enabled.sink, vector);
        }
        message
    }

    /// Raises or lowers the interrupt pin.
    pub fn set_pin(&self, high: bool) {
        {
            let mut state = self.lock();
            state.pin = high;
            // Interrupt status (PCIe 7.5.1.1.4).
            let bits = state.config[6] & !0x08;
            state.config[6] = bits | if high { 0x08 } else { 0 };
        }
        self.deliver_pin();
    }

    /// Fires the pin's interrupt if it is due.
    pub(super) fn deliver_pin(&self) {
        let interrupts = self.interrupts.read().unwrap_or_else(PoisonError::into_inner);
        let Some(enabled) = interrupts.as_ref().filter(|e| e.kind == InterruptKind::Intx) else { return };
        let due = {
            let state = self.lock();
            // Command bit 10 disables the pin.
            state.pin && !state.removed && state.config[5] & 0x04 == 0
        };
        if due && !enabled.masked.swap(true, Ordering::AcqRel) {
            signal(&*enabled.sink, 0);
        }
    }

    /// Reads memory as the device sees it; `None` if that was not mapped, or it is no bus master.
    pub fn dma_read(&self, from: BusAddress, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.with_dma(|domain| domain.read(from, &mut bytes)).then_some(bytes)
    }

    /// Writes memory as the device sees it; `false` if that was not mapped, or it is no bus master.
    pub fn dma_write(&self, to: BusAddress, bytes: &[u8]) -> bool {
        self.with_dma(|domain| domain.write(to, bytes))
    }

    /// Copies between bus addresses; as [`SimulatedDevice::dma_write`].
    pub fn dma_copy(&self, from: BusAddress, to: BusAddress, len: usize) -> bool {
        self.dma_read(from, len).is_some_and(|bytes| self.dma_write(to, &bytes))
    }

    fn with_dma(&self, access: impl FnOnce(&SimulatedDomain) -> std::result::Result<(), Stray>) -> bool {
        let _under_way = self.dma.read().unwrap_or_else(PoisonError::into_inner);
        let domain = {
            let state = self.lock();
            state.domain.clone().filter(|_| state.is_master())
        };
        domain.is_some_and(|domain| {
            access(&domain).inspect_err(|stray| warn_limited!("{}: {stray}", self.address)).is_ok()
        })
    }

    /// Pulls the cable. What was mapped of its BARs keeps what it holds.
    pub fn remove(&self) {
        self.lock().removed = true;
        self.removal.signal();
    }

    /// Asks for the device back, as a host does that unbinds it.
    pub fn request_removal(&self) {
        self.removal.signal();
    }

    /// Lets requests seem under way for as long as it is set.
    pub fn set_pending(&self, pending: bool) {
        self.lock().pending = pending;
    }

    /// What the next reset leaves changed in config space: offset and byte.
    pub fn change_at_reset(&self, changes: &[(usize, u8)]) {
        self.lock().after_reset = changes.to_vec();
    }

    /// Changes a byte of config space from the inside, whatever a write may.
    pub fn poke_config(&self, at: usize, value: u8) {
        self.lock().config[at] = value;
    }

    /// Config space as it is.
    pub fn config(&self) -> Vec<u8> {
        self.lock().config.clone()
    }

    /// Takes it out of quarantine, as `outboard devices release` does.
    pub fn release(&self) {
        self.lock().quarantined = None;
    }

    /// How often it was reset.
    pub fn resets(&self) -> u64 {
        self.resets.load(Ordering::Acquire)
    }

    /// A dword of a BAR, as the device has it; `None` if it has none there.
    pub fn register(&self, bar: usize, offset: u64) -> Option<u32> {
        self.bars.get(bar)?.as_ref()?.read(offset, Width::B4).map(|v| v as u32)
    }

    pub(super) fn reset_hardware(&self) {
        {
            let mut state = self.lock();
            let pin = state.pin;
            state.config.clone_from(&self.model.config);
            state.pin = pin && !self.model.commands;
            let changes = std::mem::take(&mut state.after_reset);
            changes.into_iter().for_each(|(at, value)| state.config[at] = value);
        }
        for (bar, offset, value) in &self.model.contents {
            self.poke(*bar, *offset, Width::B4, u64::from(*value));
        }
        self.resets.fetch_add(1, Ordering::AcqRel);
    }

    /// After a write to a BAR: a command to start?
    pub(super) fn notice(&self, bar: usize, offset: u64) {
        if self.model.commands && bar == 0 && offset == registers::COMMAND {
            let command = self.peek(registers::COMMAND, Width::B4) as u32;
            let _ = self.commands.lock().unwrap_or_else(PoisonError::into_inner).send(command);
        }
    }

    fn execute(&self, command: u32) {
        let failed = match command {
            registers::COPY => {
                let [from, to] =
                    [registers::FROM, registers::TO].map(|at| BusAddress(self.peek(at, Width::B8)));
                let len = (self.peek(registers::LEN, Width::B4) as u32).min(MOST_COPIED);
                !self.dma_copy(from, to, len as usize)
            }
            registers::FIRE => !self.fire(self.peek(registers::VECTOR, Width::B4) as u16),
            registers::RAISE | registers::LOWER => {
                self.set_pin(command == registers::RAISE);
                false
            }
            _ => true,
        };
        self.poke(0, registers::FAILED, Width::B4, failed.into());
        self.poke(0, registers::COMMAND, Width::B4, 0);
    }

    fn peek(&self, offset: u64, width: Width) -> u64 {
        self.bars[0].as_ref().and_then(|m| m.read(offset, width)).unwrap_or(0)
    }

    fn poke(&self, bar: usize, offset: u64, width: Width, value: u64) {
        let written = self.bars[bar].as_ref().and_then(|m| m.write(offset, width, value));
        assert!(written.is_some(), "the model has contents outside of its BARs");
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device's own thread: ends with the device.
fn obey(device: &Weak<SimulatedDevice>, commands: &Receiver<u32>) {
    while let Ok(command) = commands.recv() {
        // It may wait since before the process was confined.
        outboard_jail::confine(ThreadKind::Pci);
        let Some(device) = device.upgrade() else { return };
        device.execute(command);
    }
}

fn signal(sink: &dyn InterruptSink, vector: u16) {
    #[cfg(target_os = "linux")]
    if let Some(event) = sink.event(vector) {
        use std::io::Write;
        // An eventfd takes 8 bytes. One that is full is signalled already.
        let signalled =
            event.try_clone_to_owned().and_then(|fd| std::fs::File::from(fd).write_all(&1u64.to_ne_bytes()));
        if let Err(error) =
            signalled.or_else(|e| if e.kind() == io::ErrorKind::WouldBlock { Ok(()) } else { Err(e) })
        {
            error_limited!("the event of vector {vector} cannot be signalled: {error}");
        }
        return;
    }
    sink.raise(vector);
}
