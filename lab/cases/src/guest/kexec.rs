//! Starting another kernel from a running one (kexec_load(2); Debian's arm64 kernels do not have kexec_file_load).
//!
//! The device tree stays as it is, so the command line does, and the initramfs goes where the first one was.
#![allow(unsafe_code, reason = "two system calls that no safe wrapper has")]

use super::disk::GuestDisk;
use super::drain_console;
use crate::data::BLOCK;
use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use std::fs;
use std::io;

/// Linux, include/uapi/linux/kexec.h.
const KEXEC_ARCH_AARCH64: libc::c_ulong = 183 << 16;
/// Kernels start at a multiple of 2 MiB (Linux, Documentation/arch/arm64/booting.rst).
const ALIGN: u64 = 2 << 20;
const PAGE: u64 = 4096;
const CHOSEN: &str = "/proc/device-tree/chosen";

/// `struct kexec_segment`: what goes where.
#[repr(C)]
struct Segment {
    from: *const u8,
    len: usize,
    to: u64,
    room: usize,
}

/// The first `len` bytes of the disk `name`.
pub fn read(name: &str, len: u64) -> Result<Vec<u8>> {
    let disk = GuestDisk::read_only(name)?;
    let mut bytes = Vec::new();
    for block in 0..len.div_ceil(BLOCK as u64) {
        bytes.extend_from_slice(disk.read_block(block)?.get());
    }
    bytes.truncate(usize::try_from(len)?);
    Ok(bytes)
}

/// Puts the kernel and its initramfs in place, for a guest whose RAM is from `ram` on `bytes` long.
pub fn load(kernel: &[u8], initrd: &[u8], ram: u64, bytes: u64) -> Result<()> {
    let tree = fs::read("/sys/firmware/fdt").context("cannot read the device tree")?;
    let (start, end) = (address("linux,initrd-start")?, address("linux,initrd-end")?);
    ensure!(end - start == initrd.len() as u64, "the initramfs is not the one that this kernel has");
    let size = kernel.get(16..24).context("the kernel has a header")?;
    let size = u64::from_le_bytes(size.try_into().context("eight bytes")?);
    // At the ends of RAM, the initramfs where it was: none of it may meet.
    let (tree_at, jump_at) = (ram + bytes - 2 * ALIGN, ram + bytes - ALIGN);
    let kernel_at = ram.next_multiple_of(ALIGN);
    ensure!(kernel_at + size <= start && end <= tree_at, "the kernel does not fit before {start:#x}");
    let jump = trampoline(kernel_at, tree_at);
    let segment = |bytes: &[u8], to: u64| Segment {
        from: bytes.as_ptr(),
        len: bytes.len(),
        to,
        room: bytes.len().next_multiple_of(PAGE as usize),
    };
    let mut segments = [
        segment(kernel, kernel_at),
        segment(initrd, start / PAGE * PAGE),
        segment(&tree, tree_at),
        segment(&jump, jump_at),
    ];
    ensure!(start.is_multiple_of(PAGE), "the initramfs is at {start:#x}, no page's start");
    segments.sort_by_key(|segment| segment.to);
    // SAFETY: the segments describe slices that live until the call is over.
    let result = unsafe {
        libc::syscall(libc::SYS_kexec_load, jump_at, segments.len(), segments.as_ptr(), KEXEC_ARCH_AARCH64)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context("kexec_load") }
}

/// Code that goes on at `kernel` with the device tree's address in x0 and zeros in x1 to x3.
fn trampoline(kernel: u64, tree: u64) -> Vec<u8> {
    // ldr x4, [pc, 24]; ldr x0, [pc, 28]; mov x1, 0; mov x2, 0; mov x3, 0; br x4
    let code: [u32; 6] = [0x5800_00c4, 0x5800_00e0, 0xd280_0001, 0xd280_0002, 0xd280_0003, 0xd61f_0080];
    let mut bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(kernel.to_le_bytes());
    bytes.extend(tree.to_le_bytes());
    bytes
}

/// An address in the device tree, of one or two cells.
fn address(name: &str) -> Result<u64> {
    let bytes =
        fs::read(format!("{CHOSEN}/{name}")).with_context(|| format!("the device tree has no {name}"))?;
    ensure!(bytes.len() <= 8, "{name} is no address");
    Ok(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// Starts what [`load`] put in place; does not come back.
pub fn go() -> Result<()> {
    drain_console();
    // SAFETY: the end of this kernel, and of this process with it.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
    bail!("the kernel did not start another one: {}", io::Error::last_os_error())
}
