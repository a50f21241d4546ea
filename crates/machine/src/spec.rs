use crate::ConsoleTarget;
use outboard_host_pci::Selection;
use outboard_hypervisor::VcpuOptions;
use outboard_netstack::NetOptions;
use outboard_virtio::block::{DiskFormat, DiskOptions};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Everything a user says about a machine.
#[derive(Clone, Debug)]
pub struct MachineSpec {
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
    pub devices: Vec<Selection>,
    /// End the process when the guest reboots.
    pub no_reboot: bool,
    /// For every vCPU.
    pub vcpu: VcpuOptions,
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
    fn vsock_needs_a_socket_and_a_guest_cid() {
        let spec = VsockSpec { cid: 7, socket: "/run/v".into() };
        assert_eq!("cid=7,socket=/run/v".parse(), Ok(spec));
        assert_eq!("socket=v".parse::<VsockSpec>().unwrap().cid, 3);
        for text in ["", "cid=7", "cid=2,socket=v", "cid=4294967295,socket=v", "socket=", "port=1,socket=v"] {
            assert!(text.parse::<VsockSpec>().is_err(), "{text}");
        }
    }
}
