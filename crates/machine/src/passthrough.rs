//! Devices of the host in the guest: what `crates/passthrough` needs of the machine, and the slots of one VM.

#![allow(unsafe_code)] // UNSAFETY: BARs are mapped into the VM from raw addresses.

use crate::dma::{Retained, SlotDma, may_write};
use crate::intx::IntxLines;
use crate::run::{EventSender, MachineEvent};
use crate::{DeviceSpec, Error, MachineSpec};
use outboard_bus::{Event, MsiMessage, MsiSink};
use outboard_host_pci::host::Refusal;
use outboard_host_pci::{DmaDomain, DmaPolicy, HostFunction, MappedBar, PciAddress, Selection};
use outboard_hypervisor::{InterruptController, MemoryKind, Vm};
use outboard_passthrough::{
    Function, GuestMapper, IntxWiring, Loss, Slot, SlotListener, Vacated, VectorBinder, Wiring, WiringError,
};
use outboard_pci::{RootComplex, RootPort};
use outboard_platform::layout;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

/// INTERRUPT_PIN in a function's config space: 1 for INTA to 4 for INTD, 0 for none.
const INTERRUPT_PIN: u16 = 0x3d;

/// The functions of a slot of the host, open for this process; stays open while the guest reboots.
pub(crate) struct HostSlot {
    spec: DeviceSpec,
    functions: Vec<Arc<dyn HostFunction>>,
    domain: Arc<dyn DmaDomain>,
}

impl HostSlot {
    /// Opens what `spec` selects.
    ///
    /// # Errors
    /// [`Refusal`]: why it cannot be given to a guest, and what to do.
    pub(crate) fn open(spec: DeviceSpec) -> Result<Self, Refusal> {
        match spec.simulated {
            Some(kind) => {
                let (functions, domain) = kind.open(spec.dma)?;
                Ok(Self { spec, functions, domain })
            }
            None => Self::open_host(spec),
        }
    }

    #[cfg(target_os = "linux")]
    fn open_host(spec: DeviceSpec) -> Result<Self, Refusal> {
        let opened = outboard_host_pci::host::Host::this()?.open_slot(spec.selection, spec.dma)?;
        Ok(Self { spec, functions: opened.functions, domain: opened.domain })
    }

    #[cfg(not(target_os = "linux"))]
    fn open_host(_: DeviceSpec) -> Result<Self, Refusal> {
        Err(Refusal::NotYet)
    }

    pub(crate) fn selection(&self) -> Selection {
        self.spec.selection
    }

    pub(crate) fn functions(&self) -> &[Arc<dyn HostFunction>] {
        &self.functions
    }

    /// Whether the guest asks for each mapping.
    pub(crate) fn asks(&self) -> bool {
        self.spec.dma.asks()
    }

    pub(crate) fn domain(&self) -> &Arc<dyn DmaDomain> {
        &self.domain
    }
}

/// Where a root port for devices of the host stands on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Device number of the DMA device, if there is to be one. Lower than the port's: a guest finds it first, and has its driver in
    /// place before those of the slot.
    pub(crate) companion: Option<u8>,
    /// Device number of the root port.
    pub(crate) port: u8,
}

impl Place {
    /// The places of the ports of `spec`, those with a device first, one after the other from device number `first` on. Free ports have a DMA
    /// device if a device beside them has one, or if the host knows no other way.
    pub(crate) fn all(spec: &MachineSpec, first: u8) -> Vec<Self> {
        Self::of(&spec.devices, spec.spare_ports, first)
    }

    fn of(devices: &[DeviceSpec], spare_ports: usize, mut first: u8) -> Vec<Self> {
        let asks = |device: &DeviceSpec| device.dma.asks();
        let spare = devices.iter().any(asks) || DmaPolicy::default().asks();
        let ports = devices.iter().map(asks).chain(std::iter::repeat_n(spare, spare_ports));
        let place = |asks: bool| {
            let companion = asks.then_some(first);
            let port = first.saturating_add(asks.into());
            first = port.saturating_add(1);
            Self { companion, port }
        };
        ports.map(place).collect()
    }
}

/// What every slot of a VM is connected to.
pub(crate) struct Connections {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) gic: Arc<dyn InterruptController>,
    pub(crate) msi: Arc<dyn MsiSink>,
    pub(crate) lines: IntxLines,
    pub(crate) kernel_events: bool,
    pub(crate) events: EventSender,
}

