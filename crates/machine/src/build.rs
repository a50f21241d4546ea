//! Check and build: from a [`MachineSpec`] to a machine that is ready to run.

use crate::console::ConsolePump;
use crate::devices::{DeviceKind, Devices, Functions, Host, KernelDoorbells, open_disks};
use crate::intx::IntxLines;
use crate::memory::{self, Ram, Scratch};
use crate::passthrough::{Connections, HostSlot, Place};
use crate::room;
use crate::run::{EventSender, MachineEvent};
use crate::slots::{Reply, Slots};
use crate::vcpus::{Entry, Reporter, Vcpus};
use crate::{ConsoleTarget, Error, MachineSpec};
use outboard_bus::{IrqLine, MmioBus, MsiMessage, MsiSink, warn_limited};
use outboard_host_pci::Selection;
use outboard_hypervisor::{Capabilities, GicConfig, Hypervisor, InterruptController, Vm, VmOptions, mpidr};
use outboard_passthrough::Vacated;
use outboard_pci::{Ecam, RootComplex, Windows};
use outboard_platform::boot::{self, Initrd, Kernel, Loaded};
use outboard_platform::fdt::{self, Description};
use outboard_platform::layout::{self, AddressSpace};
use outboard_platform::{GuestMemory, Pl011, Pl031, Pl061};
use outboard_virtio::DoorbellBinder;
use outboard_virtio::block::Disk;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Device numbers on bus 0 beside the host bridge.
const PCI_SLOTS: usize = 31;
/// arm64 Linux takes at most 2,047 bytes (COMMAND_LINE_SIZE, arch/arm64/include/uapi/asm/setup.h).
const MAX_COMMAND_LINE: usize = 2047;

/// What a machine is made from, checked: everything that can be wrong with a user's input is found here.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub(crate) space: AddressSpace,
    pub(crate) kernel: Kernel,
    pub(crate) initrd: Option<Initrd>,
    pub(crate) disks: Vec<Disk>,
}

impl Inputs {
    /// Checks `spec` against what the hypervisor can do and opens its files.
    ///
    /// # Errors
    /// [`Error`] for the first thing that is wrong.
    pub(crate) fn open(spec: &MachineSpec, capabilities: &Capabilities) -> Result<Self, Error> {
        let most = capabilities.max_vcpus.min(layout::MAX_VCPUS);
        if spec.cpus == 0 || spec.cpus > most {
            return Err(Error::Cpus { asked: spec.cpus, most });
        }
        let space = AddressSpace::new(spec.memory, capabilities.max_ipa_bits)?;
        if let Some(host) = memory::host_memory().filter(|host| spec.memory > *host) {
            return Err(Error::HostMemory { asked_mib: spec.memory >> 20, host_mib: host >> 20 });
        }
        if spec.command_line.len() > MAX_COMMAND_LINE {
            let text = format!("{} bytes, at most {MAX_COMMAND_LINE} are possible", spec.command_line.len());
            return Err(Error::CommandLine(text));
        }
        if spec.command_line.contains('\0') {
            return Err(Error::CommandLine("it holds a NUL byte".into()));
        }
        spec.check_paths()?;
        if spec.console == ConsoleTarget::Stdio && spec.virtio_console == ConsoleTarget::Stdio {
            return Err(Error::TwoOnTerminal);
        }
        for (index, device) in spec.devices.iter().enumerate() {
            if spec.devices[..index].iter().any(|other| other.selection.overlaps(&device.selection)) {
                return Err(Error::DeviceTwice(device.selection));
            }
        }
        let ports = Place::all(spec, 1);
        let companions = ports.iter().filter(|place| place.companion.is_some()).count();
        let devices = DeviceKind::list(spec).len() + ports.len() + companions;
        if devices > PCI_SLOTS {
            return Err(Error::TooManyDevices { asked: devices, most: PCI_SLOTS });
        }
        let kernel = Kernel::open(&spec.kernel)?;
        let initrd = spec.initrd.as_deref().map(Initrd::open).transpose()?;
        Ok(Self { space, kernel, initrd, disks: open_disks(spec)? })
    }
}

/// A machine that can run. [`Machine::stop`] takes it apart in the order that the hypervisor and DMA demand.
pub(crate) struct Machine {
    space: AddressSpace,
    vcpus: Vcpus,
    console: ConsolePump,
    root: Arc<RootComplex>,
    functions: Functions,
    slots: Slots,
    bus: Arc<MmioBus>,
    power_key: Arc<Pl061>,
    ram: Ram,
}

