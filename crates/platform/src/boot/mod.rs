//! Loads an arm64 Linux kernel, its initial RAM disk and its device tree into guest RAM, as the kernel's boot protocol
//! wants (Linux Documentation/arch/arm64/booting.rst).
//!
//! Kernels come as a flat `Image`, a gzip-compressed `Image`, or an EFI zboot image with a gzip or zstd payload. Compressed
//! ones are unpacked straight into guest RAM, at every boot, so no copy of the kernel stays in this process.

mod error;
mod kernel;
mod unpack;

pub use error::BootError;
pub use kernel::{Kernel, KernelFormat};

use crate::GuestMemory;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};

/// Room for the device tree. The boot protocol allows at most 2 MiB; ours has some 10 KiB, the command line 4 KiB of them.
pub const FDT_SIZE: u64 = 64 * 1024;
/// Alignment of the kernel, from the boot protocol.
const KERNEL_ALIGN: u64 = 2 << 20;
/// The initrd starts on a page, whatever page size the guest's kernel has.
const INITRD_ALIGN: u64 = 64 * 1024;

/// An initial RAM disk, opened and measured.
#[derive(Debug)]
pub struct Initrd {
    file: File,
    path: PathBuf,
    len: u64,
}

impl Initrd {
    /// Opens `path`.
    ///
    /// # Errors
    /// [`BootError`] if it cannot be opened or is not a regular file.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let (file, len) = error::open_file("initrd", path)?;
        Ok(Self { file, path: path.to_owned(), len })
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }
}

/// Where things ended up in guest RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// First instruction of the kernel.
    pub entry: u64,
    /// Where the device tree must be written, [`FDT_SIZE`] bytes of room.
    pub fdt: u64,
    /// The initial RAM disk.
    pub initrd: Option<Range<u64>>,
}

/// Puts `kernel` and `initrd` into `ram`: kernel first, then the device tree's room, then the initrd.
///
/// # Errors
/// [`BootError`] if they do not fit or cannot be read.
pub fn load(
    memory: &GuestMemory,
    ram: &Range<u64>,
    kernel: &Kernel,
    initrd: Option<&Initrd>,
) -> Result<Loaded, BootError> {
    let base = ram.start.next_multiple_of(KERNEL_ALIGN);
    let image = kernel.load(memory, base, ram.end)?;
    let fdt = image.end.next_multiple_of(KERNEL_ALIGN);
    let mut end = fdt + FDT_SIZE;
    if end > ram.end {
        return Err(BootError::NoRoom {
            what: "the kernel",
            needs: end - ram.start,
            ram: ram.end - ram.start,
        });
    }
    let mut range = None;
    if let Some(initrd) = initrd {
        let start = end.next_multiple_of(INITRD_ALIGN);
        end = start.saturating_add(initrd.len);
        if end > ram.end {
            let (needs, ram) = (end - ram.start, ram.end - ram.start);
            return Err(BootError::NoRoom { what: "kernel and initrd", needs, ram });
        }
        read_into(memory, start, initrd)?;
        range = Some(start..end);
    }
    Ok(Loaded { entry: image.start, fdt, initrd: range })
}

fn read_into(memory: &GuestMemory, start: u64, initrd: &Initrd) -> Result<(), BootError> {
    let unreadable = |source| BootError::Unreadable { what: "initrd", path: initrd.path.clone(), source };
    let mut file = &initrd.file;
    file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    // A file that shrank since it was opened ends this with an error, never with a short initrd.
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, initrd.len as usize)
        .map_err(|e| unreadable(std::io::Error::other(e)))
}

/// Writes a device tree to where [`load`] left room for it.
///
/// # Errors
/// [`BootError::NoRoom`] if it is longer than [`FDT_SIZE`].
pub fn write_fdt(memory: &GuestMemory, at: u64, blob: &[u8]) -> Result<(), BootError> {
    if blob.len() as u64 > FDT_SIZE {
        let needs = blob.len() as u64;
        return Err(BootError::NoRoom { what: "the device tree", needs, ram: FDT_SIZE });
    }
    memory.write_slice(blob, GuestAddress(at)).map_err(|_| BootError::OutsideRam { address: at })
}

#[cfg(test)]
mod tests;
