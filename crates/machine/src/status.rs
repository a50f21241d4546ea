//! What a VM says about itself, kept up to date by the machine's thread and read by anyone at any time.

use crate::MachineSpec;
use outboard_bus::MmioBus;
use outboard_companion::Companion;
use outboard_control::{
    Counters, DeviceFunction, Disk, DmaCounters, GuestState, Name, Network, Slot, SlotState, VmStatus,
};
use outboard_host_pci::HostFunction;
use outboard_passthrough::{Loss, Vacated};
use outboard_pci::RootPort;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Instant;

/// The status of a VM. Nothing is called under its lock that could wait.
pub(crate) struct Board {
    started: Instant,
    state: Mutex<State>,
}

struct State {
    /// What changes rarely; `uptime_s`, `counters` and parts of `slots` are filled in when it is read.
    status: VmStatus,
    live: Option<Live>,
    /// DMA devices by slot. Weak: they go with their machine.
    companions: Vec<Option<Weak<Companion>>>,
}

/// What a machine that stands can be asked.
struct Live {
    bus: Arc<MmioBus>,
    ports: Vec<Arc<RootPort>>,
}

impl Board {
    /// Of the machine that `spec` describes.
    pub(crate) fn new(spec: &MachineSpec) -> Self {
        let disk = |disk: &crate::DiskSpec| Disk {
            path: disk.path.display().to_string(),
            read_only: disk.options.read_only,
        };
        let network = |net: &outboard_netstack::NetOptions| Network {
            mac: net.mac.map(|byte| format!("{byte:02x}")).join(":"),
            forwards: net.forwards.iter().map(ToString::to_string).collect(),
        };
        let status = VmStatus {
            pid: std::process::id(),
            vcpus: spec.cpus,
            memory: spec.memory,
            disks: spec.disks.iter().map(disk).collect(),
            networks: spec.nets.iter().map(network).collect(),
            ..Default::default()
        };
        Self {
            started: Instant::now(),
            state: Mutex::new(State { status, live: None, companions: Vec::new() }),
        }
    }

    pub(crate) fn set_name(&self, name: &Name) {
        self.lock().status.name = name.to_string();
    }

    pub(crate) fn set_state(&self, state: GuestState) {
        self.lock().status.state = state;
    }

    /// A machine stands: its bus, and its root ports for devices of the host with their device numbers. What was said of
    /// their slots before a reboot stays.
    pub(crate) fn built(&self, bus: &Arc<MmioBus>, ports: Vec<(u8, Arc<RootPort>)>) {
        let mut state = self.lock();
        state.status.boots += 1;
        state.status.slots.resize_with(ports.len(), Slot::default);
        for (slot, (device, _)) in state.status.slots.iter_mut().zip(&ports) {
            slot.port = format!("00:{device:02x}.0");
        }
        state.live =
            Some(Live { bus: bus.clone(), ports: ports.into_iter().map(|(_, port)| port).collect() });
    }

    /// The DMA devices of the machine that stands, for each slot that has one.
    pub(crate) fn companions(&self, companions: Vec<Option<Weak<Companion>>>) {
        self.lock().companions = companions;
    }

    /// The machine is being taken apart: nothing of it is held from here on.
    pub(crate) fn taken_apart(&self) {
        let mut state = self.lock();
        state.status.state = GuestState::Stopping;
        state.live = None;
    }

    /// A device is in slot `index`.
    pub(crate) fn filled(&self, index: usize, device: String, functions: &[Arc<dyn HostFunction>]) {
        let function = |function: &Arc<dyn HostFunction>| {
            let identity = function.identity();
            DeviceFunction {
                address: identity.address.to_string(),
                id: format!("{:04x}:{:04x}", identity.vendor, identity.device),
                class: format!("{:06x}", identity.class),
                lost: None,
            }
        };
        self.slot(index, |slot| {
            slot.device = Some(device);
            slot.functions = functions.iter().map(function).collect();
            (slot.state, slot.why) = (SlotState::On, None);
        });
    }

    /// The guest was asked to let go of what is in slot `index`.
    pub(crate) fn ejecting(&self, index: usize) {
        self.slot(index, |slot| slot.state = SlotState::Ejecting);
    }

    /// Slot `index` is empty; what was lost stays there to be seen until something else takes its place.
    pub(crate) fn vacated(&self, index: usize, why: &Vacated) {
        self.slot(index, |slot| match why {
            Vacated::Ejected => {
                *slot = Slot { port: std::mem::take(&mut slot.port), ..Slot::default() };
            }
            Vacated::Lost(losses) => {
                (slot.state, slot.why) = (SlotState::Gone, Some(GONE.into()));
                for (address, loss) in losses {
                    let address = address.to_string();
                    let said = match loss {
                        Loss::Gone => GONE.to_owned(),
                        Loss::Broken(why) => {
                            (slot.state, slot.why) = (SlotState::Broken, Some(format!("{address}: {why}")));
                            why.clone()
                        }
                    };
                    let functions = slot.functions.iter_mut();
                    functions.filter(|f| f.address == address).for_each(|f| f.lost = Some(said.clone()));
                }
            }
        });
    }

    /// Whether the device in slot `index` has power: the guest has taken it. `None` if there is none (any more).
    pub(crate) fn powered(&self, index: usize) -> Option<bool> {
        match self.read().slots.get(index)?.state {
            SlotState::On => Some(true),
            SlotState::Off => Some(false),
            _ => None,
        }
    }

    /// How it is now.
    pub(crate) fn read(&self) -> VmStatus {
        let mut status = self.read_board();
        let companions = self.lock().companions.clone();
        // Not under the lock: this may wait for a mapping that is being made.
        for (slot, companion) in status.slots.iter_mut().zip(companions) {
            slot.dma = companion.and_then(|companion| companion.upgrade()).map(|c| counters(&c));
        }
        status
    }

    fn read_board(&self) -> VmStatus {
        let state = self.lock();
        let mut status = state.status.clone();
        status.uptime_s = self.started.elapsed().as_secs();
        if let Some(Live { bus, ports }) = &state.live {
            let stats = bus.stats();
            status.counters =
                Some(Counters { unmapped_accesses: stats.unmapped, refused_accesses: stats.refused });
            for (slot, port) in status.slots.iter_mut().zip(ports) {
                slot.bus = Some(port.secondary_bus()).filter(|bus| *bus != 0);
                if slot.state == SlotState::On && !port.powered() {
                    slot.state = SlotState::Off;
                }
            }
        }
        status
    }

    fn slot(&self, index: usize, change: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.lock().status.slots.get_mut(index) {
            change(slot);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn counters(companion: &Companion) -> DmaCounters {
    let (usage, limits, (maps, unmaps)) = (companion.usage(), companion.limits(), companion.counts());
    DmaCounters {
        bytes: usage.bytes,
        entries: usage.entries.into(),
        limit_bytes: limits.bytes,
        limit_entries: limits.entries,
        maps,
        unmaps,
        mistakes: usage.mistakes,
    }
}

const GONE: &str = "it was unplugged, or the host wanted it back";