impl Machine {
    /// Builds it, phase by phase.
    ///
    /// # Errors
    /// [`Error`]; everything built so far is released then.
    pub(crate) fn build(
        spec: &MachineSpec,
        inputs: &Inputs,
        host: &mut Host,
        hypervisor: &dyn Hypervisor,
        events: &EventSender,
    ) -> Result<Self, Error> {
        let space = &inputs.space;
        let options = VmOptions { vcpus: spec.cpus, ipa_bits: space.ipa_bits, vcpu: spec.vcpu };
        let vm = hypervisor.create_vm(&options)?;
        let ram = Ram::new(&vm, &space.ram)?;
        let intid_limit = intid_limit(spec, &host.devices);
        let gic = vm.create_interrupt_controller(&gic_config(intid_limit))?;
        let bus = Arc::new(MmioBus::new());
        let (uart, power_key) = add_board(&bus, &gic)?;
        let root = add_pci(&bus, space)?;
        let msi: Arc<dyn MsiSink> = Arc::new(GicMsi(gic.clone()));
        let kernel_events = hypervisor.capabilities()?.kernel_events;
        let binder = kernel_events.then(|| kernel_doorbells(&vm));
        let devices = std::mem::take(&mut host.devices);
        let first_port = devices.len() as u8 + 1;
        let functions = Functions::plug(devices, &root, ram.memory(), &msi, binder.as_ref())?;
        let lines = IntxLines::new(&gic);
        let events = events.clone();
        let connections =
            Connections { vm: vm.clone(), gic, msi, lines, kernel_events, events: events.clone() };
        let slots = Slots::plug(host, (spec, first_port), &root, &ram, connections)?;
        tracing::debug!("devices are in place");
        let loaded = load_guest(spec, inputs, ram.memory(), intid_limit)?;
        tracing::debug!("guest is loaded, kernel at {:#x}", loaded.entry);
        host.begin_output()?;
        let panic_watch = host.panic_watch.clone();
        let console = ConsolePump::start(uart, host.console.clone(), panic_watch, events.clone())?;
        let entry = Entry { pc: loaded.entry, fdt: loaded.fdt };
        let vcpus = Vcpus::start(&vm, spec.cpus, entry, &bus, &reporter(&events))?;
        host.show(&bus, &slots);
        Ok(Self { space: space.clone(), vcpus, console, root, functions, slots, bus, power_key, ram })
    }

    /// Lets the guest run.
    pub(crate) fn resume(&self) {
        self.vcpus.resume();
    }

    /// Presses or releases the power key.
    pub(crate) fn set_power_key(&self, pressed: bool) {
        self.power_key.set_power_key(pressed);
    }

    /// The device behind root port `device` is no longer the guest's, after a reboot neither.
    pub(crate) fn vacate(&mut self, device: u8, why: &Vacated, host: &mut Host) {
        self.slots.vacate(device, why, host);
    }

    /// Asks the guest to let go of a device; `reply` hears of it once it has.
    pub(crate) fn eject(&mut self, selection: Selection, reply: Reply) {
        self.slots.eject(selection, reply);
    }

    /// Gives the running guest a device. Returns the index of its root port.
    ///
    /// # Errors
    /// [`Error`]; the device is closed then.
    pub(crate) fn add(&mut self, slot: HostSlot, host: &mut Host) -> Result<usize, Error> {
        room::check(host.slots.iter().flatten().chain([&slot]).map(HostSlot::functions), &self.space)?;
        self.slots.add(slot, &self.ram, host)
    }

    /// Stops and releases everything but the host's ends of the devices, which go back to `host`. Whether the guest's
    /// kernel had panicked.
    ///
    /// First the vCPUs, so that nobody starts anything new; then the devices, which stop writing to guest memory; only then
    /// the memory is unmapped, and the VM goes with the last reference to it.
    pub(crate) fn stop(self, host: &mut Host) -> bool {
        let Self { space: _, vcpus, console, root, functions, slots, bus, power_key, ram } = self;
        host.board.taken_apart();
        vcpus.pause();
        root.reset();
        drop(vcpus);
        // Their functions were reset above; now guest memory leaves their DMA domains.
        slots.close();
        let stats = bus.stats();
        if stats.unmapped + stats.refused > 0 {
            let (unmapped, refused) = (stats.unmapped, stats.refused);
            tracing::info!(
                "guest accesses that no device served: {unmapped} to unmapped addresses, {refused} refused"
            );
        }
        drop((bus, root));
        host.devices = functions.unplug();
        // Lets out what the guest printed last, the panic among it.
        drop(console);
        drop(power_key);
        drop(ram);
        host.panic_watch.take()
    }
}

fn kernel_doorbells(vm: &Arc<dyn Vm>) -> Arc<dyn DoorbellBinder> {
    Arc::new(KernelDoorbells(vm.clone()))
}

