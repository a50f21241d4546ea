use crate::build::Inputs;
use crate::devices::DeviceKind;
use crate::passthrough::Place;
use crate::{ConsoleTarget, MachineSpec};
use outboard_abi::published::Layout;
use outboard_platform::layout;
use std::fmt;

/// What would be built, for people to read.
pub(crate) struct Plan<'a> {
    spec: &'a MachineSpec,
    inputs: &'a Inputs,
}

impl<'a> Plan<'a> {
    /// The machine that `spec` describes; `inputs` are its checked files.
    pub(crate) fn new(spec: &'a MachineSpec, inputs: &'a Inputs) -> Self {
        Self { spec, inputs }
    }
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (spec, inputs) = (self.spec, self.inputs);
        writeln!(f, "machine")?;
        writeln!(f, "  vCPUs         {}", spec.cpus)?;
        let ram = &inputs.space.ram;
        writeln!(f, "  memory        {} MiB at {:#x} to {:#x}", spec.memory >> 20, ram.start, ram.end)?;
        writeln!(f, "  kernel        {} ({})", spec.kernel.display(), inputs.kernel.format())?;
        if let (Some(path), Some(initrd)) = (&spec.initrd, &inputs.initrd) {
            writeln!(f, "  initrd        {} ({} KiB)", path.display(), initrd.size() >> 10)?;
        }
        writeln!(f, "  command line  {}", spec.command_line)?;
        writeln!(f, "  console       {}", spec.console)?;
        self.pci(f)?;
        self.address_space(f)
    }
}

impl Plan<'_> {
    fn pci(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (spec, inputs) = (self.spec, self.inputs);
        writeln!(f, "PCI")?;
        writeln!(f, "  00:00.0  host bridge")?;
        for (slot, kind) in (1..).zip(DeviceKind::list(spec)) {
            write!(f, "  00:{slot:02x}.0  ")?;
            match kind {
                DeviceKind::Disk(index) => {
                    writeln!(f, "block    {}, {} MiB", spec.disks[index], inputs.disks[index].len() >> 20)?;
                }
                DeviceKind::Net(index) => {
                    write!(f, "network  user-mode")?;
                    spec.nets[index]
                        .forwards
                        .iter()
                        .try_for_each(|forward| write!(f, ", forward {forward}"))?;
                    writeln!(f)?;
                }
                DeviceKind::Console => writeln!(f, "console  {}", spec.virtio_console)?,
                DeviceKind::Vsock => {
                    let vsock = spec.vsock.as_ref().expect("listed only if it is there");
                    writeln!(f, "vsock    guest CID {}, {}", vsock.cid, vsock.socket.display())?;
                }
                DeviceKind::Entropy => writeln!(f, "entropy")?,
            }
        }
        let first = DeviceKind::list(spec).len() as u8 + 1;
        for (index, place) in Place::all(spec, first).into_iter().enumerate() {
            let (port, device) = (place.port, spec.devices.get(index));
            if let Some(companion) = place.companion {
                writeln!(f, "  00:{companion:02x}.0  DMA device for the slot behind 00:{port:02x}.0")?;
                if let Some(layout) = device.map_or(Some(Layout::A), |device| device.published) {
                    writeln!(
                        f,
                        "  00:{companion:02x}.1  the same by the published protocol, layout {layout:?}"
                    )?;
                }
            }
            match device {
                Some(device) => {
                    let whose = if device.simulated.is_some() { "a simulated device," } else { "the host's" };
                    writeln!(f, "  00:{port:02x}.0  root port with {whose} {device}")?;
                }
                None => writeln!(f, "  00:{port:02x}.0  root port, free")?,
            }
        }
        Ok(())
    }

    fn address_space(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (spec, inputs) = (self.spec, self.inputs);
        let ram = &inputs.space.ram;
        writeln!(f, "address space ({} bits)", inputs.space.ipa_bits)?;
        for (name, start, end) in [
            ("GIC distributor", layout::GIC_DISTRIBUTOR, layout::GIC_DISTRIBUTOR + 0x1_0000),
            ("MSI frame", layout::MSI_FRAME, layout::MSI_FRAME + 0x1_0000),
            ("PL011, PL031, PL061", layout::PL011, layout::PL061 + layout::PRIMECELL_SIZE),
            (
                "GIC redistributors",
                layout::GIC_REDISTRIBUTORS,
                layout::GIC_REDISTRIBUTORS + 0x2_0000 * u64::from(spec.cpus),
            ),
            ("PCIe config space", layout::ECAM, layout::ECAM + layout::ECAM_SIZE),
            ("PCIe window, 32-bit", layout::PCI_WINDOW_32.start, layout::PCI_WINDOW_32.end),
            ("RAM", ram.start, ram.end),
            ("PCIe window, 64-bit", inputs.space.pci_window_64.start, inputs.space.pci_window_64.end),
        ] {
            writeln!(f, "  {start:#012x} to {end:#012x}  {name}")?;
        }
        Ok(())
    }
}

impl ConsoleTarget {
    /// It leads somewhere.
    pub(crate) fn is_some(&self) -> bool {
        *self != Self::None
    }
}
