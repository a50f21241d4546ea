//! What a VM says about itself, kept up to date by the machine's thread and read by anyone at any time.

use crate::MachineSpec;
use outboard_bus::MmioBus;
use outboard_cli::Chain;
use outboard_companion::Companion;
use outboard_control::{
    Counters, DeviceFunction, Disk, DmaCounters, GuestState, Name, Network, Slot, SlotState, VmStatus,
};
use outboard_host_pci::{HostFunction, Selection};
use outboard_passthrough::{Loss, Vacated};
use outboard_pci::RootPort;
use std::collections::BTreeSet;
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
    /// Indices of the ports whose device was lost since the machine was built, with nothing there since.
    lost: BTreeSet<usize>,
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
        let ports = ports.into_iter().map(|(_, port)| port).collect();
        state.live = Some(Live { bus: bus.clone(), ports, lost: BTreeSet::new() });
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
        if let Some(live) = &mut self.lock().live {
            live.lost.remove(&index);
        }
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
        if let (Some(live), Vacated::Lost(_)) = (&mut self.lock().live, why) {
            live.lost.insert(index);
        }
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

    /// The device in slot `index` could not be had again after a reboot.
    pub(crate) fn not_back(&self, index: usize, error: &crate::Error) {
        let why = Chain(error).to_string();
        self.slot(index, |slot| (slot.state, slot.why) = (SlotState::Broken, Some(why)));
    }

    /// Whether a function of `selection` is in a slot now.
    pub(crate) fn holds(&self, selection: Selection) -> bool {
        let state = self.lock();
        let gone =
            |slot: &&Slot| matches!(slot.state, SlotState::Empty | SlotState::Gone | SlotState::Broken);
        let there = state.status.slots.iter().filter(|slot| !gone(slot)).flat_map(|slot| &slot.functions);
        let mut addresses = there.filter_map(|function| function.address.parse().ok());
        addresses.any(|address| selection.contains(address))
    }

    /// Whether the guest was booted before.
    pub(crate) fn booted(&self) -> bool {
        self.lock().status.boots > 0
    }

    /// Whether every port without a device has come to rest: the guest is through with turning off what was there. What it still turned off later
    /// would be taken for its wish to have the next device out.
    pub(crate) fn settled(&self) -> bool {
        let state = self.lock();
        let Some(Live { ports, lost, .. }) = &state.live else { return true };
        let vacant =
            |slot: &Slot| matches!(slot.state, SlotState::Empty | SlotState::Gone | SlotState::Broken);
        let mut ports = ports.iter().zip(&state.status.slots).enumerate();
        ports.all(|(index, (port, slot))| {
            let rests = if port.powered() { !lost.contains(&index) } else { port.is_off() };
            rests || !vacant(slot)
        })
    }

    /// Presses the button of slot `index` if the guest has its power off: without that it does not turn on a slot that has a button.
    pub(crate) fn press(&self, index: usize) {
        let port = self.lock().live.as_ref().and_then(|live| live.ports.get(index).cloned());
        port.iter().filter(|port| !port.powered()).for_each(|port| port.press_attention_button());
    }

    /// Whether the device in slot `index` has power: the guest has taken it. `None` if there is none (any more), or no machine that stands.
    pub(crate) fn powered(&self, index: usize) -> Option<bool> {
        self.lock().live.as_ref()?;
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
        if let Some(Live { bus, ports, .. }) = &state.live {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ConsoleTarget;
    use outboard_bus::{Event, MsiMessage, MsiSink, Width};
    use outboard_host_pci::simulated::{SimulatedDevice, SimulatedDomain, endpoint};
    use outboard_hypervisor::{ThreadPriority, VcpuOptions};
    use outboard_pci::{ConfigAccess, HotPlug, PciFunction};

    struct Nowhere;

    impl MsiSink for Nowhere {
        fn send(&self, _: MsiMessage) {}
    }

    /// A board of a machine with one port, and the port.
    fn board() -> (Board, Arc<RootPort>) {
        let spec = MachineSpec {
            name: None,
            kernel: "Image".into(),
            initrd: None,
            command_line: String::new(),
            cpus: 2,
            memory: 1 << 30,
            console: ConsoleTarget::None,
            virtio_console: ConsoleTarget::None,
            disks: vec!["/d.img:ro".parse().unwrap()],
            nets: vec![],
            vsock: None,
            devices: vec![],
            spare_ports: 1,
            log: None,
            no_reboot: false,
            vcpu: VcpuOptions { tso: false, priority: ThreadPriority::Normal },
        };
        let power = Arc::new(Event::new().unwrap());
        let port = Arc::new(RootPort::with_hot_plug(3, HotPlug { msi: Arc::new(Nowhere), power }));
        let board = Board::new(&spec);
        board.built(&Arc::new(MmioBus::new()), vec![(3, port.clone())]);
        (board, port)
    }

    fn function() -> Arc<dyn HostFunction> {
        let device = SimulatedDevice::new("01:00.0".parse().unwrap(), endpoint()).unwrap();
        Arc::new(device.open(&SimulatedDomain::new()).unwrap())
    }

    /// The guest's write of slot control (PCIe 7.5.3.10): power on or off, power indicator (1 on, 2 blinks, 3 off).
    fn set_power(port: &RootPort, on: bool, indicator: u32) {
        let dword = |at: u16| port.config_read(ConfigAccess::new(at, Width::B4).unwrap());
        let mut at = (dword(0x34) & 0xff) as u16;
        while dword(at) & 0xff != 0x10 {
            at = (dword(at) >> 8 & 0xff) as u16;
        }
        let control = dword(at + 0x18) & 0xffff & !(0b111 << 8) | u32::from(!on) << 10 | indicator << 8;
        port.config_write(ConfigAccess::new(at + 0x18, Width::B2).unwrap(), control);
    }

    #[test]
    fn a_slot_is_followed_from_full_to_lost_to_full() {
        let (board, port) = board();
        assert_eq!(board.read().slots[0].port, "00:03.0");
        assert_eq!((board.powered(0), board.settled()), (None, true));
        let held = |board: &Board, text: &str| board.holds(text.parse().unwrap());
        assert!(!held(&board, "01:00"));
        board.filled(0, "0000:01:00".into(), &[function()]);
        assert_eq!(board.powered(0), Some(true));
        assert!(held(&board, "01:00") && held(&board, "01:00.0"));
        assert!(!held(&board, "01:00.1") && !held(&board, "02:00"));
        set_power(&port, false, 3);
        assert_eq!((board.powered(0), board.read().slots[0].state), (Some(false), SlotState::Off));
        set_power(&port, true, 1);
        assert_eq!(board.powered(0), Some(true));
        let address = "0000:01:00.0".parse().unwrap();
        board.vacated(0, &Vacated::Lost(vec![(address, Loss::Broken("it hangs".into()))]));
        let slot = board.read().slots.remove(0);
        assert_eq!((slot.state, slot.device.as_deref()), (SlotState::Broken, Some("0000:01:00")));
        assert_eq!(slot.functions[0].lost.as_deref(), Some("it hangs"));
        assert!(!board.settled(), "the guest has not turned the slot off");
        assert!(!held(&board, "01:00"), "it can be added again");
        set_power(&port, false, 2);
        assert!(!board.settled(), "it is not through with it");
        set_power(&port, false, 3);
        assert!(board.settled());
        board.filled(0, "0000:01:00".into(), &[function()]);
        assert!(board.read().slots[0].functions[0].lost.is_none());
        board.ejecting(0);
        board.vacated(0, &Vacated::Ejected);
        let empty = Slot { port: "00:03.0".into(), ..Slot::default() };
        assert_eq!(board.read().slots[0], empty);
    }

    #[test]
    fn what_was_lost_is_still_known_after_a_reboot() {
        let (board, port) = board();
        board.filled(0, "0000:01:00".into(), &[function()]);
        board.vacated(0, &Vacated::Lost(vec![]));
        board.taken_apart();
        assert_eq!(board.powered(0), None);
        let between = board.read();
        assert_eq!((between.state, between.counters), (GuestState::Stopping, None));
        board.built(&Arc::new(MmioBus::new()), vec![(4, port)]);
        let after = board.read();
        assert_eq!((after.boots, after.slots[0].state), (2, SlotState::Gone));
        assert_eq!(after.slots[0].port, "00:04.0");
        assert!(board.settled(), "this boot's guest has lost nothing");
        assert_eq!((after.vcpus, after.memory, after.disks[0].read_only), (2, 1 << 30, true));
    }
}
