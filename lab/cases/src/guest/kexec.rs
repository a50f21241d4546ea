//! Starting another kernel from a running one (kexec_file_load(2)).
#![allow(unsafe_code, reason = "two system calls that no safe wrapper has")]

use super::disk::GuestDisk;
use super::drain_console;
use crate::data::{Aligned, BLOCK};
use anyhow::{Context, Result, bail};
use nix::libc;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

/// Linux, include/uapi/asm-generic/unistd.h: the number on arm64, which not every C library knows.
const KEXEC_FILE_LOAD: libc::c_long = 294;

/// The first `len` bytes of the disk `name`, as a file.
pub fn file(name: &str, len: u64) -> Result<File> {
    let disk = GuestDisk::read_only(name)?;
    let path = format!("/tmp/{name}");
    let mut file = File::create(&path)?;
    let mut left = usize::try_from(len)?;
    for block in 0..len.div_ceil(BLOCK as u64) {
        let bytes: Aligned = disk.read_block(block)?;
        let part = left.min(BLOCK);
        file.write_all(&bytes.get()[..part])?;
        left -= part;
    }
    File::open(&path).with_context(|| format!("cannot open {path}"))
}

/// Puts the kernel and its initramfs in place.
pub fn load(kernel: &File, initrd: &File, cmdline: &str) -> Result<()> {
    let line = CString::new(cmdline)?;
    let len = line.as_bytes_with_nul().len();
    // SAFETY: two open files, and a string that is as long as said.
    let result = unsafe {
        libc::syscall(KEXEC_FILE_LOAD, kernel.as_raw_fd(), initrd.as_raw_fd(), len, line.as_ptr(), 0)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context("kexec_file_load") }
}

/// Starts what [`load`] put in place; does not come back.
pub fn go() -> Result<()> {
    drain_console();
    // SAFETY: the end of this kernel, and of this process with it.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
    bail!("the kernel did not start another one: {}", io::Error::last_os_error())
}
