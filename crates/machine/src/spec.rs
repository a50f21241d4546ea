use crate::{ConsoleTarget, Error};
use outboard_abi::published::Layout;
use outboard_cli::{MIB, parse_size};
use outboard_dart::Config;
use outboard_host_pci::simulated::SimulatedKind;
use outboard_host_pci::{DmaPolicy, Selection};
use outboard_hypervisor::VcpuOptions;
use outboard_netstack::NetOptions;
use outboard_virtio::block::{DiskFormat, DiskOptions};
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Everything a user says about a machine.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// What `outboard status` calls it; without one it gets the first free of vm1, vm2, …
    pub name: Option<outboard_control::Name>,
    /// Kernel file.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub command_line: String,
    /// Number of vCPUs, 1 to 32.
    pub cpus: u32,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Where the serial console (PL011, `ttyAMA0`) goes.
    pub console: ConsoleTarget,
    /// Where the virtio console (`hvc0`) goes; the device is there only if it goes somewhere.
    pub virtio_console: ConsoleTarget,
    /// Disks, in the order of their PCI addresses.
    pub disks: Vec<DiskSpec>,
    /// Network interfaces.
    pub nets: Vec<NetOptions>,
    /// Sockets between host and guest.
    pub vsock: Option<VsockSpec>,
    /// Slots or functions of the host to give to the guest.
    pub devices: Vec<DeviceSpec>,
    /// Root ports with nothing behind them, for devices that come while the guest runs.
    pub spare_ports: usize,
    /// The file that takes the log, so that nothing else is made of it.
    pub log: Option<PathBuf>,
    /// End the process when the guest reboots.
    pub no_reboot: bool,
    /// For every vCPU.
    pub vcpu: VcpuOptions,
}

impl MachineSpec {
    /// Refuses a file that is to be written as one thing and used as another: a console would go over a disk.
    ///
    /// # Errors
    /// [`Error::SameFile`].
    pub fn check_paths(&self) -> Result<(), Error> {
        let consoles = [("--console", &self.console), ("--virtio-console", &self.virtio_console)];
        let console = |(option, target): (&'static str, &ConsoleTarget)| match target {
            ConsoleTarget::File(file) => Some((option, file.path.clone())),
            ConsoleTarget::None | ConsoleTarget::Stdio | ConsoleTarget::Socket(_) => None,
        };
        let log = self.log.iter().map(|path| ("--log-file", path.clone()));
        let written: Vec<_> = consoles.into_iter().filter_map(console).chain(log).collect();
        let disks = self.disks.iter().map(|disk| ("--disk", disk.path.clone()));
        let initrd = self.initrd.iter().map(|path| ("--initrd", path.clone()));
        let others: Vec<_> =
            [("--kernel", self.kernel.clone())].into_iter().chain(initrd).chain(disks).collect();
        for (index, (option, path)) in written.iter().enumerate() {
            let rest = written[..index].iter().chain(&others);
            for (other, place) in rest {
                if is_same_file(path, place) {
                    return Err(Error::SameFile { path: path.clone(), first: other, second: option });
                }
            }
        }
        Ok(())
    }
}

/// Both names lead to one file. What is no file, `/dev/null` above all, may serve twice.
fn is_same_file(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(a), Ok(b)) => a.is_file() && (a.dev(), a.ino()) == (b.dev(), b.ino()),
        // Neither is there yet.
        (Err(_), Err(_)) => one == other,
        _ => false,
    }
}

/// A disk image and how to open it: `PATH[:ro][,format=raw|qcow2]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image.
    pub path: PathBuf,
    /// How to open it.
    pub options: DiskOptions,
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = DiskOptions::default();
        // Only a known ending is taken off, so that a path may hold commas.
        let mut path = text;
        if let Some((rest, format)) = text.rsplit_once(",format=") {
            options.format = match format {
                "raw" => DiskFormat::Raw,
                "qcow2" => DiskFormat::Qcow2,
                _ => return Err(format!("unknown format '{format}'; known are raw and qcow2")),
            };
            path = rest;
        }
        if let Some(rest) = path.strip_suffix(":ro") {
            options.read_only = true;
            path = rest;
        }
        if path.is_empty() {
            return Err("no path is given; write PATH[:ro][,format=raw|qcow2]".into());
        }
        Ok(Self { path: path.into(), options })
    }
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if self.options.read_only {
            f.write_str(" (read-only)")?;
        }
        Ok(())
    }
}

/// A device of the host and how it reaches guest memory: `BUS:DEVICE[.FUNCTION][,dma=identity|mac][,limit-bytes=SIZE][,limit-entries=N]
/// [,published=a|b|off]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Slot or function of the host; of a simulated device, where it pretends to be.
    pub selection: Selection,
    /// It is made of software, to see what a guest makes of it: `simulated:NAME` in place of an address.
    pub simulated: Option<SimulatedKind>,
    /// Who chooses where it finds memory.
    pub dma: DmaPolicy,
    /// The layout in which the DMA device also speaks the published protocol; `None` for not at all. Means nothing without a DMA device.
    pub published: Option<Layout>,
}

impl From<Selection> for DeviceSpec {
    fn from(selection: Selection) -> Self {
        Self { selection, simulated: None, dma: DmaPolicy::default(), published: Some(Layout::A) }
    }
}

