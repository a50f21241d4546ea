//! The header of a qcow2 image and its extensions (QEMU's docs/interop/qcow2.txt, from which the offsets are).

use crate::{Fault, SECTOR};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bits of the incompatible features.
pub mod incompatible {
    pub const DIRTY: u64 = 1 << 0;
    pub const CORRUPT: u64 = 1 << 1;
    pub const EXTERNAL_DATA: u64 = 1 << 2;
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
}

/// Auto-clear feature: the bitmaps extension is up to date.
const AUTOCLEAR_BITMAPS: u64 = 1 << 0;

/// Offsets of fields that are looked at or changed while an image is open.
pub mod field {
    pub const SIZE: u64 = 24;
    pub const REFCOUNT_TABLE_OFFSET: u64 = 48;
    pub const INCOMPATIBLE: u64 = 72;
    pub const AUTOCLEAR: u64 = 88;
}

/// Bytes of a header of version 2, and the least of version 3.
pub const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// Largest tables that QEMU takes: 32 MiB of L1 table, 8 MiB of refcount table.
pub const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most snapshots that QEMU takes.
const MAX_SNAPSHOTS: u32 = 65_536;
/// Longest name of a backing file.
const MAX_BACKING_NAME: u32 = 1023;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Deflate,
    Zstd,
}

/// What a header says, in its own bounds; nothing it points to has been looked at.
#[derive(Debug)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Of the disk, in bytes.
    pub size: u64,
    pub encrypted: bool,
    pub l1_offset: u64,
    pub l1_entries: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u64,
    pub refcount_order: u32,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub autoclear: u64,
    /// `None` for a number that is not known.
    pub compression: Option<Compression>,
    pub backing: Option<String>,
    pub backing_format: Option<String>,
    pub data_file: Option<String>,
    /// Of unknown incompatible features, as the image names them.
    feature_names: Vec<(u8, String)>,
    has_bitmaps: bool,
}

fn fault<T>(what: impl Into<String>) -> Result<T, io::Error> {
    Err(io::Error::new(io::ErrorKind::InvalidData, Fault(what.into())))
}

impl Header {
    /// Reads the header of `file`. A [`Fault`] comes within an error of kind `InvalidData`.
    pub fn read(file: &File) -> io::Result<Self> {
        let mut fixed = [0; V3_LEN + 8];
        read_or_fault(file, &mut fixed[..V2_LEN], 0)?;
        let version = u32_at(&fixed, 4);
        if !(2..=3).contains(&version) {
            return fault(format!("it has version {version}; known are 2 and 3"));
        }
        if version == 3 {
            read_or_fault(file, &mut fixed[V2_LEN..V3_LEN], V2_LEN as u64)?;
        }
        let cluster_bits = u32_at(&fixed, 20);
        if !(9..=21).contains(&cluster_bits) {
            return fault("its cluster size is not between 512 bytes and 2 MiB");
        }
        let mut header = Self {
            version,
            cluster_bits,
            size: u64_at(&fixed, field::SIZE as usize),
            encrypted: u32_at(&fixed, 32) != 0,
            l1_entries: u32_at(&fixed, 36).into(),
            l1_offset: u64_at(&fixed, 40),
            refcount_table_offset: u64_at(&fixed, field::REFCOUNT_TABLE_OFFSET as usize),
            refcount_table_clusters: u32_at(&fixed, 56).into(),
            refcount_order: 4,
            snapshots: u32_at(&fixed, 60),
            snapshots_offset: u64_at(&fixed, 64),
            incompatible: 0,
            autoclear: 0,
            compression: Some(Compression::Deflate),
            backing: None,
            backing_format: None,
            data_file: None,
            feature_names: Vec::new(),
            has_bitmaps: false,
        };
        let mut len = V2_LEN as u64;
        if version == 3 {
            len = header.read_version_3(file, &mut fixed)?;
        }
        let backing = (u64_at(&fixed, 8), u32_at(&fixed, 16));
        header.read_extensions(file, len, backing.0)?;
        header.read_backing(file, backing)?;
        header.check()?;
        Ok(header)
    }

    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters that one L2 table maps.
    pub fn l2_entries(&self) -> u64 {
        self.cluster() / 8
    }

    /// Bytes of the disk, in whole sectors: QEMU cuts off what is beyond the last one.
    pub fn whole_sectors(&self) -> u64 {
        self.size - self.size % SECTOR
    }

    /// The unknown incompatible features, with their names where the image has some; empty if there are none.
    pub fn unknown_features(&self) -> String {
        let unknown = self.incompatible & !incompatible::KNOWN;
        let mut names = Vec::new();
        for bit in (0..64u8).filter(|bit| unknown & (1 << bit) != 0) {
            match self.feature_names.iter().find(|(number, _)| *number == bit) {
                Some((_, name)) => names.push(format!("{bit} ({name})")),
                None => names.push(bit.to_string()),
            }
        }
        names.join(", ")
    }

    /// Writing would make the image's dirty bitmaps wrong.
    pub fn has_live_bitmaps(&self) -> bool {
        self.has_bitmaps && self.autoclear & AUTOCLEAR_BITMAPS != 0
    }

