//! PCI devices in the guest, taken from their driver: registers mapped into this process.
#![allow(unsafe_code)] // UNSAFETY: device registers and pages that a device writes are reached through raw pointers.

use super::{mmio, wait_for};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous, munmap};
use std::fs::{self, File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::Duration;

const DRIVER: &str = "/sys/bus/pci/drivers/virtio-pci";
/// Bytes of a page of the guest's kernel.
pub const PAGE: usize = 4096;

/// A modern virtio device on PCI (virtio 1.2, 4.1).
pub struct VirtioPci {
    address: String,
    folder: PathBuf,
}

/// Where a register block is: BAR, offset, length.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    bar: u8,
    offset: u32,
    length: u32,
}

impl VirtioPci {
    /// The first device with this virtio device type (virtio 1.2, section 5).
    pub fn find(kind: u16) -> Result<Self> {
        for entry in fs::read_dir("/sys/bus/pci/devices")?.flatten() {
            let word = |name: &str| {
                let text = fs::read_to_string(entry.path().join(name)).unwrap_or_default();
                u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap_or(0)
            };
            if word("vendor") == 0x1AF4 && word("device") == 0x1040 + kind {
                let address = entry.file_name().to_string_lossy().into_owned();
                return Ok(Self { address, folder: entry.path() });
            }
        }
        bail!("no virtio device of type {kind} on the PCI bus")
    }

    /// Takes it from its driver.
    pub fn unbind(&self) -> Result<()> {
        if self.folder.join("driver").exists() {
            fs::write(Path::new(DRIVER).join("unbind"), &self.address)
                .with_context(|| format!("cannot take {} from its driver", self.address))?;
        }
        // The driver leaves memory decoding as it likes; here it must be on.
        let config = OpenOptions::new().read(true).write(true).open(self.folder.join("config"))?;
        let mut command = [0; 2];
        config.read_exact_at(&mut command, 4)?;
        command[0] |= 0b110;
        config.write_all_at(&command, 4).context("cannot switch memory decoding on")
    }

    /// Gives it back to its driver.
    pub fn bind(&self) -> Result<()> {
        fs::write(Path::new(DRIVER).join("bind"), &self.address)
            .with_context(|| format!("the driver does not take {} back", self.address))?;
        wait_for("driver", Duration::from_secs(10), || self.folder.join("driver").exists().then_some(()))
    }

    /// The block of registers with this `cfg_type` (1 common, 2 notification, 3 interrupt status, 4 device), and for
    /// notifications the multiplier behind it.
    pub fn block(&self, kind: u8) -> Result<(Block, u32)> {
        let config = fs::read(self.folder.join("config"))?;
        let byte = |at: usize| config.get(at).copied().unwrap_or(0);
        let dword = |at: usize| u32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)]);
        let mut at = usize::from(byte(0x34));
        // At most 48 capabilities fit.
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            if byte(at) == 9 && byte(at + 3) == kind {
                let block = Block { bar: byte(at + 4), offset: dword(at + 8), length: dword(at + 12) };
                return Ok((block, dword(at + 16)));
            }
            at = usize::from(byte(at + 1));
        }
        bail!("{} has no virtio capability of type {kind}", self.address)
    }

    /// Maps a block. The device must be unbound: the kernel lets nobody map what a driver has claimed.
    pub fn map(&self, block: Block) -> Result<Registers> {
        let path = self.folder.join(format!("resource{}", block.bar));
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let first = block.offset as usize / PAGE * PAGE;
        let len = (block.offset as usize + block.length as usize).div_ceil(PAGE) * PAGE - first;
        Registers::map(&file, first, len, block.offset as usize - first, block.length as usize)
            .with_context(|| format!("cannot map {}", path.display()))
    }
}

/// Mapped registers, or any physical memory that is no RAM.
pub struct Registers {
    base: NonNull<u8>,
    mapped: usize,
    start: usize,
    len: usize,
}

// SAFETY: all access is by volatile reads and writes of whole registers; what threads do to each other there is the device's to bear.
unsafe impl Sync for Registers {}
// SAFETY: an address and a length; what is there is only accessed volatile, as registers that anybody may change.
unsafe impl Send for Registers {}

