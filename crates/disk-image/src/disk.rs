use crate::open::{DiskFormat, detect, file_len, open_locked};
use crate::qcow2::Qcow2Disk;
use crate::raw::{RawDisk, Scratch};
use crate::{DiskError, GuestSlice};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

/// How to open an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Never write to it; others may read it too.
    pub read_only: bool,
    /// What it holds.
    pub format: DiskFormat,
    /// The backing files that the image may have, in order: its own, that of its backing file, and so on.
    pub backing: Vec<PathBuf>,
}

/// An opened disk image, locked against a second writer. Requests may come from several threads.
///
/// It keeps one descriptor of the file from before the first write to the end: an error of the host's write-back is reported once
/// to each descriptor that was open, so that one which another program has seen is still seen here.
#[derive(Debug)]
pub struct Disk {
    read_only: bool,
    /// Bytes, a multiple of 512.
    len: u64,
    image: Image,
    health: Arc<DiskHealth>,
    /// One flush at a time: an error is reported to one of two that run together, and the other must not succeed.
    flushing: Mutex<()>,
}

/// What became of an open disk, for whoever watches it.
#[derive(Debug, Default)]
pub struct DiskHealth(OnceLock<String>);

impl DiskHealth {
    /// Why flushes have failed since, if one has: what was written before the first such may be lost.
    pub fn flush_error(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// A flush failed for the reason given; `true` if it is the first.
    pub fn set_flush_error(&self, why: String) -> bool {
        self.0.set(why).is_ok()
    }
}

#[derive(Debug)]
enum Image {
    /// Straight to the file: for a raw image, imago's mapping layer and its allocations per request would only cost.
    Raw(RawDisk),
    Qcow2(Box<Qcow2Disk>),
}

impl Disk {
    /// Opens the image at `path`, a regular file or a block device.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(path: &Path, options: &DiskOptions) -> Result<Self, DiskError> {
        let writable = !options.read_only;
        let file = open_locked(path, writable)?;
        let (len, image) = match detect(path, &file, options.format)? {
            DiskFormat::Qcow2 => {
                let disk = Qcow2Disk::open(file, path, writable, &options.backing)?;
                (disk.len(), Image::Qcow2(Box::new(disk)))
            }
            DiskFormat::Raw | DiskFormat::Auto => {
                if let Some(given) = options.backing.first() {
                    return Err(DiskError::NoBacking { image: path.to_owned(), given: given.clone() });
                }
                let len = file_len(path, &file)?;
                let disk = RawDisk::new(file, len);
                (disk.len(), Image::Raw(disk))
            }
        };
        if len == 0 {
            return Err(DiskError::Empty(path.to_owned()));
        }
        Ok(Self {
            read_only: options.read_only,
            len,
            image,
            health: Arc::default(),
            flushing: Mutex::default(),
        })
    }

    /// Bytes, a multiple of 512.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Always false: an empty image is not opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// It was opened read-only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What becomes of it from here on.
    pub fn health(&self) -> Arc<DiskHealth> {
        Arc::clone(&self.health)
    }

    /// Fills `slices` from `offset`, which the caller has checked to lie within the disk with all of them.
    ///
    /// # Errors
    /// The operating system's, or what is wrong with the image.
    pub fn read(&self, slices: &[GuestSlice<'_>], offset: u64, scratch: &mut Scratch) -> io::Result<()> {
        match &self.image {
            Image::Raw(disk) => disk.read(slices, offset, scratch),
            Image::Qcow2(disk) => disk.read(slices, offset),
        }
    }

    /// Writes `slices` at `offset`, checked as for reads.
    ///
    /// # Errors
    /// As for reads; of a read-only disk always.
    pub fn write(&self, slices: &[GuestSlice<'_>], offset: u64, scratch: &mut Scratch) -> io::Result<()> {
        self.need_writable()?;
        match &self.image {
            Image::Raw(disk) => disk.write(slices, offset, scratch),
            Image::Qcow2(disk) => disk.write(slices, offset),
        }
    }

    /// Everything written so far is on stable storage when this returns.
    ///
    /// # Errors
    /// The operating system's. Once it could not bring the file to the medium, every later flush fails too: Linux forgets the
    /// pages that it could not write, so that the next fsync would succeed without them.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let _one = self.flushing.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(error) = self.health.flush_error() {
            return Err(io::Error::other(format!(
                "an earlier flush failed, what was written before may be lost: {error}"
            )));
        }
        if let Image::Qcow2(disk) = &self.image {
            disk.write_tables()?;
        }
        let synced = match &self.image {
            Image::Raw(disk) => disk.flush(),
            Image::Qcow2(disk) => disk.sync(),
        };
        if let Err(error) = &synced
            && self.health.set_flush_error(error.to_string())
        {
            tracing::error!(
                "a disk could not be flushed: {error}. What was written to it since the flush before may be lost; every further \
                 flush fails until the machine is started anew"
            );
        }
        synced
    }

    /// The range is no longer needed; what it reads as afterwards is open.
    ///
    /// # Errors
    /// As for writes.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.need_writable()?;
        match &self.image {
            Image::Raw(disk) => disk.discard(offset, len),
            Image::Qcow2(disk) => disk.discard(offset, len),
        }
    }

    /// The range reads as zeros; with `unmap` it need not keep its room in the host's file system.
    ///
    /// # Errors
    /// As for writes.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
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
