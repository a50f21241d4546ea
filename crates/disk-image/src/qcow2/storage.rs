//! The file of a qcow2 image as imago sees it.
//!
//! It shows imago a header that it accepts (see [`Shown`]), lets nothing but imago's own updates into the header's cluster, and
//! keeps the order of imago's updates sound if the process is killed between them: imago 0.2.6 links a new table at once, but
//! writes the refcount of its cluster with the next flush.

#![allow(unsafe_code)] // UNSAFETY: imago's storage methods are unsafe, and call each other.

use super::check::refcount;
use super::header::{Header, V2_LEN, field, u64_at};
use imago::file::File as ImagoFile;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt, StorageOpenOptions};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What imago sees in place of what the header says.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Of the disk. Of an image that is written to it is whole clusters: imago then never has to copy a part of the last one.
    pub size: u64,
}

/// An image's file. Clones share it.
#[derive(Clone, Debug)]
pub struct Guarded(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: ImagoFile,
    shown: Shown,
    /// As the file has it.
    size: u64,
    cluster: u64,
    refcount_order: u32,
    tables: Mutex<Places>,
    /// The header has auto-clear features, which the first write must clear: nothing here keeps them true.
    autoclear: AtomicBool,
}

/// Where the tables are whose entries imago links at once: offset and bytes.
#[derive(Clone, Copy, Debug)]
struct Places {
    l1: (u64, u64),
    refcounts: (u64, u64),
}

impl Guarded {
    pub fn new(file: ImagoFile, header: &Header, shown: Shown) -> Self {
        let tables = Mutex::new(Places {
            l1: (header.l1_offset, header.l1_entries * 8),
            refcounts: (header.refcount_table_offset, header.refcount_table_clusters * header.cluster()),
        });
        let (size, cluster, refcount_order) = (header.size, header.cluster(), header.refcount_order);
        let autoclear = AtomicBool::new(header.autoclear != 0);
        Self(Arc::new(Inner { file, shown, size, cluster, refcount_order, tables, autoclear }))
    }

    /// A raw image that is only read, as it is.
    pub fn plain(file: ImagoFile) -> Self {
        let tables = Mutex::new(Places { l1: (0, 0), refcounts: (0, 0) });
        let (shown, autoclear) = (Shown { size: 0 }, AtomicBool::new(false));
        Self(Arc::new(Inner { file, shown, size: 0, cluster: 0, refcount_order: 0, tables, autoclear }))
    }

    /// Where the L1 table is now.
    pub fn l1_offset(&self) -> u64 {
        self.places().l1.0
    }

    fn places(&self) -> Places {
        *self.0.tables.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The header with what is shown of it; the rest of `bytes`, which begin at `offset`, as they are.
    fn show(&self, bytes: &mut [u8], offset: u64) {
        put(bytes, offset, field::SIZE, &self.0.shown.size.to_be_bytes());
        // What is in these was looked at before; imago 0.2.6 knows none of it, and would rewrite the whole header for the last.
        put(bytes, offset, field::INCOMPATIBLE, &[0; 8]);
        put(bytes, offset, field::AUTOCLEAR, &[0; 8]);
    }

    /// imago's update of the header: the fields of version 2, at offset 0.
    fn write_header(&self, bufv: &IoVector<'_>, offset: u64) -> io::Result<()> {
        if offset != 0 || bufv.len() != V2_LEN as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a write would have gone over the image's header",
            ));
        }
        let mut header = [0; V2_LEN];
        bufv.copy_into_slice(&mut header);
        put(&mut header, 0, field::SIZE, &self.0.size.to_be_bytes());
        self.0.file.write(&header[..], 0)?;
        let places = Places {
            l1: (u64_at(&header, 40), (u64_at(&header, 36) >> 32) * 8),
            refcounts: (
                u64_at(&header, field::REFCOUNT_TABLE_OFFSET as usize),
                (u64_at(&header, 56) >> 32) * self.0.cluster,
            ),
        };
        *self.0.tables.lock().unwrap_or_else(|e| e.into_inner()) = places;
        Ok(())
    }

    /// Before the table in the cluster at `target` is linked, its refcount is in the file.
    fn count_first(&self, target: u64) -> io::Result<()> {
        let per_block = (self.0.cluster * 8) >> self.0.refcount_order;
        let index = target / self.0.cluster;
        let (table, bytes) = self.places().refcounts;
        let entry = index / per_block * 8;
        if entry >= bytes {
            return Ok(());
        }
        let mut block = [0; 8];
        self.0.file.read(&mut block[..], table + entry)?;
        let block = u64::from_be_bytes(block);
        if block == 0 {
            // A new refcount block that counts itself, and is about to be linked.
            return Ok(());
        }
        let index = (index % per_block) as usize;
        let bits = 1 << self.0.refcount_order;
        // The bytes of the one refcount, or the byte that has it.
        let len = (bits / 8).max(1);
        let at = block + (index * bits / 8) as u64;
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..len];
        self.0.file.read(&mut *bytes, at)?;
        let within = index % (8 / bits).max(1);
        if refcount(bytes, within, self.0.refcount_order) != 0 {
            return Ok(());
        }
        match bytes {
            [byte] => *byte |= 1 << (within * bits % 8),
            [.., last] => *last = 1,
            [] => {}
        }
        self.0.file.write(&*bytes, at)
    }
}

/// Puts `value`, which the file has at `field`, into `bytes`, which the file has at `offset`, as far as they overlap.
fn put(bytes: &mut [u8], offset: u64, field: u64, value: &[u8]) {
    for (at, byte) in (field..).zip(value) {
        if let Some(index) = at.checked_sub(offset)
            && let Some(place) = bytes.get_mut(index as usize)
        {
            *place = *byte;
        }
    }
}

fn is_within((start, len): (u64, u64), offset: u64) -> bool {
    offset >= start && offset - start < len
}

impl Storage for Guarded {
    fn open(_: StorageOpenOptions) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn mem_align(&self) -> usize {
        self.0.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.0.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.0.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.0.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.0.file.size()
    }

    unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        if offset >= self.0.cluster {
            // SAFETY: the caller's promise, passed on: the alignments are the same.
            return unsafe { self.0.file.pure_readv(bufv, offset) };
        }
        let mut bytes = vec![0; bufv.len() as usize];
        self.0.file.read(&mut bytes[..], offset)?;
        self.show(&mut bytes, offset);
        bufv.copy_from_slice(&bytes);
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.clear_features()?;
        if offset < self.0.cluster {
            return self.write_header(&bufv, offset);
        }
        let places = self.places();
        if bufv.len() == 8 && (is_within(places.l1, offset) || is_within(places.refcounts, offset)) {
            let mut entry = [0; 8];
            bufv.copy_into_slice(&mut entry);
            let target = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
            if target != 0 {
                self.count_first(target)?;
            }
        }
        // SAFETY: the caller's promise, passed on: the alignments are the same, and so are the write blockers.
        unsafe { self.0.file.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_data(offset)?;
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_data(offset)?;
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_data(offset)?;
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.0.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.0.file.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.0.file.get_storage_helper()
    }
}

impl Guarded {
    fn clear_features(&self) -> io::Result<()> {
        if self.0.autoclear.load(Ordering::Relaxed) {
            self.0.file.write(&[0; 8][..], field::AUTOCLEAR)?;
            self.0.autoclear.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    fn check_data(&self, offset: u64) -> io::Result<()> {
        self.clear_features()?;
        if offset < self.0.cluster {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "zeros would have gone over the image's header",
            ));
        }
        Ok(())
    }
}

impl fmt::Display for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.file, f)
    }
}
