//! A Mac's limits, enforced by the emulated host's kernel as well: the second opinion on what Outboard counts by itself.
#![allow(unsafe_code, reason = "code between fork and exec")]

use super::Dma;
use anyhow::{Context, Result};
use nix::sys::resource::{Resource, setrlimit};
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What a process may pin for devices: the bytes that a Mac maps (dart-and-dma 3.1); and for [`Dma::Tight`].
const LOCKED: u64 = 1536 << 20;
const LOCKED_TIGHT: u64 = 24 << 20;
/// VFIO's most mappings of a container: its default, and for [`Dma::Tight`]. Read when a container is opened.
const ENTRIES: u32 = 65_535;
const ENTRIES_TIGHT: u32 = 666;
const ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
/// Linux, include/uapi/linux/capability.h: a process with it may pin without limit.
const CAP_IPC_LOCK: i32 = 14;

/// Has `command` run without CAP_IPC_LOCK and with RLIMIT_MEMLOCK at the bytes of `dma`.
pub(super) fn like_a_mac(command: &mut Command, dma: Dma) {
    let bytes = if dma == Dma::Tight { LOCKED_TIGHT } else { LOCKED };
    // SAFETY: only system calls between fork and exec.
    unsafe { command.pre_exec(move || restrict(bytes)) };
}

/// Limits the mappings of containers that are opened from now on to those of `dma`.
pub(super) fn set_entries(dma: Dma) -> Result<()> {
    let entries = if dma == Dma::Tight { ENTRIES_TIGHT } else { ENTRIES };
    fs::write(ENTRY_LIMIT, entries.to_string()).with_context(|| format!("cannot write {ENTRY_LIMIT}"))
}

fn restrict(bytes: u64) -> io::Result<()> {
    setrlimit(Resource::RLIMIT_MEMLOCK, bytes, bytes)?;
    // Out of the bounding set: the program that is started next does not get it, root or not (capabilities(7)).
    // SAFETY: changes nothing but this process's capabilities.
    let dropped = unsafe { nix::libc::prctl(nix::libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) };
    if dropped == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
