//! A qcow2 image with its backing files, through `imago`.
//!
//! The chain is opened here, file by file, and not by imago: that way each file is one that the user named, is locked and checked,
//! cycles are found, and a format is never guessed from what a guest may have written.

mod check;
mod compressed;
mod header;
mod storage;
#[cfg(test)]
mod tests;

use crate::open::{file_len, open_locked};
use crate::{DiskError, Fault, GuestSlice, MAX_BACKING_FILES};
use check::Verdict;
use compressed::CompressedImage;
use header::{Header, incompatible};
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions, file::File as ImagoFile};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use storage::{Guarded, Shown};

type Format = FormatAccess<Guarded>;

#[derive(Debug)]
pub struct Qcow2Disk {
    /// Shared by requests; a discard has it alone, because it takes clusters away that others may be using, and so does a range of
    /// zeros, because imago 0.2.6 looks at the rest of a cluster before it makes the whole one zero.
    image: RwLock<Format>,
    /// Bytes, in whole sectors.
    len: u64,
    /// Writes have the image alone too: where compressed data are must not change while they are read.
    has_compressed: bool,
    /// Zeros are written as bytes, and discards do nothing: version 2 has no other way.
    is_version_2: bool,
}

impl Qcow2Disk {
    /// Opens `file`, locked already, and every backing file behind it, which are those that the user `named`, in order.
    pub fn open(file: File, path: &Path, writable: bool, named: &[PathBuf]) -> Result<Self, DiskError> {
        let mut chain = Chain { seen: Vec::new(), named };
        let Opened { image, header, has_compressed } = chain.open_qcow2(file, path, writable)?;
        if let Some(given) = chain.named.first() {
            return Err(DiskError::NoBacking { image: path.to_owned(), given: given.clone() });
        }
        Ok(Self {
            image: RwLock::new(image),
            len: header.whole_sectors(),
            has_compressed,
            is_version_2: header.version < 3,
        })
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn read(&self, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVectorMut::from_volatile_slice(slices);
        self.shared().readv(buffers, offset)
    }

    pub fn write(&self, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVector::from_volatile_slice(slices);
        if self.has_compressed {
            self.alone().writev(buffers, offset)
        } else {
            self.shared().writev(buffers, offset)
        }
    }

    /// Tables to the file: what fails here is tried again by the next flush.
    pub fn write_tables(&self) -> io::Result<()> {
        self.shared().flush()
    }

    /// The file to the medium.
    pub fn sync(&self) -> io::Result<()> {
        self.shared().sync()
    }

    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_version_2 {
            return Ok(());
        }
        self.alone().discard_to_zero(offset, len)
    }

    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if self.is_version_2 {
            return self.write_zero_bytes(offset, len);
        }
        let mut image = self.alone();
        if unmap { image.discard_to_zero(offset, len) } else { image.write_zeroes(offset, len) }
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        while len > 0 {
            let part = len.min(ZEROS.len() as u64);
            self.alone().write(&ZEROS[..part as usize], offset)?;
            offset += part;
            len -= part;
        }
        Ok(())
    }

    // A worker that panicked left no more behind than one that was killed: the format survives that.
    fn shared(&self) -> RwLockReadGuard<'_, Format> {
        self.image.read().unwrap_or_else(|e| e.into_inner())
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Format> {
        self.image.write().unwrap_or_else(|e| e.into_inner())
    }
}

/// A qcow2 image with all behind it.
struct Opened {
    image: Format,
    header: Arc<Header>,
    has_compressed: bool,
}

/// Opens images until one has no backing file.
struct Chain<'a> {
    /// The files opened so far, by device and inode.
    seen: Vec<(u64, u64)>,
    /// Backing files that the user has named and that have not come yet.
    named: &'a [PathBuf],
}

