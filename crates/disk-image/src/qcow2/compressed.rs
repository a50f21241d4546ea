//! Compressed clusters: imago does all but to unpack them.
//!
//! imago 0.2.6 does not know zstd, and takes the buffer that it unpacks deflate into for a ring: a stream that refers to what is
//! before its beginning is given what the end of the buffer held, which is memory of this process.
//!
//! imago says which clusters are compressed; where, this looks up in the file. That is right because imago never changes an
//! entry of a compressed cluster but to replace it, and links a table at once; and because nothing is written to such an image while
//! it is read (see [`super::Qcow2Disk`]).

#![allow(unsafe_code)] // UNSAFETY: methods of imago's trait that are unsafe, passed on.

use super::check::L2Entry;
use super::header::{Compression, Header};
use super::storage::Guarded;
use imago::format::drivers::FormatDriverInstance;
use imago::format::{Format, PreallocateMode};
use imago::io_buffers::IoVectorMut;
use imago::qcow2::Qcow2;
use imago::{PreparedDataMapping, ShallowMapping, StorageExt};
use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;

#[derive(Debug)]
pub struct CompressedImage {
    inner: Qcow2<Guarded>,
    storage: Guarded,
    header: Arc<Header>,
}

impl CompressedImage {
    /// `inner` is on `storage`, whose header is `header`.
    pub fn new(inner: Qcow2<Guarded>, storage: Guarded, header: Arc<Header>) -> Self {
        Self { inner, storage, header }
    }

    fn cluster(&self) -> u64 {
        self.header.cluster()
    }

    /// The cluster of the disk at `offset`, unpacked; `None` if it is not compressed.
    fn unpack(&self, offset: u64) -> io::Result<Option<Vec<u8>>> {
        let Some(L2Entry::Compressed { offset, len }) = self.look_up(offset)? else { return Ok(None) };
        let mut packed = vec![0; len as usize];
        self.storage.read(&mut packed[..], offset)?;
        let mut data = vec![0; self.cluster() as usize];
        match self.header.compression {
            Some(Compression::Deflate) => inflate(&packed, &mut data)?,
            _ => unpack_zstd(&packed, &mut data)?,
        }
        Ok(Some(data))
    }

    fn look_up(&self, offset: u64) -> io::Result<Option<L2Entry>> {
        let index = offset / self.cluster();
        let (l1_index, l2_index) = (index / self.header.l2_entries(), index % self.header.l2_entries());
        if l1_index >= self.header.l1_entries {
            return Ok(None);
        }
        let mut entry = [0; 8];
        self.storage.read(&mut entry[..], self.storage.l1_offset() + l1_index * 8)?;
        let table = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
        if table == 0 {
            return Ok(None);
        }
        self.storage.read(&mut entry[..], table + l2_index * 8)?;
        let entry = L2Entry::decode(u64::from_be_bytes(entry), &self.header);
        entry.map(Some).map_err(|fault| io::Error::new(io::ErrorKind::InvalidData, fault))
    }

    /// Turns the compressed cluster at `offset` into a plain one.
    fn expand(&self, offset: u64) -> io::Result<()> {
        let Some(data) = self.unpack(offset)? else { return Ok(()) };
        let mapping = self.inner.prepare_data_mapping(offset, self.cluster(), true)?;
        if mapping.length() != self.cluster() {
            return Err(io::Error::other("a compressed cluster could not be replaced as a whole"));
        }
        mapping.storage().write(&data[..], mapping.offset())?;
        self.inner.commit_data_mapping(mapping)
    }

    fn is_compressed(&self, offset: u64) -> io::Result<bool> {
        let (mapping, _) = self.inner.get_mapping(offset, 1)?;
        Ok(matches!(mapping, ShallowMapping::Special { .. }))
    }
}

/// Fills `data` from a deflate stream at the beginning of `packed`, without the header that zlib puts before it.
fn inflate(packed: &[u8], data: &mut [u8]) -> io::Result<()> {
    use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
    let mut state = Box::<DecompressorOxide>::default();
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    // The stream may go on behind the end of the cluster, as far as the last sector does.
    let (status, _, written) = decompress(&mut state, packed, data, 0, flags);
    if written == data.len() {
        Ok(())
    } else {
        Err(bad(format!("a compressed cluster is damaged: {status:?}")))
    }
}

fn unpack_zstd(packed: &[u8], data: &mut [u8]) -> io::Result<()> {
    let decoder = ruzstd::decoding::StreamingDecoder::new(packed);
    decoder.map_err(|e| bad(format!("a compressed cluster is damaged: {e}")))?.read_exact(data)
}

fn bad(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl FormatDriverInstance for CompressedImage {
    type Storage = Guarded;

    fn format(&self) -> Format {
        self.inner.format()
    }

    unsafe fn probe(storage: &Guarded) -> io::Result<bool> {
        // SAFETY: the caller's promise, passed on.
        unsafe { Qcow2::<Guarded>::probe(storage) }
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn zero_granularity(&self) -> Option<u64> {
        self.inner.zero_granularity()
    }

    fn collect_storage_dependencies(&self) -> Vec<&Guarded> {
        self.inner.collect_storage_dependencies()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn get_mapping<'a>(
        &'a self,
        offset: u64,
        max_length: u64,
    ) -> io::Result<(ShallowMapping<'a, Guarded>, u64)> {
        self.inner.get_mapping(offset, max_length)
    }

    fn prepare_data_mapping<'a>(
        &'a self,
        offset: u64,
        length: u64,
        overwrite: bool,
    ) -> io::Result<PreparedDataMapping<'a, Guarded>> {
        // A compressed cluster that is overwritten as a whole need not be unpacked; imago would have to unpack the others.
        let end = offset + length;
        let mut cluster = offset - offset % self.cluster();
        while cluster < end {
            let is_whole = overwrite && cluster >= offset && cluster + self.cluster() <= end;
            if !is_whole && self.is_compressed(cluster)? {
                self.expand(cluster)?;
            }
            cluster += self.cluster();
        }
        self.inner.prepare_data_mapping(offset, length, overwrite)
    }

    fn commit_data_mapping(&self, mapping: PreparedDataMapping<'_, Guarded>) -> io::Result<()> {
        self.inner.commit_data_mapping(mapping)
    }

    fn ensure_zero_mapping(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.inner.ensure_zero_mapping(offset, length)
    }

    unsafe fn discard_to_zero_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.inner.discard_to_zero_unsafe(offset, length) }
    }

    fn readv_special(&self, mut bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        while !bufv.is_empty() {
            let within = offset % self.cluster();
            let Some(data) = self.unpack(offset - within)? else {
                return Err(io::Error::other(format!(
                    "the cluster at {offset:#x} is not compressed any more"
                )));
            };
            let part = bufv.len().min(self.cluster() - within);
            let (mut now, rest) = bufv.split_at(part);
            now.copy_from_slice(&data[within as usize..(within + part) as usize]);
            bufv = rest;
            offset += part;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resize_grow(&self, _: u64, _: PreallocateMode) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resize_shrink(&mut self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl fmt::Display for CompressedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.inner, f)
    }
}
