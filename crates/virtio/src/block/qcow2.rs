//! A qcow2 image with its backing files, through `imago`.
//!
//! The chain is opened here, file by file, and not by imago: that way each file is locked, cycles are found, and a
//! format is never guessed from what a guest may have written.

use super::disk::{file_len, open_locked};
use super::{DiskError, MAX_BACKING_FILES};
use crate::GuestSlice;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions, file::File as ImagoFile,
};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

type Format = FormatAccess<ImagoFile>;

#[derive(Debug)]
pub struct Qcow2Disk {
    /// Shared by requests; a discard has it alone, because it takes clusters away that others may be using.
    image: RwLock<Format>,
}

impl Qcow2Disk {
    /// Opens `file`, locked already, and every backing file behind it.
    pub fn open(file: File, path: &Path, writable: bool) -> Result<Self, DiskError> {
        let image = Chain::default().open_qcow2(file, path, writable)?;
        Ok(Self { image: RwLock::new(image) })
    }

    pub fn len(&self) -> u64 {
        self.shared().size()
    }

    pub fn read(&self, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVectorMut::from_volatile_slice(slices);
        self.shared().readv(buffers, offset)
    }

    pub fn write(&self, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVector::from_volatile_slice(slices);
        self.shared().writev(buffers, offset)
    }

    pub fn flush(&self) -> io::Result<()> {
        let image = self.shared();
        // Tables to the file, then file to the medium.
        image.flush()?;
        image.sync()
    }

    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.alone().discard_to_zero(offset, len)
    }

    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            self.alone().discard_to_zero(offset, len)
        } else {
            self.shared().write_zeroes(offset, len)
        }
    }

    // A worker that panicked left no more behind than one that was killed: the format survives that.
    fn shared(&self) -> RwLockReadGuard<'_, Format> {
        self.image.read().unwrap_or_else(|e| e.into_inner())
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Format> {
        self.image.write().unwrap_or_else(|e| e.into_inner())
    }
}

/// The files opened so far, by device and inode.
#[derive(Default)]
struct Chain(Vec<(u64, u64)>);

impl Chain {
    fn open_qcow2(&mut self, file: File, path: &Path, writable: bool) -> Result<Format, DiskError> {
        let bad = |source| DiskError::BadQcow2 { path: path.to_owned(), source };
        self.remember(path, &file)?;
        check_header(&file, file_len(path, &file)?).map_err(bad)?;
        let options = StorageOpenOptions::new().filename(path).write(writable);
        let storage = ImagoFile::from_open_file(file, options).map_err(bad)?;
        let mut image: Qcow2<ImagoFile> = Qcow2::open_image(storage, writable).map_err(bad)?;
        if image.requires_external_data_file() {
            return Err(DiskError::ExternalData(path.to_owned()));
        }
        let backing = match image.implicit_backing_file() {
            Some(name) => {
                Some(self.open_backing(path, name, image.implicit_backing_format().map(String::as_str))?)
            }
            None => None,
        };
        image.set_data_file(None);
        image.set_backing(backing);
        Ok(FormatAccess::new(image))
    }

    fn open_backing(&mut self, image: &Path, name: &str, format: Option<&str>) -> Result<Format, DiskError> {
        let name = name.strip_prefix("file:").unwrap_or(name);
        // Relative to the image that names it; an absolute name replaces the folder.
        let path = image.parent().unwrap_or(Path::new("")).join(name);
        let is_qcow2 = match format {
            Some("qcow2") => true,
            Some("raw" | "file") => false,
            other => {
                let format = other.unwrap_or("nothing").to_owned();
                return Err(DiskError::BackingFormat { image: image.to_owned(), format });
            }
        };
        if self.0.len() > MAX_BACKING_FILES {
            return Err(DiskError::BackingTooDeep(image.to_owned()));
        }
        self.check_new(image, &path)?;
        let file = open_locked(&path, false).map_err(|error| match error {
            DiskError::NotFound(backing) => DiskError::BackingNotFound { image: image.to_owned(), backing },
            other => other,
        })?;
        if is_qcow2 {
            return self.open_qcow2(file, &path, false);
        }
        let bad = |source| DiskError::Host { action: "open backing file", path: path.clone(), source };
        let storage =
            ImagoFile::from_open_file(file, StorageOpenOptions::new().filename(&path)).map_err(bad)?;
        let raw: Raw<ImagoFile> = Raw::builder(storage).open(DenyImplicitOpenGate::default()).map_err(bad)?;
        Ok(FormatAccess::new(raw))
    }

