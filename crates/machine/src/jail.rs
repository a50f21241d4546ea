//! What a machine's process may still do once everything that was asked for is open.

use crate::terminal::restore_terminal_now;
use crate::{ConsoleTarget, Error, MachineSpec};
use outboard_control::Server;
use outboard_jail::{Access, Confinement, Policy};
use std::path::{Path, PathBuf};

/// Private memory beside the guest's: what 1,024 connections, 32 vCPUs, disks' tables and a device's queues can need, several times.
const OWN_MEMORY: u64 = 4 << 30;

/// Confines the process; says once in the log what this host cannot do.
///
/// # Errors
/// [`Error::Jail`] if the host has what it takes and refuses.
pub(crate) fn enter(spec: &MachineSpec, control: Option<&Server>) -> Result<Confinement, Error> {
    let confinement = outboard_jail::enter(&policy(spec, control))?;
    if confinement.missing.is_empty() {
        tracing::debug!("jail: {confinement}");
    } else {
        tracing::warn!("this process is less confined than it could be. Jail: {confinement}");
    }
    Ok(confinement)
}

fn policy(spec: &MachineSpec, control: Option<&Server>) -> Policy {
    let mut policy = Policy {
        mode: spec.jail,
        network: !spec.nets.is_empty(),
        // Twice the guest's: of a machine that is rebooted while a broken device may still write, memory stays allocated.
        memory: spec.memory.saturating_mul(2).saturating_add(OWN_MEMORY),
        last_words: Some(restore_terminal_now),
        ..Policy::default()
    };
    if spec.nets.iter().any(|net| net.dns.is_none()) {
        policy.reread.push("/etc/resolv.conf".into());
    }
    for console in [&spec.console, &spec.virtio_console] {
        match console {
            ConsoleTarget::File(file) => policy.files.push((folder(&file.path), Access::Rotate)),
            ConsoleTarget::Socket(path) => policy.remove.push(path.clone()),
            ConsoleTarget::None | ConsoleTarget::Stdio => {}
        }
    }
    policy.files.extend(spec.log.iter().map(|log| (folder(log), Access::Rotate)));
    policy.remove.extend(spec.vsock.iter().map(|vsock| vsock.socket.clone()));
    policy.remove.extend(control.iter().flat_map(|server| server.files()).map(Path::to_owned));
    if !spec.devices.is_empty() || spec.spare_ports > 0 {
        policy.files.extend(devices_of_the_host());
    }
    policy
}

/// Where `outboard device add` finds out about a device and opens it: the same places that host-pci looks at (host/usage.rs, vfio/domain.rs).
/// Of sysfs only the mark of a device that does not come back can be written (host-pci/src/vfio/reset.rs), and only of those there are now.
fn devices_of_the_host() -> impl Iterator<Item = (PathBuf, Access)> {
    let below = ["/sys/bus/pci", "/sys/devices", "/sys/block", "/sys/class", "/sys/fs/btrfs"];
    let files = ["mountinfo", "status", "net/route", "net/ipv6_route", "net/if_inet6"];
    below
        .into_iter()
        .map(|path| (path.into(), Access::ReadBelow))
        .chain(files.into_iter().map(|name| (Path::new("/proc/self").join(name), Access::Read)))
        .chain(marks())
        .chain([("/proc/swaps".into(), Access::Read), ("/dev/vfio".into(), Access::Device)])
}

fn marks() -> impl Iterator<Item = (PathBuf, Access)> {
    let devices = std::fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten();
    devices.map(|device| (device.path().join("driver_override"), Access::Write))
}

fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => ".".into(),
    }
}