/// A slot of the VM with the host's functions in it.
///
/// Field order is drop order: the functions have given up the device before guest memory is taken out of its domain.
pub(crate) struct GuestSlot {
    selection: Selection,
    slot: Slot,
    dma: SlotDma,
}

impl GuestSlot {
    /// Puts the functions of `slot` behind `port`, which has device number `device` on bus 0 and signals its power, numbered as on the host. Before
    /// the guest sees them, `dma` gives them their way to its memory.
    ///
    /// # Errors
    /// [`Error::Passthrough`], [`Error::Slot`].
    pub(crate) fn plug(
        slot: &HostSlot,
        device: u8,
        port: (Arc<RootPort>, Arc<Event>),
        root: &Arc<RootComplex>,
        dma: impl FnOnce(&[Arc<Function>]) -> Result<SlotDma, Error>,
        connections: &Connections,
    ) -> Result<Self, Error> {
        let mapper = Arc::new(Mapper { vm: connections.vm.clone(), bars: Mutex::default() });
        let vectors = Arc::new(Vectors(connections.gic.clone()));
        let vectors = connections.kernel_events.then_some(vectors as Arc<dyn VectorBinder>);
        let wire = |host: &Arc<dyn HostFunction>| {
            let (mapper, msi, vectors) = (mapper.clone(), connections.msi.clone(), vectors.clone());
            let intx = wire_pin(&**host, device, connections)?;
            Ok(Arc::new(Function::new(host.clone(), Wiring { mapper, msi, vectors, intx })?))
        };
        let functions = slot.functions.iter().map(wire).collect::<Result<Vec<_>, Error>>()?;
        let dma = dma(&functions)?;
        let listener = Arc::new(Vacancy { device, events: connections.events.clone() });
        let selection = slot.selection();
        let slot = Slot::plug(root, device, port, functions, listener)?;
        tracing::info!("{selection} is in the guest, behind root port 00:{device:02x}.0");
        Ok(Self { selection, slot, dma })
    }

    pub(crate) fn selection(&self) -> Selection {
        self.selection
    }

    /// Where its functions are on the host.
    pub(crate) fn addresses(&self) -> Vec<PciAddress> {
        self.slot.functions().iter().map(|function| function.host().identity().address).collect()
    }

    /// Asks the guest to let go of it.
    pub(crate) fn request_eject(&self) {
        self.slot.request_eject();
    }

    /// The machine ends, and its functions were reset: closes the device. Memory that it may still write stays in its domain.
    pub(crate) fn close(self) -> Option<Retained> {
        let Self { selection: _, slot, dma } = self;
        let writing = may_write(slot.functions());
        drop(slot);
        dma.detach(writing)
    }

    /// The guest no longer has the device: closes it. Memory that the device may still write stays in its domain.
    pub(crate) fn vacate(self, why: &Vacated) -> Option<Retained> {
        let selection = self.selection;
        let Vacated::Lost(losses) = why else {
            tracing::warn!("the guest has let go of {selection}");
            return self.close();
        };
        for (address, loss) in losses {
            match loss {
                Loss::Gone => {
                    tracing::warn!("{address} has gone: it was unplugged, or the host wants it back")
                }
                Loss::Broken(why) => {
                    tracing::error!("{address} can no longer be used: {why}; power-cycle it");
                }
            }
        }
        self.close()
    }
}

/// Tells the machine's own thread of a slot that became empty.
struct Vacancy {
    device: u8,
    events: EventSender,
}

impl SlotListener for Vacancy {
    fn vacated(&self, why: Vacated) {
        self.events.send(MachineEvent::SlotVacated { device: self.device, why });
    }
}

/// The line of the function's pin: pins of device 0 behind a root port are swizzled once, by the port's device number.
fn wire_pin(
    host: &dyn HostFunction,
    device: u8,
    connections: &Connections,
) -> Result<Option<IntxWiring>, Error> {
    let pin = match host.config_read(INTERRUPT_PIN, outboard_bus::Width::B1).map_err(Error::HostPci)? {
        pin @ 1..=4 => pin - 1,
        _ => return Ok(None),
    };
    let line = (u32::from(device) + pin) % 4;
    let kernel = connections.kernel_events.then(|| connections.lines.kernel(line));
    Ok(Some(IntxWiring { line: connections.lines.share(line), kernel }))
}

/// Shows BARs to the guest.
struct Mapper {
    vm: Arc<dyn Vm>,
    /// What is mapped, by guest address: kept until it is out of the guest.
    bars: Mutex<BTreeMap<u64, Arc<dyn MappedBar>>>,
}

