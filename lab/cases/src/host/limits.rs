//! A Mac's limits, enforced by the emulated host's kernel as well: the second opinion on what Outboard counts by itself.
#![allow(unsafe_code, reason = "code between fork and exec")]

use nix::sys::resource::{Resource, setrlimit};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What a process may pin for devices: the bytes that a Mac maps (dart-and-dma 3.1). VFIO's own limit of 65,535 mappings is its default.
const LOCKED: u64 = 1536 << 20;
/// Linux, include/uapi/linux/capability.h: a process with it may pin without limit.
const CAP_IPC_LOCK: i32 = 14;

/// Has `command` run without CAP_IPC_LOCK and with RLIMIT_MEMLOCK at a Mac's 1.5 GiB.
pub(super) fn like_a_mac(command: &mut Command) {
    // SAFETY: only system calls between fork and exec.
    unsafe { command.pre_exec(restrict) };
}

fn restrict() -> io::Result<()> {
    setrlimit(Resource::RLIMIT_MEMLOCK, LOCKED, LOCKED)?;
    // Out of the bounding set: the program that is started next does not get it, root or not (capabilities(7)).
    // SAFETY: changes nothing but this process's capabilities.
    let dropped = unsafe { nix::libc::prctl(nix::libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) };
    if dropped == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