    /// The fields that version 3 has beyond those of version 2; the header's length.
    fn read_version_3(&mut self, file: &File, fixed: &mut [u8]) -> io::Result<u64> {
        self.incompatible = u64_at(fixed, field::INCOMPATIBLE as usize);
        self.autoclear = u64_at(fixed, field::AUTOCLEAR as usize);
        self.refcount_order = u32_at(fixed, 96);
        let len = u64::from(u32_at(fixed, 100));
        if len < V3_LEN as u64 || len > self.cluster() {
            return fault(format!("its header has a wrong length ({len} bytes)"));
        }
        let mut kind = 0;
        if len > V3_LEN as u64 {
            read_or_fault(file, &mut fixed[V3_LEN..=V3_LEN], V3_LEN as u64)?;
            kind = fixed[V3_LEN];
        }
        if (self.incompatible & incompatible::COMPRESSION_TYPE != 0) != (kind != 0) {
            return fault("its header contradicts itself about how clusters are compressed");
        }
        self.compression = match kind {
            0 => Some(Compression::Deflate),
            1 => Some(Compression::Zstd),
            _ => None,
        };
        Ok(len)
    }

    /// The header extensions from `at` on, which end within the first cluster, before the name of the backing file.
    fn read_extensions(&mut self, file: &File, mut at: u64, backing_offset: u64) -> io::Result<()> {
        const END: u32 = 0;
        const BACKING_FORMAT: u32 = 0xe279_2aca;
        const FEATURE_NAMES: u32 = 0x6803_f857;
        const FEATURE_NAME_LEN: usize = 48;
        const DATA_FILE: u32 = 0x4441_5441;
        const BITMAPS: u32 = 0x2385_2875;
        // A header of version 2 may end without the mark of the last extension.
        let end = if backing_offset == 0 { self.cluster() } else { backing_offset.min(self.cluster()) };
        while at + 8 <= end {
            let mut extension = [0; 8];
            read_or_fault(file, &mut extension, at)?;
            let (kind, len) = (u32_at(&extension, 0), u64::from(u32_at(&extension, 4)));
            at += 8;
            if kind == END {
                return Ok(());
            }
            if at + len > end {
                break;
            }
            let mut data = vec![0; len as usize];
            read_or_fault(file, &mut data, at)?;
            at += len.next_multiple_of(8);
            match kind {
                BACKING_FORMAT if self.backing_format.is_none() => {
                    self.backing_format = Some(text(&data, "the format of its backing file")?);
                }
                BACKING_FORMAT => return fault("it gives the format of its backing file twice"),
                DATA_FILE => self.data_file = Some(text(&data, "the name of its data file")?),
                BITMAPS => self.has_bitmaps = true,
                // imago 0.2.6 panics on the rest of a broken length.
                FEATURE_NAMES if !data.len().is_multiple_of(FEATURE_NAME_LEN) => {
                    return fault("its table of feature names has a wrong length");
                }
                FEATURE_NAMES => self.feature_names = feature_names(&data, FEATURE_NAME_LEN),
                _ => {}
            }
        }
        if self.version == 2 && at >= end {
            return Ok(());
        }
        fault("its header extensions do not end within the first cluster")
    }

    fn read_backing(&mut self, file: &File, (offset, len): (u64, u32)) -> io::Result<()> {
        if offset == 0 {
            return Ok(());
        }
        let end = offset.checked_add(len.into());
        if len == 0 || len > MAX_BACKING_NAME || end.is_none_or(|end| end >= self.cluster()) {
            return fault("the name of its backing file is not within the first cluster");
        }
        let mut name = vec![0; len as usize];
        read_or_fault(file, &mut name, offset)?;
        let name = text(&name, "the name of its backing file")?;
        if name.contains('\0') {
            return fault("the name of its backing file holds a NUL byte");
        }
        self.backing = Some(name);
        Ok(())
    }

    /// What QEMU demands of the numbers.
    fn check(&self) -> io::Result<()> {
        if self.refcount_order > 6 {
            return fault("its refcounts are wider than 64 bits");
        }
        if self.l1_entries * 8 > MAX_L1_BYTES {
            return fault("its L1 table is larger than 32 MiB");
        }
        let mapped_by_l2 = self.cluster() * self.l2_entries();
        if self.size.div_ceil(mapped_by_l2) > self.l1_entries {
            return fault("its L1 table is too small for the disk");
        }
        if self.refcount_table_clusters == 0 {
            return fault("it has no refcount table");
        }
        if self.refcount_table_clusters * self.cluster() > MAX_REFCOUNT_TABLE_BYTES {
            return fault("its refcount table is larger than 8 MiB");
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return fault("it has more than 65,536 snapshots");
        }
        for (what, offset) in [("L1", self.l1_offset), ("refcount", self.refcount_table_offset)] {
            if !offset.is_multiple_of(self.cluster()) {
                return fault(format!("its {what} table does not begin with a cluster"));
            }
        }
        Ok(())
    }
}

/// Names of incompatible features: kind, bit, 46 bytes of text.
fn feature_names(table: &[u8], len: usize) -> Vec<(u8, String)> {
    const INCOMPATIBLE: u8 = 0;
    let mut names = Vec::new();
    for entry in table.chunks_exact(len) {
        let [kind, bit, name @ ..] = entry else { continue };
        if *kind == INCOMPATIBLE {
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            // It goes to a terminal.
            let printable = |c: &char| !c.is_control();
            names.push((*bit, String::from_utf8_lossy(name).chars().filter(printable).collect()));
        }
    }
    names
}

fn text(bytes: &[u8], what: &str) -> io::Result<String> {
    match String::from_utf8(bytes.to_vec()) {
        Ok(text) => Ok(text),
        Err(_) => fault(format!("{what} is not UTF-8")),
    }
}

/// Fills `to`; the end of the file before that is a fault of the image.
fn read_or_fault(file: &File, to: &mut [u8], offset: u64) -> io::Result<()> {
    match file.read_exact_at(to, offset) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => fault("it ends within its header"),
        other => other,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

/// The big-endian number at `at`, which the caller knows to be within `bytes`.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(word)
}