impl GuestMapper for Mapper {
    fn map(&self, ipa: u64, bar: Arc<dyn MappedBar>) -> Result<(), WiringError> {
        let mut bars = self.bars.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: `bar` keeps the memory mapped, and is kept until `unmap` has taken it out of the guest.
        unsafe { self.vm.map(ipa, bar.host(), bar.len(), MemoryKind::Device) }?;
        bars.insert(ipa, bar);
        Ok(())
    }

    fn unmap(&self, ipa: u64, len: u64) -> Result<(), WiringError> {
        let mut bars = self.bars.lock().unwrap_or_else(|e| e.into_inner());
        self.vm.unmap(ipa, len)?;
        bars.remove(&ipa);
        Ok(())
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let bars = std::mem::take(self.bars.get_mut().unwrap_or_else(|e| e.into_inner()));
        for (ipa, bar) in bars {
            if let Err(error) = self.vm.unmap(ipa, bar.len()) {
                tracing::error!("a BAR could not be taken out of the guest: {error}; it stays mapped");
                std::mem::forget(bar);
            }
        }
    }
}

/// Lets the kernel carry MSIs of the device.
struct Vectors(Arc<dyn InterruptController>);

impl VectorBinder for Vectors {
    fn bind(&self, message: MsiMessage, event: &Event) -> Result<(), WiringError> {
        // The frame raises its own interrupts and none of the board's; where they end the interrupt controller knows.
        let frame = layout::MSI_FRAME + outboard_hypervisor::MSI_DOORBELL;
        if message.address != frame || message.data < layout::MSI_START {
            return Err(format!("{message:x?} is not for the MSI frame").into());
        }
        Ok(self.0.bind_interrupt(message.data, event.as_fd())?)
    }

    fn unbind(&self, message: MsiMessage, event: &Event) {
        if let Err(error) = self.0.unbind_interrupt(message.data, event.as_fd()) {
            outboard_bus::warn_limited!("interrupt {}: {error}", message.data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::BorrowedFd;

    /// Takes whatever it is asked.
    struct Gic;

    impl InterruptController for Gic {
        fn set_spi(&self, _: u32, _: bool) -> outboard_hypervisor::Result<()> {
            Ok(())
        }
        fn send_msi(&self, _: u64, _: u32) -> outboard_hypervisor::Result<()> {
            Ok(())
        }
        fn bind_interrupt(&self, _: u32, _: BorrowedFd<'_>) -> outboard_hypervisor::Result<()> {
            Ok(())
        }
        fn unbind_interrupt(&self, _: u32, _: BorrowedFd<'_>) -> outboard_hypervisor::Result<()> {
            Ok(())
        }
        fn bind_level_interrupt(
            &self,
            _: u32,
            _: BorrowedFd<'_>,
            _: BorrowedFd<'_>,
        ) -> outboard_hypervisor::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn b5_a_devices_message_raises_no_interrupt_of_the_board() {
        let (vectors, event) = (Vectors(Arc::new(Gic)), Event::new().unwrap());
        let frame = layout::MSI_FRAME + outboard_hypervisor::MSI_DOORBELL;
        let bound = |address, data| vectors.bind(MsiMessage { address, data }, &event).is_ok();
        assert!(bound(frame, layout::MSI_START));
        for data in [0, layout::PL011_INTID, layout::PCI_INTX_INTIDS.start, layout::MSI_START - 1] {
            assert!(!bound(frame, data), "{data}");
        }
        assert!(!bound(frame + 4, layout::MSI_START));
    }

    #[test]
    fn a_dma_device_stands_before_the_port_it_serves() {
        let specs =
            |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<DeviceSpec>>();
        let places = |texts: &[&str], spare| {
            Place::of(&specs(texts), spare, 3)
                .iter()
                .map(|place| (place.companion, place.port))
                .collect::<Vec<_>>()
        };
        let (plain, mac) = ("01:00,dma=identity", "02:00,dma=mac");
        assert_eq!(places(&[plain, mac, plain], 0), [(None, 3), (Some(4), 5), (None, 6)]);
        assert_eq!(places(&[mac], 2), [(Some(3), 4), (Some(5), 6), (Some(7), 8)], "free ports as well");
        assert_eq!(
            places(&[mac; 200], 0).len(),
            200,
            "more than there is room for is refused by whoever counts them"
        );
    }
}