/// Loads the guest into memory that no VM has, to see that all of it fits and can be read.
///
/// # Errors
/// [`Error`], as when a machine is built.
pub(crate) fn try_loading(spec: &MachineSpec, inputs: &Inputs, devices: &Devices) -> Result<(), Error> {
    let scratch = Scratch::new(&inputs.space.ram)?;
    load_guest(spec, inputs, scratch.memory(), intid_limit(spec, devices)).map(drop)
}

/// As many interrupts as the devices can use; where a device of the host may come, as many as can be.
fn intid_limit(spec: &MachineSpec, devices: &Devices) -> u32 {
    if !spec.devices.is_empty() || spec.spare_ports > 0 {
        return layout::MAX_INTID_LIMIT;
    }
    // One for each queue, one for changes of the configuration.
    layout::intid_limit(devices.iter().map(|device| device.queue_sizes().len() as u32 + 1).sum())
}

fn gic_config(intid_limit: u32) -> GicConfig {
    GicConfig {
        distributor: layout::GIC_DISTRIBUTOR,
        redistributors: layout::GIC_REDISTRIBUTORS,
        msi_frame: layout::MSI_FRAME,
        msi_intids: layout::MSI_START..intid_limit,
        intid_limit,
    }
}

/// Serial console, clock and power key.
fn add_board(bus: &MmioBus, gic: &Arc<dyn InterruptController>) -> Result<(Arc<Pl011>, Arc<Pl061>), Error> {
    let line = |intid| Arc::new(SpiLine { gic: gic.clone(), intid, asserted: AtomicBool::new(false) });
    let uart = Arc::new(Pl011::new(line(layout::PL011_INTID)).map_err(Error::Thread)?);
    let gpio = Arc::new(Pl061::new(line(layout::PL061_INTID)));
    bus.insert(layout::PL011, layout::PRIMECELL_SIZE, uart.clone())?;
    bus.insert(layout::PL031, layout::PRIMECELL_SIZE, Arc::new(Pl031::new()))?;
    bus.insert(layout::PL061, layout::PRIMECELL_SIZE, gpio.clone())?;
    Ok((uart, gpio))
}

fn add_pci(bus: &Arc<MmioBus>, space: &AddressSpace) -> Result<Arc<RootComplex>, Error> {
    let windows = Windows { mmio32: layout::PCI_WINDOW_32, mmio64: space.pci_window_64.clone() };
    let root = RootComplex::new(bus, windows);
    bus.insert(layout::ECAM, layout::ECAM_SIZE, Arc::new(Ecam::new(root.clone())))?;
    Ok(root)
}

/// Kernel, initrd and device tree into guest RAM.
fn load_guest(
    spec: &MachineSpec,
    inputs: &Inputs,
    memory: &GuestMemory,
    intid_limit: u32,
) -> Result<Loaded, Error> {
    let loaded = boot::load(memory, &inputs.space.ram, &inputs.kernel, inputs.initrd.as_ref())?;
    let cpus: Vec<u64> = (0..spec.cpus).map(mpidr).collect();
    let mut random = [0; 64];
    getrandom::fill(&mut random).map_err(|e| Error::Random(std::io::Error::other(e)))?;
    let tree = fdt::build(&Description {
        space: &inputs.space,
        cpus: &cpus,
        intid_limit,
        command_line: &spec.command_line,
        initrd: loaded.initrd.clone(),
        random,
    })?;
    boot::write_fdt(memory, loaded.fdt, &tree)?;
    Ok(loaded)
}

fn reporter(events: &EventSender) -> Reporter {
    let events = events.clone();
    Arc::new(move |event| events.send(MachineEvent::Vcpu(event)))
}

/// A level-triggered SPI of a device on the board. The device's own lock orders the calls.
struct SpiLine {
    gic: Arc<dyn InterruptController>,
    intid: u32,
    /// What the hypervisor was told last: a UART sets its line at every byte, and mostly to what it is.
    asserted: AtomicBool,
}

impl IrqLine for SpiLine {
    fn set(&self, asserted: bool) {
        if self.asserted.swap(asserted, Ordering::Relaxed) == asserted {
            return;
        }
        if let Err(error) = self.gic.set_spi(self.intid, asserted) {
            warn_limited!("interrupt {} could not be set: {error}", self.intid);
        }
    }
}

/// Where PCI functions send their messages.
struct GicMsi(Arc<dyn InterruptController>);

impl MsiSink for GicMsi {
    fn send(&self, message: MsiMessage) {
        if let Err(error) = self.0.send_msi(message.address, message.data) {
            warn_limited!("message-signalled interrupt {message:x?} was dropped: {error}");
        }
    }
}
