//! Which virtio devices a machine has, in which order, and the host's ends of them.

use crate::console::{ConsoleHost, Outlet, PanicWatch, VirtioEnd};
use crate::passthrough::HostSlot;
use crate::run::EventSender;
use crate::slots::Slots;
use crate::status::Board;
use crate::{Error, MachineSpec};
use outboard_bus::{Event, MmioBus, MsiSink, warn_limited};
use outboard_hypervisor::Vm;
use outboard_pci::RootComplex;
use outboard_virtio::block::{Block, Disk};
use outboard_virtio::console::Console;
use outboard_virtio::entropy::Entropy;
use outboard_virtio::net::Net;
use outboard_virtio::vsock::Vsock;
use outboard_virtio::{DoorbellBinder, GuestMemory, VirtioDevice, VirtioPci};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

/// A device of the machine. Their order is that of their PCI addresses, from 00:01.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    /// Index into [`MachineSpec::disks`].
    Disk(usize),
    /// Index into [`MachineSpec::nets`].
    Net(usize),
    Console,
    Vsock,
    Entropy,
}

impl DeviceKind {
    /// The devices of `spec`, in order.
    pub(crate) fn list(spec: &MachineSpec) -> Vec<Self> {
        let disks = (0..spec.disks.len()).map(Self::Disk);
        let nets = (0..spec.nets.len()).map(Self::Net);
        let console = spec.virtio_console.is_some().then_some(Self::Console);
        let vsock = spec.vsock.is_some().then_some(Self::Vsock);
        disks.chain(nets).chain(console).chain(vsock).chain([Self::Entropy]).collect()
    }
}

/// Opens the disks of `spec`.
pub(crate) fn open_disks(spec: &MachineSpec) -> Result<Vec<Disk>, Error> {
    spec.disks.iter().map(|disk| Ok(Disk::open(&disk.path, disk.options)?)).collect()
}

/// What the guest talks to, open. A machine takes the devices when it is built and gives them back when it stops.
pub(crate) struct Host {
    pub(crate) console: Arc<Mutex<ConsoleHost>>,
    pub(crate) panic_watch: Arc<PanicWatch>,
    pub(crate) devices: Devices,
    /// One for each root port; `None` where it has nothing behind it.
    pub(crate) slots: Vec<Option<HostSlot>>,
    pub(crate) board: Arc<Board>,
    /// Where consoles print, to begin when the guest does.
    outlets: Vec<Arc<Outlet>>,
}

impl Host {
    /// Opens the consoles and makes the devices, in the order of [`DeviceKind::list`]. Nothing of the host's has changed by then but sockets that are there.
    ///
    /// # Errors
    /// [`Error`] for what cannot be opened; everything opened so far is closed then.
    pub(crate) fn open(
        spec: &MachineSpec,
        disks: Vec<Disk>,
        events: &EventSender,
        board: &Arc<Board>,
    ) -> Result<Self, Error> {
        let panic_watch = Arc::new(PanicWatch::default());
        let mut disks = disks.into_iter();
        let mut devices = Devices::new();
        let mut outlets = Vec::new();
        for kind in DeviceKind::list(spec) {
            devices.push(match kind {
                DeviceKind::Disk(index) => {
                    let (name, serial) = (format!("blk{index}"), format!("outboard-disk{index}"));
                    let disk = disks.next().expect("one was opened for each in the list");
                    Box::new(Block::new(&name, &serial, disk, spec.cpus))
                }
                DeviceKind::Net(index) => Box::new(Net::new(&format!("net{index}"), &spec.nets[index])?),
                DeviceKind::Console => {
                    let host = ConsoleHost::open(&spec.virtio_console)?;
                    outlets.extend(host.outlet().cloned());
                    let end = VirtioEnd::new(host, panic_watch.clone(), events.clone());
                    Box::new(Console::new("console1", Box::new(end)))
                }
                DeviceKind::Vsock => {
                    let vsock = spec.vsock.as_ref().expect("listed only if it is there");
                    Box::new(Vsock::new("vsock", vsock.cid.into(), &vsock.socket)?)
                }
                DeviceKind::Entropy => Box::new(Entropy::new()),
            });
        }
        let slots = spec.devices.iter().map(|device| HostSlot::open(*device).map(Some));
        let mut slots: Vec<Option<HostSlot>> = slots.collect::<Result<_, _>>()?;
        slots.resize_with(slots.len() + spec.spare_ports, || None);
        let console = ConsoleHost::open(&spec.console)?;
        outlets.extend(console.outlet().cloned());
        let console = Arc::new(Mutex::new(console));
        Ok(Self { console, panic_watch, devices, slots, board: board.clone(), outlets })
    }

    /// Lets consoles print from here on: files are emptied, a terminal becomes raw. Does nothing after a reboot.
    ///
    /// # Errors
    /// [`Error::Console`], [`Error::Thread`].
    pub(crate) fn begin_output(&self) -> Result<(), Error> {
        self.outlets.iter().try_for_each(|outlet| outlet.begin())
    }
}

impl Host {
    /// Puts a machine that stands on the board, with what is in its slots.
    pub(crate) fn show(&self, bus: &Arc<MmioBus>, slots: &Slots) {
        self.board.built(bus, slots.ports());
        self.board.companions(slots.companions());
        for (index, slot) in self.slots.iter().enumerate() {
            if let Some(slot) = slot {
                self.board.filled(index, slot.selection().to_string(), slot.functions());
            }
        }
    }
}

/// The device models, with the host's ends open. They outlive the VM: a reboot puts them into the next one.
pub(crate) type Devices = Vec<Box<dyn VirtioDevice>>;

/// The devices as functions of a running VM.
pub(crate) struct Functions(Vec<Arc<VirtioPci>>);

impl Functions {
    /// Puts `devices` on bus 0, from device number 1.
    ///
    /// # Errors
    /// [`Error::Slot`], [`Error::Thread`] when file descriptors run out.
    pub(crate) fn plug(
        devices: Devices,
        root: &RootComplex,
        memory: &GuestMemory,
        msi: &Arc<dyn MsiSink>,
        binder: Option<&Arc<dyn DoorbellBinder>>,
    ) -> Result<Self, Error> {
        let mut functions = Vec::new();
        for (slot, device) in (1..).zip(devices) {
            let function = VirtioPci::new(device, memory.clone(), msi.clone(), binder.cloned())
                .map_err(Error::Thread)?;
            root.add(slot, 0, function.clone())?;
            functions.push(function);
        }
        Ok(Self(functions))
    }

    /// Gets the devices back, stopped. Nothing may refer to the functions any more: no bus, no root complex.
    pub(crate) fn unplug(self) -> Devices {
        let alone = |function| Arc::into_inner(function).expect("bus and root complex are gone");
        self.0.into_iter().map(|function: Arc<VirtioPci>| alone(function).into_device()).collect()
    }
}

/// Lets the kernel take the queues' doorbells.
pub(crate) struct KernelDoorbells(pub(crate) Arc<dyn Vm>);

impl DoorbellBinder for KernelDoorbells {
    fn bind(&self, ipa: u64, width: u8, value: Option<u32>, event: &Event) {
        if let Err(error) = self.0.bind_doorbell(ipa, width, value, event.as_fd()) {
            warn_limited!("doorbell at {ipa:#x} stays with this process: {error}");
        }
    }

    fn unbind(&self, ipa: u64, width: u8, value: Option<u32>, event: &Event) {
        if let Err(error) = self.0.unbind_doorbell(ipa, width, value, event.as_fd()) {
            warn_limited!("doorbell at {ipa:#x}: {error}");
        }
    }
}
