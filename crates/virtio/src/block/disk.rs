use super::qcow2::Qcow2Disk;
use super::raw::{RawDisk, Scratch};
use super::{DiskError, SECTOR};
use crate::GuestSlice;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::Duration;

/// What an image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskFormat {
    /// By the name: `.qcow2` (and `.qcow`) is qcow2, everything else raw. The content only confirms it: a raw image
    /// that starts like qcow2 is refused, because its guest may have written that to be given other files of the host
    /// as backing files at the next start.
    #[default]
    Auto,
    /// The bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

/// How to open an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Never write to it; others may read it too.
    pub read_only: bool,
    /// What it holds.
    pub format: DiskFormat,
}

/// An opened disk image, locked against a second writer. Requests may come from several threads.
#[derive(Debug)]
pub struct Disk {
    read_only: bool,
    /// Bytes, a multiple of 512.
    len: u64,
    image: Image,
}

#[derive(Debug)]
enum Image {
    /// Straight to the file: for a raw image, imago's mapping layer and its allocations per request would only cost.
    Raw(RawDisk),
    Qcow2(Qcow2Disk),
}

impl Disk {
    /// Opens the image at `path`, a regular file or a block device.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(path: &Path, options: DiskOptions) -> Result<Self, DiskError> {
        let writable = !options.read_only;
        let file = open_locked(path, writable)?;
        let (len, image) = match detect(path, &file, options.format)? {
            DiskFormat::Qcow2 => {
                let disk = Qcow2Disk::open(file, path, writable)?;
                (disk.len(), Image::Qcow2(disk))
            }
            DiskFormat::Raw | DiskFormat::Auto => (file_len(path, &file)?, Image::Raw(RawDisk::new(file))),
        };
        if len == 0 {
            return Err(DiskError::Empty(path.to_owned()));
        }
        if !len.is_multiple_of(SECTOR) {
            return Err(DiskError::BadSize { path: path.to_owned(), len });
        }
        Ok(Self { read_only: options.read_only, len, image })
    }

    /// Bytes, a multiple of 512.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Always false: an empty image is not opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it was opened read-only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Fills `slices` from `offset`, which the caller has checked to lie within the disk with all of them.
    pub(super) fn read(
        &self,
        slices: &[GuestSlice<'_>],
        offset: u64,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        match &self.image {
            Image::Raw(disk) => disk.read(slices, offset, scratch),
            Image::Qcow2(disk) => disk.read(slices, offset),
        }
    }

    /// Writes `slices` at `offset`, checked as for reads.
    pub(super) fn write(
        &self,
        slices: &[GuestSlice<'_>],
        offset: u64,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        self.need_writable()?;
        match &self.image {
            Image::Raw(disk) => disk.write(slices, offset, scratch),
            Image::Qcow2(disk) => disk.write(slices, offset),
        }
    }

    /// Everything written so far is on stable storage when this returns.
    pub(super) fn flush(&self) -> io::Result<()> {
        match &self.image {
            _ if self.read_only => Ok(()),
            Image::Raw(disk) => disk.flush(),
            Image::Qcow2(disk) => disk.flush(),
        }
    }

    /// The range is no longer needed; what it reads as afterwards is open.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.need_writable()?;
        match &self.image {
            Image::Raw(disk) => disk.discard(offset, len),
            Image::Qcow2(disk) => disk.discard(offset, len),
        }
    }

    /// The range reads as zeros; with `unmap` it need not keep its room in the host's file system.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.need_writable()?;
        match &self.image {
            Image::Raw(disk) => disk.write_zeroes(offset, len, unmap),
            Image::Qcow2(disk) => disk.write_zeroes(offset, len, unmap),
        }
    }

    fn need_writable(&self) -> io::Result<()> {
        if self.read_only { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
    }
}

/// How often and how far apart a lock is tried: udev locks a block device for a moment when it appears, and a process
/// that is starting another one holds a copy of each lock until that one runs.
const LOCK_TRIES: u32 = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Opens a file or block device and locks it: exclusively to write, shared to read. The lock (flock) goes with the file.
pub(super) fn open_locked(path: &Path, writable: bool) -> Result<File, DiskError> {
    let host = |action, source| DiskError::Host { action, path: path.to_owned(), source };
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(DiskError::NotFound(path.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            return Err(DiskError::Permission(path.to_owned()));
        }
        Err(e) => return Err(host("look at disk image", e)),
    };
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(DiskError::IsDirectory(path.to_owned()));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::NotADisk(path.to_owned()));
    }
    // A file that nobody may write is meant to stay as it is, also when root opens it.
    if writable && metadata.permissions().readonly() {
        return Err(DiskError::ReadOnly(path.to_owned()));
    }
    let file = OpenOptions::new().read(true).write(writable).open(path).map_err(|e| match e.kind() {
        io::ErrorKind::PermissionDenied if File::open(path).is_ok() => DiskError::ReadOnly(path.to_owned()),
        io::ErrorKind::ReadOnlyFilesystem => DiskError::ReadOnly(path.to_owned()),
        io::ErrorKind::PermissionDenied => DiskError::Permission(path.to_owned()),
        _ => host("open disk image", e),
    })?;
    for _ in 0..LOCK_TRIES {
        match if writable { file.try_lock() } else { file.try_lock_shared() } {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
            Err(TryLockError::Error(e)) => return Err(host("lock disk image", e)),
        }
    }
    Err(DiskError::InUse(path.to_owned()))
}

/// Length of a file or block device.
pub(super) fn file_len(path: &Path, mut file: &File) -> Result<u64, DiskError> {
    file.seek(SeekFrom::End(0)).map_err(|source| DiskError::Host {
        action: "find the size of disk image",
        path: path.to_owned(),
        source,
    })
}

/// Raw or qcow2, see [`DiskFormat::Auto`].
fn detect(path: &Path, file: &File, format: DiskFormat) -> Result<DiskFormat, DiskError> {
    if format != DiskFormat::Auto {
        return Ok(format);
    }
    let mut magic = [0; 4];
    let has_magic = file.read_exact_at(&mut magic, 0).is_ok() && &magic == b"QFI\xfb";
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    match extension.as_deref() {
        Some("qcow2" | "qcow") if has_magic => Ok(DiskFormat::Qcow2),
        Some("qcow2" | "qcow") => Err(DiskError::NotQcow2(path.to_owned())),
        Some("vmdk" | "vdi" | "vhd" | "vhdx" | "qed" | "dmg") => {
            Err(DiskError::UnknownFormat(path.to_owned()))
        }
        _ if has_magic => Err(DiskError::LooksLikeQcow2(path.to_owned())),
        _ => Ok(DiskFormat::Raw),
    }
}