impl Chain<'_> {
    fn open_qcow2(&mut self, file: File, path: &Path, writable: bool) -> Result<Opened, DiskError> {
        self.seen.push(identity(path, &file)?);
        let len = file_len(path, &file)?;
        let verdict = |verdict| refuse(path, verdict, false);
        let header = Arc::new(Header::read(&file).map_err(|e| verdict(e.into()))?);
        check_features(path, &header, writable)?;
        let has_compressed = check::structure(&file, &header, len).map_err(verdict)?;
        if writable {
            let leaked =
                check::soundness(&file, &header, len).map_err(|verdict| refuse(path, verdict, true))?;
            if leaked > 0 {
                let path = path.display();
                tracing::info!(
                    "{path}: {leaked} clusters are lost room, as a process that was killed leaves them: \
                     `qemu-img check -r leaks {path}` gives it back while no machine runs"
                );
            }
        }
        let backing = match &header.backing {
            Some(name) => Some(self.open_backing(path, name, header.backing_format.as_deref())?),
            None => None,
        };
        let host = |source| DiskError::Host { action: "open qcow2 image", path: path.to_owned(), source };
        let options = StorageOpenOptions::new().filename(path).write(writable);
        let file = ImagoFile::from_open_file(file, options).map_err(host)?;
        let size =
            if writable { header.size.next_multiple_of(header.cluster()) } else { header.whole_sectors() };
        let storage = Guarded::new(file, &header, Shown { size });
        let mut image: Qcow2<Guarded> = Qcow2::open_image(storage.clone(), writable).map_err(host)?;
        image.set_data_file(None);
        image.set_backing(backing);
        let image = if has_compressed {
            FormatAccess::new(CompressedImage::new(image, storage, Arc::clone(&header)))
        } else {
            FormatAccess::new(image)
        };
        Ok(Opened { image, header, has_compressed })
    }

    /// Opens what `image` gives as its backing file, by `name` and `format`, if the user named that file too.
    ///
    /// An overlay that Outboard itself makes, in the folder of its base, would be let through here; nothing makes such yet.
    fn open_backing(&mut self, image: &Path, name: &str, format: Option<&str>) -> Result<Format, DiskError> {
        let name = name.strip_prefix("file:").unwrap_or(name);
        if let Some(kind) = not_a_file(name) {
            return Err(DiskError::BackingName { image: image.to_owned(), name: name.to_owned(), kind });
        }
        let is_qcow2 = match format {
            Some("qcow2") => true,
            Some("raw" | "file" | "host_device") => false,
            None => return Err(DiskError::BackingFormatMissing(image.to_owned())),
            Some(other) => {
                return Err(DiskError::BackingFormat { image: image.to_owned(), format: other.to_owned() });
            }
        };
        // Relative to the image that names it; an absolute name replaces the folder.
        let backing = image.parent().unwrap_or(Path::new("")).join(name);
        if self.seen.len() > MAX_BACKING_FILES {
            return Err(DiskError::BackingTooDeep(image.to_owned()));
        }
        self.check_new(image, &backing)?;
        let Some((given, rest)) = self.named.split_first() else {
            return Err(DiskError::BackingNotAllowed { image: image.to_owned(), backing });
        };
        self.named = rest;
        // What is opened is the user's name; the image's is only compared, so that it does not matter what it leads to later.
        let file = open_locked(given, false).map_err(|error| match error {
            DiskError::NotFound(backing) => DiskError::BackingNotFound { image: image.to_owned(), backing },
            other => other,
        })?;
        let named = std::fs::metadata(&backing).map(|metadata| (metadata.dev(), metadata.ino()));
        if named.ok() != Some(identity(given, &file)?) {
            let (image, given) = (image.to_owned(), given.clone());
            return Err(DiskError::BackingDiffers { image, backing, given });
        }
        if is_qcow2 {
            return Ok(self.open_qcow2(file, given, false)?.image);
        }
        let host = |source| DiskError::Host { action: "open backing file", path: given.clone(), source };
        let storage =
            ImagoFile::from_open_file(file, StorageOpenOptions::new().filename(given)).map_err(host)?;
        let raw: Raw<Guarded> = Raw::open_image(Guarded::plain(storage), false).map_err(host)?;
        Ok(FormatAccess::new(raw))
    }

    /// Before the file is opened: the lock on an image that backs itself would else be the error that is reported.
    fn check_new(&self, image: &Path, backing: &Path) -> Result<(), DiskError> {
        match std::fs::metadata(backing) {
            Ok(metadata) if self.seen.contains(&(metadata.dev(), metadata.ino())) => {
                Err(DiskError::BackingCycle { image: image.to_owned(), backing: backing.to_owned() })
            }
            _ => Ok(()),
        }
    }
}