impl Registers {
    fn map(file: &File, offset: usize, mapped: usize, start: usize, len: usize) -> Result<Self> {
        let size = NonZeroUsize::new(mapped).context("nothing to map")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let offset = i64::try_from(offset)?;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing else knows of it.
        let base = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, file, offset)? };
        Ok(Self { base: base.cast(), mapped, start, len })
    }

    /// The first `len` bytes, whole pages, of a BAR of the function with this folder in sysfs.
    pub fn of_bar(folder: &Path, bar: u8, len: usize) -> Result<Self> {
        let path = folder.join(format!("resource{bar}"));
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        Self::map(&file, 0, len, 0, len).with_context(|| format!("cannot map {}", path.display()))
    }

    /// One page of guest-physical memory that is no RAM and belongs to no driver, through `/dev/mem`.
    pub fn physical(address: u64) -> Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).open("/dev/mem").context("cannot open /dev/mem")?;
        ensure!(address.is_multiple_of(PAGE as u64), "{address:#x} is no page");
        Self::map(&file, usize::try_from(address)?, PAGE, 0, PAGE)
            .with_context(|| format!("cannot map guest-physical {address:#x}"))
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(
            offset + size_of::<T>() <= self.len && offset.is_multiple_of(size_of::<T>()),
            "outside of the block"
        );
        // SAFETY: within the mapping, by the check above.
        unsafe { self.base.as_ptr().add(self.start + offset).cast() }
    }

    /// Reads a register of 1, 2, 4 or 8 bytes.
    pub fn read<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: mapped and aligned (`at`).
        unsafe { mmio::read(self.at::<T>(offset)) }
    }

    /// Writes a register of 1, 2, 4 or 8 bytes.
    pub fn write<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: mapped and aligned (`at`).
        unsafe { mmio::write(self.at::<T>(offset), value) }
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody keeps a pointer into it.
        let _ = unsafe { munmap(self.base.cast(), self.mapped) };
    }
}

/// A page of this process that stays where it is, for a device to read and write.
pub struct DmaPage {
    base: NonNull<u8>,
    address: u64,
}

// SAFETY: all access is by volatile reads and writes of whole words, which a device makes at the same time as well.
unsafe impl Sync for DmaPage {}

impl DmaPage {
    /// A page of zeros.
    pub fn new() -> Result<Self> {
        let size = NonZeroUsize::new(PAGE).context("a page has bytes")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let base =
            unsafe { mmap_anonymous(None, size, access, MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE)? };
        // SAFETY: the page just mapped. A guest without swap does not move it.
        unsafe { mlock(base, PAGE)? };
        // Linux, Documentation/admin-guide/mm/pagemap.rst: 8 bytes a page, bits 0 to 54 are the frame.
        let mut entry = [0; 8];
        let index = base.as_ptr() as u64 / PAGE as u64;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, index * 8)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        ensure!(frame != 0, "the kernel does not say where the page is");
        Ok(Self { base: base.cast(), address: frame * PAGE as u64 })
    }

    /// Its guest-physical address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Reads what stands at `offset`.
    pub fn read<T: Copy>(&self, offset: usize) -> T {
        assert!(
            offset + size_of::<T>() <= PAGE && offset.is_multiple_of(size_of::<T>()),
            "outside of the page"
        );
        // SAFETY: within the page and aligned; volatile, since a device changes it.
        unsafe { self.base.as_ptr().add(offset).cast::<T>().read_volatile() }
    }

    /// Writes to `offset`.
    pub fn write<T: Copy>(&self, offset: usize, value: T) {
        assert!(
            offset + size_of::<T>() <= PAGE && offset.is_multiple_of(size_of::<T>()),
            "outside of the page"
        );
        // SAFETY: within the page and aligned; volatile, since a device reads it.
        unsafe { self.base.as_ptr().add(offset).cast::<T>().write_volatile(value) }
    }

    /// Fills it with zeros.
    pub fn clear(&self) {
        (0..PAGE).step_by(8).for_each(|offset| self.write(offset, 0_u64));
    }
}

impl Drop for DmaPage {
    fn drop(&mut self) {
        // SAFETY: our own page, and nobody keeps a pointer into it. Devices have been reset before.
        let _ = unsafe { munmap(self.base.cast(), PAGE) };
    }
}
