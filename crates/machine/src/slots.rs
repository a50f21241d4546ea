//! The machine's root ports for devices of the host, and what is behind them while the guest runs.

use crate::devices::Host;
use crate::dma::{self, Retained, SlotDma};
use crate::memory::Ram;
use crate::passthrough::{Connections, GuestSlot, HostSlot, Place};
use crate::status::Board;
use crate::{Error, MachineSpec};
use outboard_bus::Event;
use outboard_cli::Chain;
use outboard_companion::Companion;
use outboard_control::Answer;
use outboard_host_pci::Selection;
use outboard_passthrough::Vacated;
use outboard_pci::{HotPlug, RootComplex, RootPort};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// After a press of the attention button a guest takes five seconds in which a second one takes it back (PCIe 6.7.1.5): before this is over it
/// is not pressed again.
pub(crate) const PRESS_AGAIN: Duration = Duration::from_secs(10);

/// Where the one who asked for something hears of it.
pub(crate) type Reply = Sender<Result<Answer, String>>;

/// The ports of one VM. Field order is drop order: devices leave before the memory that a broken one may still write.
pub(crate) struct Slots {
    ports: Vec<Port>,
    /// Guest memory that a broken device may still write.
    retained: Vec<Retained>,
    root: Arc<RootComplex>,
    board: Arc<Board>,
    connections: Connections,
}

struct Port {
    /// Device number on bus 0.
    device: u8,
    port: Arc<RootPort>,
    power: Arc<Event>,
    /// The DMA device beside it.
    companion: Option<Arc<Companion>>,
    slot: Option<GuestSlot>,
    /// When the guest was last asked to let go of what is there now.
    pressed: Option<Instant>,
    /// Who waits for that.
    waiting: Vec<Reply>,
}

impl Slots {
    /// A root port for each of `host`'s slots, from device number `first` on bus 0 on, with what is in the slot and the DMA device beside it, as
    /// `spec` says. For a reboot, a device that cannot be had any more (it went while nobody had it) is closed and its port stays empty: the guest goes on
    /// without it.
    ///
    /// # Errors
    /// [`Error`]; nothing stays behind.
    pub(crate) fn plug(
        host: &mut Host,
        (spec, first): (&MachineSpec, u8),
        root: &Arc<RootComplex>,
        ram: &Ram,
        connections: Connections,
    ) -> Result<Self, Error> {
        let (root, board) = (root.clone(), host.board.clone());
        let mut slots = Self { ports: Vec::new(), retained: Vec::new(), root, board, connections };
        for (index, (place, slot)) in Place::all(spec, first).into_iter().zip(&mut host.slots).enumerate() {
            let mut port = Port::new(place, &slots.root, &slots.connections)?;
            if let Some(device) = place.companion {
                let device_spec = spec.devices.get(index);
                port.companion =
                    Some(dma::companion((device, &port.port), (spec, device_spec), place, &slots.root, ram)?);
            }
            if let Some(device) = slot.as_ref()
                && let Err(error) = port.plug(device, &slots.root, ram, &slots.connections)
            {
                if !slots.board.booted() {
                    return Err(error);
                }
                tracing::error!("{} is not in the guest any more: {}", device.selection(), Chain(&error));
                slots.board.not_back(index, &error);
                *slot = None;
            }
            slots.ports.push(port);
        }
        Ok(slots)
    }

    /// The ports and their device numbers.
    pub(crate) fn ports(&self) -> Vec<(u8, Arc<RootPort>)> {
        self.ports.iter().map(|port| (port.device, port.port.clone())).collect()
    }

    /// The ports' DMA devices.
    pub(crate) fn companions(&self) -> Vec<Option<Weak<Companion>>> {
        self.ports.iter().map(|port| port.companion.as_ref().map(Arc::downgrade)).collect()
    }

    /// Puts `slot` behind a free port of the running guest. Returns the port's index.
    ///
    /// # Errors
    /// [`Error`]; the device is closed then.
    pub(crate) fn add(&mut self, slot: HostSlot, ram: &Ram, host: &mut Host) -> Result<usize, Error> {
        let free = self.free(slot.asks())?;
        self.ports[free].plug(&slot, &self.root, ram, &self.connections)?;
        self.board.filled(free, slot.selection().to_string(), slot.functions());
        host.slots[free] = Some(slot);
        Ok(free)
    }

    /// A free port, with a DMA device if the guest has to ask for mappings, and if possible only then.
    fn free(&self, asks: bool) -> Result<usize, Error> {
        let mut free = self.ports.iter().enumerate().filter(|(_, port)| port.slot.is_none()).peekable();
        if free.peek().is_none() {
            return Err(Error::NoFreePort);
        }
        let suits = |(_, port): &(usize, &Port)| port.companion.is_some() == asks;
        let any = free.clone().next().filter(|_| !asks);
        free.find(suits).or(any).map(|(index, _)| index).ok_or(Error::NoDmaDevice)
    }

    /// The machine ends, and all functions were reset: every device is closed, and then guest memory is out of their reach.
    pub(crate) fn close(mut self) {
        for port in &mut self.ports {
            let slot = port.slot.take();
            self.retained.extend(slot.and_then(GuestSlot::close));
        }
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
                Vacated::Lost(_) => Err(format!("{selection} was lost; `outboard status` says how")),
            });
        }
    }
}

impl Port {
    fn new(place: Place, root: &RootComplex, connections: &Connections) -> Result<Self, Error> {
        let device = place.port;
        let power = Arc::new(Event::new().map_err(Error::Thread)?);
        let hot_plug = HotPlug { msi: connections.msi.clone(), power: power.clone() };
        let port = Arc::new(RootPort::with_hot_plug(device, hot_plug));
        root.add_port(device, port.clone())?;
        Ok(Self { device, port, power, companion: None, slot: None, pressed: None, waiting: Vec::new() })
    }

    /// Fills the port's slot, with all of guest memory in the device's DMA domain unless the guest asks for what it needs.
    fn plug(
        &mut self,
        slot: &HostSlot,
        root: &Arc<RootComplex>,
        ram: &Ram,
        connections: &Connections,
    ) -> Result<(), Error> {
        // What the guest did to the power of an empty slot is no wish to have the new device out of it.
        self.power.take();
        let port = (self.port.clone(), self.power.clone());
        let dma = |functions: &[_]| SlotDma::new(slot, self.companion.as_ref(), functions, ram);
        self.slot = Some(GuestSlot::plug(slot, self.device, port, root, dma, connections)?);
        Ok(())
    }
}