fn identity(path: &Path, file: &File) -> Result<(u64, u64), DiskError> {
    let host = |source| DiskError::Host { action: "look at disk image", path: path.to_owned(), source };
    let metadata = file.metadata().map_err(host)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// What the name of a backing file is, if it is not that of a file. As in QEMU: a colon before any slash.
fn not_a_file(name: &str) -> Option<String> {
    if name.starts_with("json:") {
        return Some("a JSON description".into());
    }
    let (scheme, _) = name.split_once(':')?;
    if scheme.contains('/') { None } else { Some(format!("something to be reached by '{scheme}:'")) }
}

/// Features that stand against opening the image, each with the command that helps.
fn check_features(path: &Path, header: &Header, writable: bool) -> Result<(), DiskError> {
    let has = |bit| header.incompatible & bit != 0;
    let (image, shown) = (path.to_owned(), path.display());
    let unsupported =
        |feature: String, help: String| Err(DiskError::Unsupported { path: image.clone(), feature, help });
    if has(incompatible::CORRUPT) && writable {
        return Err(DiskError::MarkedCorrupt(image));
    }
    if has(incompatible::DIRTY) && writable {
        return Err(DiskError::Dirty(image));
    }
    if has(incompatible::EXTERNAL_DATA) {
        let data_file = header.data_file.clone().unwrap_or_else(|| "it does not say which".into());
        return Err(DiskError::ExternalData { image, data_file });
    }
    if header.encrypted {
        return unsupported(
            "is encrypted".into(),
            format!(
                "decrypt it with `qemu-img convert --object secret,id=key,file=PASSWORD_FILE --image-opts \
                 driver=qcow2,encrypt.key-secret=key,file.filename={shown} -O qcow2 new.qcow2`"
            ),
        );
    }
    if has(incompatible::EXTENDED_L2) {
        return unsupported(
            "has extended L2 entries".into(),
            format!("convert it with `qemu-img convert -O qcow2 -o extended_l2=off {shown} new.qcow2`"),
        );
    }
    let unknown = header.unknown_features();
    if !unknown.is_empty() {
        return unsupported(
            format!("has unknown incompatible features: {unknown}"),
            format!("convert it with a QEMU that knows them: `qemu-img convert -O qcow2 {shown} new.qcow2`"),
        );
    }
    if header.compression.is_none() {
        return unsupported(
            "is compressed in an unknown way".into(),
            format!("convert it with `qemu-img convert -O qcow2 {shown} new.qcow2`"),
        );
    }
    Ok(())
}

fn refuse(path: &Path, verdict: Verdict, for_writing: bool) -> DiskError {
    let path = path.to_owned();
    match verdict {
        Verdict::Fault(source) if for_writing => DiskError::Unsound { path, source },
        Verdict::Fault(source) => DiskError::Damaged { path, source },
        Verdict::TooLarge(source) => DiskError::TooLarge { path, source },
        Verdict::Io(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
            DiskError::Damaged { path, source: Fault("it became shorter while it was read".into()) }
        }
        Verdict::Io(source) => DiskError::Host { action: "read qcow2 image", path, source },
    }
}