impl From<SimulatedKind> for DeviceSpec {
    fn from(kind: SimulatedKind) -> Self {
        Self { simulated: Some(kind), ..Self::from(kind.slot()) }
    }
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let mut spec = match name.strip_prefix("simulated:") {
            Some(kind) => Self::from(kind.parse::<SimulatedKind>()?),
            None => Self::from(name.parse::<Selection>().map_err(|e| format!("{e}"))?),
        };
        let (mut bytes, mut entries, mut published) = (None, None, None);
        for part in parts {
            match part.split_once('=') {
                Some(("dma", policy)) => spec.dma = policy.parse().map_err(|e| format!("{e}"))?,
                Some(("limit-bytes", size)) => bytes = Some(parse_size(size, MIB)?),
                Some(("limit-entries", number)) => {
                    let number = number.parse().ok().filter(|n| *n > 0);
                    entries = Some(number.ok_or_else(|| format!("{part} is not a number of mappings"))?);
                }
                Some(("published", "a")) => published = Some(Some(Layout::A)),
                Some(("published", "b")) => published = Some(Some(Layout::B)),
                Some(("published", "off")) => published = Some(None),
                _ => {
                    return Err(format!(
                        "'{part}' is not understood; known are dma=identity|mac, limit-bytes=SIZE, limit-entries=N, published=a|b|off"
                    ));
                }
            }
        }
        let given = bytes.is_some() || entries.is_some() || published.is_some();
        let DmaPolicy::Mac(config) = &mut spec.dma else {
            return if given { Err("limits and published protocol need dma=mac".into()) } else { Ok(spec) };
        };
        let granule = outboard_host_pci::GRANULE;
        config.bytes = bytes.unwrap_or(Config::MAC.bytes);
        config.entries = entries.unwrap_or(Config::MAC.entries);
        if config.bytes < granule || config.bytes > Config::MAC.bytes || config.entries > Config::MAC.entries
        {
            return Err(format!(
                "limits go from 16K to {}M bytes and from 1 to {} mappings, which is what a Mac has",
                Config::MAC.bytes >> 20,
                Config::MAC.entries
            ));
        }
        spec.published = published.unwrap_or(spec.published);
        Ok(spec)
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.selection)?;
        match self.dma {
            DmaPolicy::Identity => Ok(()),
            DmaPolicy::Mac(config) => write!(
                f,
                " (dma=mac, at most {} MiB in {} mappings at {:#x} to {:#x})",
                config.bytes >> 20,
                config.entries,
                config.first,
                config.last
            ),
        }
    }
}

/// The guest's socket device: `cid=N,socket=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// The guest's context ID, 3 or higher (0 to 2 have fixed meanings).
    pub cid: u32,
    /// Unix socket through which the host connects; guest connections go to `PATH_PORT`.
    pub socket: PathBuf,
}

impl FromStr for VsockSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut cid, mut socket) = (3, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("cid", value)) => {
                    let number = value.parse().ok().filter(|cid| (3..u32::MAX).contains(cid));
                    cid = number
                        .ok_or_else(|| format!("cid '{value}' is not a number from 3 to 4294967294"))?;
                }
                Some(("socket", path)) if !path.is_empty() => socket = Some(PathBuf::from(path)),
                _ => return Err(format!("'{part}' is not understood; write [cid=N,]socket=PATH")),
            }
        }
        let socket = socket.ok_or("no socket is given; write [cid=N,]socket=PATH")?;
        Ok(Self { cid, socket })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_a_path_with_known_endings() {
        let disk: DiskSpec = "a,b.img:ro,format=raw".parse().unwrap();
        assert_eq!(disk.path, PathBuf::from("a,b.img"));
        assert_eq!(disk.options, DiskOptions { read_only: true, format: DiskFormat::Raw });
        assert_eq!("x:y".parse::<DiskSpec>().unwrap().path, PathBuf::from("x:y"));
        for text in ["", ":ro", "x,format=vhd"] {
            assert!(text.parse::<DiskSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn devices_take_a_policy_and_its_limits() {
        let parse = |text: &str| text.parse::<DeviceSpec>();
        assert_eq!(parse("01:00").unwrap(), DeviceSpec::from("01:00".parse::<Selection>().unwrap()));
        assert_eq!(parse("01:00,dma=identity").unwrap().dma, DmaPolicy::Identity);
        let mac = parse("01:00.1,dma=mac").unwrap();
        assert_eq!((mac.dma, mac.published), (DmaPolicy::MAC, Some(Layout::A)));
        let small = parse("01:00,limit-bytes=24M,dma=mac,limit-entries=666,published=b").unwrap();
        assert_eq!(small.dma, DmaPolicy::Mac(Config { bytes: 24 << 20, entries: 666, ..Config::MAC }));
        assert_eq!(small.published, Some(Layout::B));
        assert!(small.to_string().contains("24 MiB in 666 mappings"), "{small}");
        assert_eq!(parse("01:00,dma=mac,published=off").unwrap().published, None);
        assert_eq!(parse("simulated:rtx5090,dma=mac").unwrap().simulated, Some(SimulatedKind::Rtx5090));
        for text in [
            "",
            "xx",
            "01:00,dma=none",
            "01:00,dma=mac,limit-entries=0",
            "01:00,dma=mac,limit-entries=65537",
            "01:00,dma=mac,limit-bytes=2G",
            "01:00,dma=mac,limit-bytes=1K",
            "01:00,dma=mac,limit-bytes=512iB",
            "01:00,dma=mac,limit-bytes=0",
            "01:00,dma=identity,limit-bytes=24M",
            "01:00,dma=mac,published=c",
            "01:00,nonsense",
            "simulated:gpu",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn vsock_needs_a_socket_and_a_guest_cid() {
        let spec = VsockSpec { cid: 7, socket: "/run/v".into() };
        assert_eq!("cid=7,socket=/run/v".parse(), Ok(spec));
        assert_eq!("socket=v".parse::<VsockSpec>().unwrap().cid, 3);
        for text in ["", "cid=7", "cid=2,socket=v", "cid=4294967295,socket=v", "socket=", "port=1,socket=v"] {
            assert!(text.parse::<VsockSpec>().is_err(), "{text}");
        }
    }
}
