//! Starting another kernel from a running one (kexec_load(2); Debian's arm64 kernels do not have kexec_file_load).
//!
//! The device tree stays as it is, so the command line does, and the initramfs goes where the first one was.
#![allow(unsafe_code, reason = "two system calls that no safe wrapper has")]

use super::disk::GuestDisk;
use super::drain_console;
use crate::data::{Aligned, BLOCK};
use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Linux, include/uapi/linux/kexec.h.
const KEXEC_ARCH_AARCH64: libc::c_ulong = 183 << 16;
const KEXEC_ON_CRASH: libc::c_ulong = 1;
/// Kernels start at a multiple of 2 MiB (Linux, Documentation/arch/arm64/booting.rst).
const ALIGN: u64 = 2 << 20;
const PAGE: u64 = 4096;
/// Bytes of a read.
const PIECE: usize = 1 << 20;
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
    let (mut bytes, len) = (Vec::new(), usize::try_from(len)?);
    let mut piece = Aligned::new(PIECE);
    while bytes.len() < len {
        // The disk is whole blocks long.
        let rest = (len - bytes.len()).next_multiple_of(BLOCK).min(PIECE);
        let piece = &mut piece.get_mut()[..rest];
        disk.file().read_exact_at(piece, bytes.len() as u64).with_context(|| format!("reading {name}"))?;
        bytes.extend_from_slice(piece);
    }
    bytes.truncate(len);
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
    ensure!(start.is_multiple_of(PAGE), "the initramfs is at {start:#x}, no page's start");
    let jump = trampoline(kernel_at, tree_at);
    hand_over(&[(kernel, kernel_at), (initrd, start), (&tree, tree_at), (&jump, jump_at)], jump_at, 0)
}

/// Puts the kernel and its initramfs into the memory that this kernel keeps for a crash (`crashkernel=`), to be started by one. All that it takes
/// for memory is what was kept; in its command line each of `words` is replaced by the other of the pair, of the same length. `ram` is where
/// the guest's RAM is.
pub fn load_for_crash(kernel: &[u8], initrd: &[u8], ram: &Range<u64>, words: &[(&str, &str)]) -> Result<()> {
    let mut tree = fs::read("/sys/firmware/fdt").context("cannot read the device tree")?;
    let kept = kept_for_crash()?;
    let size = kernel.get(16..24).context("the kernel has a header")?;
    let size = u64::from_le_bytes(size.try_into().context("eight bytes")?);
    let kernel_at = kept.start.next_multiple_of(ALIGN);
    let initrd_at = (kernel_at + size).next_multiple_of(ALIGN);
    let (tree_at, jump_at) = (kept.end - 2 * ALIGN, kept.end - ALIGN);
    let initrd_end = initrd_at + initrd.len() as u64;
    ensure!(initrd_end <= tree_at, "{kept:x?} is too small for the kernel and its initramfs");
    let (old_start, old_end) = (address("linux,initrd-start")?, address("linux,initrd-end")?);
    let pair = |a: u64, b: u64| [a.to_be_bytes(), b.to_be_bytes()].concat();
    // Values of the same length, so that the tree stays in place.
    replace(&mut tree, &pair(ram.start, ram.end - ram.start), &pair(kept.start, kept.end - kept.start))?;
    replace(&mut tree, &old_start.to_be_bytes(), &initrd_at.to_be_bytes())?;
    replace(&mut tree, &old_end.to_be_bytes(), &initrd_end.to_be_bytes())?;
    words.iter().try_for_each(|(old, new)| replace(&mut tree, old.as_bytes(), new.as_bytes()))?;
    let jump = trampoline(kernel_at, tree_at);
    let parts = [(kernel, kernel_at), (initrd, initrd_at), (&tree[..], tree_at), (&jump[..], jump_at)];
    hand_over(&parts, jump_at, KEXEC_ON_CRASH)
}

/// Puts `new` where `old` is, once, in the device tree.
fn replace(tree: &mut [u8], old: &[u8], new: &[u8]) -> Result<()> {
    let places: Vec<usize> =
        tree.windows(old.len()).enumerate().filter(|(_, bytes)| *bytes == old).map(|(at, _)| at).collect();
    let text = String::from_utf8_lossy(old);
    ensure!(
        places.len() == 1 && old.len() == new.len(),
        "'{text}' is {} times in the device tree",
        places.len()
    );
    tree[places[0]..places[0] + new.len()].copy_from_slice(new);
    Ok(())
}

/// What `/proc/iomem` calls the crash kernel's.
fn kept_for_crash() -> Result<Range<u64>> {
    let text = fs::read_to_string("/proc/iomem").context("cannot read /proc/iomem")?;
    let line = text.lines().find(|line| line.ends_with(" : Crash kernel"));
    let line = line.with_context(|| format!("no memory is kept for a crash kernel: {text}"))?;
    let (range, _) = line.trim().split_once(' ').context("a line has a range")?;
    let (start, last) = range.split_once('-').context("a range has two ends")?;
    Ok(u64::from_str_radix(start, 16)?..u64::from_str_radix(last, 16)? + 1)
}

/// Gives the kernel `parts` (bytes, and where they go) to be started at `entry`.
fn hand_over(parts: &[(&[u8], u64)], entry: u64, flags: libc::c_ulong) -> Result<()> {
    let segment = |(bytes, to): &(&[u8], u64)| Segment {
        from: bytes.as_ptr(),
        len: bytes.len(),
        to: *to,
        room: bytes.len().next_multiple_of(PAGE as usize),
    };
    let mut segments: Vec<Segment> = parts.iter().map(segment).collect();
    segments.sort_by_key(|segment| segment.to);
    let flags = KEXEC_ARCH_AARCH64 | flags;
    // SAFETY: the segments describe slices that live until the call is over.
    let result =
        unsafe { libc::syscall(libc::SYS_kexec_load, entry, segments.len(), segments.as_ptr(), flags) };
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
