use outboard_netstack::AssignError;
use outboard_platform::layout::LayoutError;
use std::io;
use std::path::PathBuf;

/// Why a machine cannot be built or cannot go on. Messages say what to do; `docs/` has more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor refused or failed.
    #[error(transparent)]
    Hypervisor(#[from] outboard_hypervisor::Error),
    /// Memory and windows do not fit the address space.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Kernel or initrd.
    #[error(transparent)]
    Boot(#[from] outboard_platform::boot::BootError),
    /// The process could not be confined.
    #[error(transparent)]
    Jail(#[from] outboard_jail::Error),
    /// Number of vCPUs.
    #[error("{asked} vCPUs: give --cpus a number from 1 to {most}")]
    Cpus {
        /// Asked for.
        asked: u32,
        /// Possible here.
        most: u32,
    },
    /// More guest RAM than the host has.
    #[error("{asked_mib} MiB of guest memory on a host with {host_mib} MiB: give a smaller --memory")]
    HostMemory {
        /// Asked for, in MiB.
        asked_mib: u64,
        /// The host's, in MiB.
        host_mib: u64,
    },
    /// Guest RAM could not be allocated.
    #[error("allocating {mib} MiB of guest memory: {source}; free some memory or give a smaller --memory")]
    Memory {
        /// Asked for, in MiB.
        mib: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The command line cannot be put into a device tree.
    #[error("kernel command line: {0}; shorten --append")]
    CommandLine(String),
    /// The device tree cannot be built.
    #[error("device tree: {0}; this is a bug in Outboard, please report it")]
    DeviceTree(#[from] outboard_platform::fdt::FdtError),
    /// A console target cannot be opened.
    #[error("console {target}: {source}; check the path given with --console")]
    Console {
        /// As given.
        target: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Two devices at one place of our own layout.
    #[error("{0}; this is a bug in Outboard, please report it")]
    Bus(#[from] outboard_bus::MapError),
    /// A disk image.
    #[error(transparent)]
    Disk(#[from] outboard_virtio::block::DiskError),
    /// A network, such as a forwarded port in use.
    #[error(transparent)]
    Net(#[from] outboard_netstack::NetError),
    /// Networks that do not go together, such as two forwards of one port.
    #[error(transparent)]
    Networks(#[from] outboard_netstack::AssignError),
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] outboard_virtio::vsock::VsockError),
    /// A device of the host cannot be given to the guest.
    #[error(transparent)]
    Device(#[from] outboard_host_pci::host::Refusal),
    /// The name is taken, or nobody could ask for it.
    #[error(transparent)]
    Control(#[from] outboard_control::Error),
    /// No place for one more device.
    #[error(
        "no free root port of the machine has a DMA device beside it, which dma=mac needs: start the machine with --spare-ports and a --device …,dma=mac, or remove one of those first"
    )]
    NoDmaDevice,
    /// No room.
    #[error(
        "the machine has no free root port for another device: remove one first, or start it with --spare-ports"
    )]
    NoFreePort,
    /// A device of the host cannot be used.
    #[error(transparent)]
    HostPci(outboard_host_pci::Error),
    /// A device of the host is not what a guest could have.
    #[error(transparent)]
    Passthrough(#[from] outboard_passthrough::Error),
    /// A device's BARs find no room in the guest.
    #[error(
        "{address}: its BAR {bar} has {len_mib} MiB, and all devices together need {need_mib} MiB of the guest's {window} PCIe window, which has \
         {size_mib}: give the guest fewer devices, or make a resizable BAR smaller (Linux: /sys/bus/pci/devices/{address}/resource{bar}_resize)"
    )]
    Room {
        /// The function with the largest BAR.
        address: outboard_host_pci::PciAddress,
        /// Index of that BAR.
        bar: usize,
        /// Its size in MiB.
        len_mib: u64,
        /// What all devices need of the window, in MiB.
        need_mib: u64,
        /// Which window.
        window: &'static str,
        /// Its size in MiB.
        size_mib: u64,
    },
    /// A device is given twice.
    #[error("{0} is given twice; leave one --device out")]
    DeviceTwice(outboard_host_pci::Selection),
    /// Two consoles on one terminal.
    #[error(
        "both consoles are to use the terminal; give --console or --virtio-console a file or a socket, or none"
    )]
    TwoOnTerminal,
    /// One file as two things, of which at least one writes it.
    #[error("{path} is given with {first} and with {second}: each needs a file of its own")]
    SameFile {
        /// The file.
        path: PathBuf,
        /// The one option.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// More devices than PCI slots.
    #[error(
        "{asked} PCI devices (disks, networks and the like): the machine has room for {most}, give fewer"
    )]
    TooManyDevices {
        /// Asked for.
        asked: usize,
        /// Possible.
        most: usize,
    },
    /// Two functions at one PCI address of our own choice.
    #[error("{0}; this is a bug in Outboard, please report it")]
    Slot(#[from] outboard_pci::AddError),
    /// A thread, an event or a signal handler could not be made.
    #[error("starting a thread: {0}; raise the limits on processes and open files (ulimit -u, ulimit -n)")]
    Thread(#[source] io::Error),
    /// Random bytes for the guest's seeds.
    #[error("reading random bytes from the host: {0}")]
    Random(io::Error),
}

impl Error {
    /// The command line is wrong on any host and with any files.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Cpus { asked, .. } => !(1..=outboard_platform::layout::MAX_VCPUS).contains(asked),
            Self::CommandLine(_)
            | Self::TwoOnTerminal
            | Self::TooManyDevices { .. }
            | Self::DeviceTwice(_)
            | Self::SameFile { .. }
            | Self::Networks(
                AssignError::ForwardTwice { .. } | AssignError::MacTwice(_) | AssignError::SubnetTwice(_),
            )
            | Self::Layout(LayoutError::BadRam { .. }) => true,
            _ => false,
        }
    }
}
