//! Mounts and the end of the machine.

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use std::fs;

/// What any init mounts first.
pub fn basic() -> Result<()> {
    for (kind, target) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run"), ("tmpfs", "/tmp")]
    {
        attach(kind, kind, target, MsFlags::empty(), "")?;
    }
    Ok(())
}

/// Mounts `source` of type `kind` on `target`, which is created.
pub fn attach(source: &str, kind: &str, target: &str, flags: MsFlags, options: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
    mount(Some(source), target, Some(kind), flags, Some(options))
        .with_context(|| format!("cannot mount {source} ({kind}) on {target}"))
}

/// Switches the machine off.
pub fn power_off() -> Result<()> {
    lab_cases::guest::drain_console();
    nix::unistd::sync();
    reboot(RebootMode::RB_POWER_OFF).context("cannot switch off")?;
    Ok(())
}