    /// Before the file is opened: the lock on an image that backs itself would else be the error that is reported.
    fn check_new(&self, image: &Path, path: &PathBuf) -> Result<(), DiskError> {
        match std::fs::metadata(path) {
            Ok(metadata) if self.0.contains(&(metadata.dev(), metadata.ino())) => {
                Err(DiskError::BackingCycle { image: image.to_owned(), backing: path.clone() })
            }
            _ => Ok(()),
        }
    }

    fn remember(&mut self, path: &Path, file: &File) -> Result<(), DiskError> {
        let host = |source| DiskError::Host { action: "look at disk image", path: path.to_owned(), source };
        let metadata = file.metadata().map_err(host)?;
        self.0.push((metadata.dev(), metadata.ino()));
        Ok(())
    }
}

/// Looks at what imago takes on trust: tables that lie outside the file, which a truncated image shows first, would be
/// read as zeros and pass for an empty disk; an encrypted image would show its cipher text; a feature name table of a
/// broken length makes imago 0.2.6 panic.
///
/// Offsets are those of QEMU's docs/interop/qcow2.txt.
fn check_header(file: &File, len: u64) -> io::Result<()> {
    let header = Header::read(file)?;
    let cluster_bits = header.u32_at(20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(invalid("its cluster size is not between 512 bytes and 2 MiB"));
    }
    let cluster = 1 << cluster_bits;
    if header.u32_at(32) != 0 {
        return Err(invalid("it is encrypted, which is not supported"));
    }
    let inside = |offset: u64, bytes: u64| offset.checked_add(bytes).is_some_and(|end| end <= len);
    let (l1_entries, l1_offset) = (u64::from(header.u32_at(36)), header.u64_at(40));
    // 32 MiB of L1 table is what QEMU takes.
    if l1_entries > (32 << 20) / 8 || !inside(l1_offset, l1_entries * 8) {
        return Err(invalid("its L1 table is not in the file"));
    }
    if !inside(header.u64_at(48), u64::from(header.u32_at(56)) * cluster) {
        return Err(invalid("its refcount table is not in the file"));
    }
    let mut l1 = vec![0; l1_entries as usize * 8];
    file.read_exact_at(&mut l1, l1_offset)?;
    let l2_offsets =
        l1.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().expect("eight bytes")));
    if l2_offsets.map(|entry| entry & 0x00ff_ffff_ffff_fe00).any(|at| at != 0 && !inside(at, cluster)) {
        return Err(invalid("an L2 table is not in the file"));
    }
    if header.u32_at(4) >= 3 { check_extensions(file, header.u32_at(100).into(), cluster) } else { Ok(()) }
}

/// The header extensions from `at` on, which end within the first cluster.
fn check_extensions(file: &File, mut at: u64, cluster: u64) -> io::Result<()> {
    const FEATURE_NAMES: u32 = 0x6803_f857;
    const FEATURE_NAME_LEN: u32 = 48;
    while at + 8 <= cluster {
        let mut extension = [0; 8];
        file.read_exact_at(&mut extension, at)?;
        let [k0, k1, k2, k3, len @ ..] = extension;
        let (kind, len) = (u32::from_be_bytes([k0, k1, k2, k3]), u32::from_be_bytes(len));
        if kind == 0 {
            return Ok(());
        }
        if kind == FEATURE_NAMES && !len.is_multiple_of(FEATURE_NAME_LEN) {
            return Err(invalid("its table of feature names has a wrong length"));
        }
        at += 8 + u64::from(len).next_multiple_of(8);
    }
    Err(invalid("its header extensions do not end within the first cluster"))
}

/// The fixed fields of a header, version 3; zeros where version 2 ends.
struct Header([u8; 104]);

impl Header {
    fn read(file: &File) -> io::Result<Self> {
        let mut header = Self([0; 104]);
        file.read_exact_at(&mut header.0[..72], 0)?;
        if header.u32_at(4) >= 3 {
            file.read_exact_at(&mut header.0[72..], 72)?;
        }
        Ok(header)
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
