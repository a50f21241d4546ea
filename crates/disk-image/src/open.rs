//! Files and block devices are opened once, looked at through that descriptor, and locked.

use crate::{DiskError, device, lock};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

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

/// Opens a file or block device and locks it: exclusively to write, shared to read.
pub fn open_locked(path: &Path, writable: bool) -> Result<File, DiskError> {
    let host = |action, source| DiskError::Host { action, path: path.to_owned(), source };
    // Before it is opened: to open a device can do something.
    check_kind(path, &std::fs::metadata(path).map_err(|e| not_seen(path, e))?, writable)?;
    let mut by = lock::BY_OUTBOARD;
    for attempt in 0..lock::TRIES {
        if attempt > 0 {
            std::thread::sleep(lock::PAUSE);
        }
        let Some(file) = open(path, writable, attempt + 1 == lock::TRIES)? else { continue };
        match lock::lock(&file, writable).map_err(|e| host("lock disk image", e))? {
            None => return Ok(file),
            Some(other) => by = other,
        }
    }
    Err(DiskError::InUse { path: path.to_owned(), by })
}

/// One attempt; `None` for a block device that is taken, unless it is the last attempt.
fn open(path: &Path, writable: bool, last: bool) -> Result<Option<File>, DiskError> {
    let host = |action, source| DiskError::Host { action, path: path.to_owned(), source };
    let is_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    // Without O_NONBLOCK, a pipe put in the file's place would be waited for.
    let options = |flags| {
        let mut options = OpenOptions::new();
        options.read(true).write(writable).custom_flags(libc::O_NONBLOCK | flags);
        options
    };
    // O_EXCL on Linux: not if the host has mounted it, its whole disk or a part of it.
    let exclusive = if is_device && cfg!(target_os = "linux") { libc::O_EXCL } else { 0 };
    let opened = options(exclusive).open(path);
    let opened = match opened {
        // Several may read: having seen that nobody else has it, this reader lets it free again.
        Ok(file) if exclusive != 0 && !writable => {
            drop(file);
            options(0).open(path)
        }
        other => other,
    };
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::ResourceBusy && is_device => {
            if !last {
                return Ok(None);
            }
            let metadata = std::fs::metadata(path).map_err(|e| not_seen(path, e))?;
            return Err(DiskError::DeviceInUse { path: path.to_owned(), by: device::users(&metadata) });
        }
        Err(e) => return Err(not_opened(path, is_device, e)),
    };
    // From here on what counts is what was opened, not what the path names now.
    let metadata = file.metadata().map_err(|e| host("look at disk image", e))?;
    check_kind(path, &metadata, writable)?;
    if writable && metadata.file_type().is_block_device() {
        let read_only = device::is_read_only(&file).map_err(|e| host("look at block device", e))?;
        if read_only {
            return Err(DiskError::ReadOnlyDevice(path.to_owned()));
        }
    }
    Ok(Some(file))
}

/// Only files and block devices are disks.
fn check_kind(path: &Path, metadata: &Metadata, writable: bool) -> Result<(), DiskError> {
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
    Ok(())
}

fn not_seen(path: &Path, error: io::Error) -> DiskError {
    match error.kind() {
        io::ErrorKind::NotFound => DiskError::NotFound(path.to_owned()),
        io::ErrorKind::PermissionDenied => DiskError::Permission(path.to_owned()),
        _ => DiskError::Host { action: "look at disk image", path: path.to_owned(), source: error },
    }
}

fn not_opened(path: &Path, is_device: bool, error: io::Error) -> DiskError {
    match error.kind() {
        // Linux says EACCES or EROFS, by version, of a block device that takes no writes.
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if File::open(path).is_ok() => {
            if is_device {
                DiskError::ReadOnlyDevice(path.to_owned())
            } else {
                DiskError::ReadOnly(path.to_owned())
            }
        }
        io::ErrorKind::PermissionDenied => DiskError::Permission(path.to_owned()),
        _ => DiskError::Host { action: "open disk image", path: path.to_owned(), source: error },
    }
}

/// Length of a file or block device.
pub fn file_len(path: &Path, mut file: &File) -> Result<u64, DiskError> {
    file.seek(SeekFrom::End(0)).map_err(|source| DiskError::Host {
        action: "find the size of disk image",
        path: path.to_owned(),
        source,
    })
}

/// Raw or qcow2, see [`DiskFormat::Auto`].
pub fn detect(path: &Path, file: &File, format: DiskFormat) -> Result<DiskFormat, DiskError> {
    if format != DiskFormat::Auto {
        return Ok(format);
    }
    let mut magic = [0; 4];
    let has_magic = file.read_exact_at(&mut magic, 0).is_ok() && &magic == b"QFI\xfb";
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    match extension.as_deref() {
        Some("qcow2" | "qcow") if has_magic => Ok(DiskFormat::Qcow2),
        Some("qcow2" | "qcow") => Err(DiskError::NotQcow2(path.to_owned())),
        Some(other) if is_foreign(other) => {
            Err(DiskError::UnknownFormat { path: path.to_owned(), format: other.to_owned() })
        }
        _ if has_magic => Err(DiskError::LooksLikeQcow2(path.to_owned())),
        _ => Ok(DiskFormat::Raw),
    }
}

/// A format of another program, by its name or by the usual ending of its files.
fn is_foreign(format: &str) -> bool {
    matches!(
        format,
        "vmdk" | "vdi" | "vhd" | "vhdx" | "vpc" | "qed" | "dmg" | "parallels" | "hdd" | "bochs" | "cloop"
    )
}
