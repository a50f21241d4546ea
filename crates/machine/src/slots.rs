//! The machine's root ports for devices of the host, and what is behind them while the guest runs.

use crate::Error;
use crate::devices::Host;
use crate::memory::{DmaMapping, Ram};
use crate::passthrough::{Connections, GuestSlot, HostSlot};
use crate::status::Board;
use outboard_bus::Event;
use outboard_control::Answer;
use outboard_host_pci::Selection;
use outboard_passthrough::Vacated;
use outboard_pci::{HotPlug, RootComplex, RootPort};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// After a press of the attention button a guest takes five seconds in which a second one takes it back (PCIe 6.7.1.5): before this is over it
/// is not pressed again.
const PRESS_AGAIN: Duration = Duration::from_secs(10);

/// Where the one who asked for something hears of it.
pub(crate) type Reply = Sender<Result<Answer, String>>;

/// The ports of one VM. Field order is drop order: devices leave before the memory that a broken one may still write.
pub(crate) struct Slots {
    ports: Vec<Port>,
    /// Guest memory that a broken device may still write.
    retained: Vec<DmaMapping>,
    root: Arc<RootComplex>,
    board: Arc<Board>,
    connections: Connections,
}

struct Port {
    /// Device number on bus 0.
    device: u8,
    port: Arc<RootPort>,
    power: Arc<Event>,
    slot: Option<GuestSlot>,
    /// When the guest was last asked to let go of what is there now.
    pressed: Option<Instant>,
    /// Who waits for that.
    waiting: Vec<Reply>,
}

impl Slots {
    /// A root port for each of `host`'s slots, from device number `first` on bus 0 on, with what is in the slot.
    ///
    /// # Errors
    /// [`Error`]; nothing stays behind.
    pub(crate) fn plug(
        host: &Host,
        first: u8,
        root: &Arc<RootComplex>,
        ram: &Ram,
        connections: Connections,
    ) -> Result<Self, Error> {
        let (root, board) = (root.clone(), host.board.clone());
        let mut slots = Self { ports: Vec::new(), retained: Vec::new(), root, board, connections };
        for (device, slot) in (first..).zip(&host.slots) {
            let mut port = Port::new(device, &slots.root, &slots.connections)?;
            if let Some(slot) = slot {
                port.plug(slot, &slots.root, ram, &slots.connections)?;
            }
            slots.ports.push(port);
        }
        Ok(slots)
    }

    /// The ports and their device numbers.
    pub(crate) fn ports(&self) -> Vec<(u8, Arc<RootPort>)> {
        self.ports.iter().map(|port| (port.device, port.port.clone())).collect()
    }

    /// Puts `slot` behind a free port of the running guest. Returns the port's index.
    ///
    /// # Errors
    /// [`Error`]; the device is closed then.
    pub(crate) fn add(&mut self, slot: HostSlot, ram: &Ram, host: &mut Host) -> Result<usize, Error> {
        let free = self.ports.iter().position(|port| port.slot.is_none()).ok_or(Error::NoFreePort)?;
        self.ports[free].plug(&slot, &self.root, ram, &self.connections)?;
        self.board.filled(free, slot.selection().to_string(), slot.functions());
        host.slots[free] = Some(slot);
        Ok(free)
    }

    /// Asks the guest to let go of what `selection` means; `reply` hears of it once it has.
    pub(crate) fn eject(&mut self, selection: Selection, reply: Reply) {
        let index = match self.find(selection) {
            Ok(index) => index,
            Err(why) => return drop(reply.send(Err(why))),
        };
        let port = &mut self.ports[index];
        if let Some(slot) = &port.slot
            && port.pressed.is_none_or(|pressed| pressed.elapsed() > PRESS_AGAIN)
        {
            slot.request_eject();
            port.pressed = Some(Instant::now());
            self.board.ejecting(index);
        }
        port.waiting.push(reply);
    }

    /// The port behind which `selection` is, whole.
    fn find(&self, selection: Selection) -> Result<usize, String> {
        for (index, port) in self.ports.iter().enumerate() {
            let Some(slot) = &port.slot else { continue };
            let addresses = slot.addresses();
            let meant = addresses.iter().filter(|address| selection.contains(**address)).count();
            if meant == addresses.len() {
                return Ok(index);
            }
            if meant > 0 {
                let whole = slot.selection();
                return Err(format!(
                    "{selection} is in the guest together with other functions: remove {whole}"
                ));
            }
        }
        Err(format!("{selection} is not in the guest; `outboard status` shows what is"))
    }

    /// The device behind root port `device` is no longer the guest's, after a reboot neither.
    pub(crate) fn vacate(&mut self, device: u8, why: &Vacated, host: &mut Host) {
        let Some(index) = self.ports.iter().position(|port| port.device == device) else { return };
        let port = &mut self.ports[index];
        let Some(slot) = port.slot.take() else { return };
        port.pressed = None;
        let selection = slot.selection();
        host.slots[index] = None;
        // The device is closed when this returns: whoever waits may do with it what they like.
        self.retained.extend(slot.vacate(why));
        self.board.vacated(index, why);
        for reply in port.waiting.drain(..) {
            let _ = reply.send(match why {
                Vacated::Ejected => Ok(Answer::Done(format!("{selection} is no longer in the guest"))),
                Vacated::Lost(_) => Err(format!(
                    "{selection} was lost before the guest had let go of it; `outboard status` says how"
                )),
            });
        }
    }
}

impl Port {
    fn new(device: u8, root: &RootComplex, connections: &Connections) -> Result<Self, Error> {
        let power = Arc::new(Event::new().map_err(Error::Thread)?);
        let hot_plug = HotPlug { msi: connections.msi.clone(), power: power.clone() };
        let port = Arc::new(RootPort::with_hot_plug(device, hot_plug));
        root.add_port(device, port.clone())?;
        Ok(Self { device, port, power, slot: None, pressed: None, waiting: Vec::new() })
    }

    /// Fills the port's slot, with all of guest memory in the device's DMA domain unless the guest asks for what it needs.
    fn plug(
        &mut self,
        slot: &HostSlot,
        root: &Arc<RootComplex>,
        ram: &Ram,
        connections: &Connections,
    ) -> Result<(), Error> {
        let memory = if slot.asks() { None } else { Some(ram.map_for_dma(slot.domain())?) };
        // What the guest did to the power of an empty slot is no wish to have the new device out of it.
        self.power.take();
        let port = (self.port.clone(), self.power.clone());
        self.slot = Some(GuestSlot::plug(slot, self.device, port, root, memory, connections)?);
        Ok(())
    }
}
