//! A qcow2 image is looked at before it is trusted, as `qemu-img check` does.
//!
//! [`structure`] is for every image: all that the tables of the disk point to is in the file, and means something.
//! [`soundness`] is for one that will be written to: nothing is used twice that may not be, every cluster in use is counted
//! in the refcounts, so that none is given out a second time, and the copied flags say the truth about them. Clusters that are
//! counted and not used are only lost room, as a process that was killed leaves them. An image that passes has no error
//! in the eyes of `qemu-img check`.
//!
//! Each table is read once for each place that names it; their sum is bounded, and so is the memory.

use super::header::{Header, MAX_L1_BYTES, u64_at};
use crate::Fault;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Most bytes of tables that are read: an image of 64 KiB clusters with 30 TiB of data has as much.
const MAX_TABLE_BYTES: u64 = 4 << 30;
/// Most clusters of an image that is checked for writing: four bytes of memory for each.
const MAX_CLUSTERS: u64 = 1 << 27;

/// Bits of the offset in an entry of an L1 or L2 table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The refcount of what the entry points to is one.
const COPIED: u64 = 1 << 63;
/// The L2 entry is of a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// The L2 entry reads as zeros.
const ZERO: u64 = 1 << 0;

/// Why an image is not to be used.
#[derive(Debug)]
pub enum Verdict {
    /// Not for what it is to be used for.
    Fault(Fault),
    /// It cannot be said within bounds.
    TooLarge(Fault),
    /// It cannot be read.
    Io(io::Error),
}

impl From<io::Error> for Verdict {
    fn from(error: io::Error) -> Self {
        match error.downcast::<Fault>() {
            Ok(fault) => Self::Fault(fault),
            Err(error) => Self::Io(error),
        }
    }
}

fn fault<T>(what: impl Into<String>) -> Result<T, Verdict> {
    Err(Verdict::Fault(Fault(what.into())))
}

/// What an entry of an L2 table says.
pub enum L2Entry {
    /// Nothing of the image's own.
    Unallocated,
    /// A whole cluster at this offset.
    Cluster { offset: u64, copied: bool },
    /// Compressed data: offset, and bytes that hold it at most.
    Compressed { offset: u64, len: u64 },
}

impl L2Entry {
    /// Decodes `entry`, or says what is wrong with it.
    pub fn decode(entry: u64, header: &Header) -> Result<Self, Fault> {
        if entry & COMPRESSED != 0 {
            if entry & COPIED != 0 {
                return Err(Fault("a compressed cluster has the copied flag".into()));
            }
            let offset_bits = 62 - (header.cluster_bits - 8);
            let descriptor = entry & !(COPIED | COMPRESSED);
            let offset = descriptor & ((1 << offset_bits) - 1);
            let sectors = (descriptor >> offset_bits) + 1;
            return Ok(Self::Compressed { offset, len: sectors * 512 - offset % 512 });
        }
        if entry & !(OFFSET | COPIED | ZERO) != 0 {
            return Err(Fault(format!("an L2 entry has reserved bits set ({entry:#x})")));
        }
        if entry & ZERO != 0 && header.version < 3 {
            return Err(Fault("it has a zero cluster, which version 2 does not know".into()));
        }
        let (offset, copied) = (entry & OFFSET, entry & COPIED != 0);
        if offset == 0 && copied {
            return Err(Fault("an L2 entry without a cluster has the copied flag".into()));
        }
        if offset == 0 {
            return Ok(Self::Unallocated);
        }
        if !offset.is_multiple_of(header.cluster()) {
            return Err(Fault(format!("an L2 entry points into the middle of a cluster ({offset:#x})")));
        }
        Ok(Self::Cluster { offset, copied })
    }
}

/// Reads tables, as long as they are in the file and there are not too many.
struct Tables<'a> {
    file: &'a File,
    header: &'a Header,
    /// Of the file.
    len: u64,
    left: u64,
}

impl<'a> Tables<'a> {
    fn new(file: &'a File, header: &'a Header, len: u64) -> Self {
        Self { file, header, len, left: MAX_TABLE_BYTES }
    }

    fn read(&mut self, what: &str, offset: u64, bytes: u64) -> Result<Vec<u8>, Verdict> {
        let mut table = Vec::new();
        self.read_into(&mut table, what, offset, bytes)?;
        Ok(table)
    }

    fn read_into(&mut self, table: &mut Vec<u8>, what: &str, offset: u64, bytes: u64) -> Result<(), Verdict> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.len) {
            return fault(format!("{what} at {offset:#x} is not in the file"));
        }
        let Some(left) = self.left.checked_sub(bytes) else {
            return Err(Verdict::TooLarge(Fault("its tables take more than 4 GiB".into())));
        };
        self.left = left;
        table.resize(bytes as usize, 0);
        self.file.read_exact_at(table, offset)?;
        Ok(())
    }

    fn l1(&mut self, what: &str, offset: u64, entries: u64) -> Result<Vec<L1Entry>, Verdict> {
        if entries * 8 > MAX_L1_BYTES || !offset.is_multiple_of(self.header.cluster()) {
            return fault(format!("{what} is too large or does not begin with a cluster"));
        }
        let table = self.read(what, offset, entries * 8)?;
        let mut l1 = Vec::new();
        for entry in table.chunks_exact(8).map(|entry| u64_at(entry, 0)) {
            let offset = entry & OFFSET;
            if entry & !(OFFSET | COPIED) != 0 {
                return fault(format!("an entry of {what} has reserved bits set ({entry:#x})"));
            }
            if !offset.is_multiple_of(self.header.cluster()) {
                return fault(format!(
                    "an entry of {what} points into the middle of a cluster ({offset:#x})"
                ));
            }
            if offset != 0 {
                l1.push(L1Entry { offset, copied: entry & COPIED != 0 });
            } else if entry != 0 {
                return fault(format!("an entry of {what} without an L2 table has the copied flag"));
            }
        }
        Ok(l1)
    }

    /// Calls `each` with what the L2 table at `offset` says, all of which is in the file.
    fn l2(
        &mut self,
        buffer: &mut Vec<u8>,
        offset: u64,
        mut each: impl FnMut(L2Entry) -> Result<(), Verdict>,
    ) -> Result<(), Verdict> {
        self.read_into(buffer, "an L2 table", offset, self.header.cluster())?;
        for entry in buffer.chunks_exact(8) {
            let entry = u64_at(entry, 0);
            if entry == 0 {
                continue;
            }
            let entry = L2Entry::decode(entry, self.header).map_err(Verdict::Fault)?;
            // As in QEMU, the last cluster need not be whole.
            let (offset, last) = match entry {
                L2Entry::Unallocated => continue,
                L2Entry::Cluster { offset, .. } => (offset, offset),
                L2Entry::Compressed { offset, len } => {
                    (offset, (offset + len - 1) & !(self.header.cluster() - 1))
                }
            };
            if offset >= self.len || last >= self.len {
                return fault(format!(
                    "a cluster of the disk at {offset:#x} is not in the file: it is truncated"
                ));
            }
            each(entry)?;
        }
        Ok(())
    }
}

struct L1Entry {
    offset: u64,
    copied: bool,
}

/// Looks at what the disk is read through; `true` if some of it is compressed. `len` is that of `file`, in bytes.
pub fn structure(file: &File, header: &Header, len: u64) -> Result<bool, Verdict> {
    let mut tables = Tables::new(file, header, len);
    let mut buffer = Vec::new();
    let mut has_compressed = false;
    for entry in tables.l1("its L1 table", header.l1_offset, header.l1_entries)? {
        tables.l2(&mut buffer, entry.offset, |entry| {
            has_compressed |= matches!(entry, L2Entry::Compressed { .. });
            Ok(())
        })?;
    }
    Ok(has_compressed)
}

/// Looks at everything that a write relies on, the structure included. The number of clusters that are counted too often, which
/// is lost room and no more.
pub fn soundness(file: &File, header: &Header, len: u64) -> Result<u64, Verdict> {
    if header.has_live_bitmaps() {
        return fault(
            "it has dirty bitmaps, which a write would make wrong (`qemu-img bitmap --remove` takes one away)",
        );
    }
    let clusters = len.div_ceil(header.cluster());
    if clusters > MAX_CLUSTERS {
        return Err(Verdict::TooLarge(Fault(format!(
            "it has {clusters} clusters, at most {MAX_CLUSTERS} are checked"
        ))));
    }
    let mut tables = Tables::new(file, header, len);
    let mut uses = Uses { bits: header.cluster_bits, clusters: vec![0; clusters as usize] };
    uses.add(0, 1, Use::Metadata)?;
    let refcounts = refcount_table(&mut tables, &mut uses)?;
    disk(&mut tables, &mut uses)?;
    snapshots(&mut tables, &mut uses)?;
    compare(&mut tables, &uses, &refcounts)
}

/// What a cluster is used for.
#[derive(Clone, Copy)]
enum Use {
    /// By the image itself, and by nothing else.
    Metadata,
    /// As an L2 table of the disk; snapshots may share it.
    L2 { copied: bool },
    /// As an L2 table of a snapshot.
    SnapshotL2,
    /// By the disk, as a whole; snapshots may share it.
    Data { copied: bool },
    /// By the disk, for compressed data, together with other such and with snapshots.
    Compressed,
    /// By a snapshot.
    Snapshot,
}

/// How often each cluster is used, and for what.
struct Uses {
    bits: u32,
    /// The number, and flags above.
    clusters: Vec<u32>,
}

/// Flags of [`Uses::clusters`].
mod flag {
    pub const METADATA: u32 = 1 << 31;
    /// An L2 table, of the disk or a snapshot.
    pub const L2: u32 = 1 << 30;
    /// Data, of the disk or a snapshot.
    pub const DATA: u32 = 1 << 29;
    /// A table or whole cluster of the disk itself.
    pub const ACTIVE: u32 = 1 << 28;
    /// Compressed data of the disk itself.
    pub const COMPRESSED: u32 = 1 << 27;
    /// With [`ACTIVE`]: the entry that points there has the copied flag.
    pub const COPIED: u32 = 1 << 26;
    pub const COUNT: u32 = COPIED - 1;
}

impl Uses {
    /// Enters that `bytes` from `offset`, which are in the file, are used for `what`.
    fn add(&mut self, offset: u64, bytes: u64, what: Use) -> Result<(), Verdict> {
        use flag::{ACTIVE, COMPRESSED, COPIED, COUNT, DATA, L2, METADATA};
        let copied = |copied| if copied { COPIED } else { 0 };
        // What is entered, and with what that cannot be in one cluster.
        let (set, not_with) = match what {
            Use::Metadata => (METADATA, !0),
            Use::L2 { copied: flag } => (L2 | ACTIVE | copied(flag), METADATA | DATA | ACTIVE),
            Use::SnapshotL2 => (L2, METADATA | DATA),
            Use::Data { copied: flag } => (DATA | ACTIVE | copied(flag), METADATA | L2 | ACTIVE | COMPRESSED),
            Use::Compressed => (DATA | COMPRESSED, METADATA | L2 | ACTIVE),
            Use::Snapshot => (DATA, METADATA | L2),
        };
        if bytes == 0 {
            return Ok(());
        }
        let last = (offset + bytes - 1) >> self.bits;
        for index in (offset >> self.bits)..=last {
            let Some(cluster) = self.clusters.get_mut(index as usize) else {
                return fault(format!("something at {offset:#x} is not in the file"));
            };
            if *cluster & not_with != 0 {
                return fault(format!(
                    "two things are in one place, cluster {index} (offset {:#x})",
                    index << self.bits
                ));
            }
            if *cluster & COUNT == COUNT {
                return fault(format!("cluster {index} is used too often"));
            }
            *cluster = (*cluster | set) + 1;
        }
        Ok(())
    }
}

/// The offsets of the refcount blocks, 0 where there is none.
fn refcount_table(tables: &mut Tables<'_>, uses: &mut Uses) -> Result<Vec<u64>, Verdict> {
    let (at, bytes) = (
        tables.header.refcount_table_offset,
        tables.header.refcount_table_clusters * tables.header.cluster(),
    );
    let table = tables.read("its refcount table", at, bytes)?;
    uses.add(at, bytes, Use::Metadata)?;
    let mut blocks = Vec::new();
    for block in table.chunks_exact(8).map(|entry| u64_at(entry, 0)) {
        if !block.is_multiple_of(tables.header.cluster()) {
            return fault(format!("a refcount block does not begin with a cluster ({block:#x})"));
        }
        if block != 0 {
            if block.checked_add(tables.header.cluster()).is_none_or(|end| end > tables.len) {
                return fault(format!("a refcount block at {block:#x} is not in the file"));
            }
            uses.add(block, tables.header.cluster(), Use::Metadata)?;
        }
        blocks.push(block);
    }
    Ok(blocks)
}

fn disk(tables: &mut Tables<'_>, uses: &mut Uses) -> Result<(), Verdict> {
    let header = tables.header;
    let mut buffer = Vec::new();
    let l1 = tables.l1("its L1 table", header.l1_offset, header.l1_entries)?;
    uses.add(header.l1_offset, header.l1_entries * 8, Use::Metadata)?;
    for entry in l1 {
        uses.add(entry.offset, header.cluster(), Use::L2 { copied: entry.copied })?;
        tables.l2(&mut buffer, entry.offset, |entry| match entry {
            L2Entry::Unallocated => Ok(()),
            L2Entry::Cluster { offset, copied } => uses.add(offset, 1, Use::Data { copied }),
            L2Entry::Compressed { offset, len } => uses.add(offset, len, Use::Compressed),
        })?;
    }
    Ok(())
}

/// Snapshots: their table, and the tables of each. The offsets within an entry are those of the specification.
fn snapshots(tables: &mut Tables<'_>, uses: &mut Uses) -> Result<(), Verdict> {
    const FIXED: u64 = 40;
    let header = tables.header;
    if header.snapshots == 0 {
        return Ok(());
    }
    if !header.snapshots_offset.is_multiple_of(header.cluster()) {
        return fault("its snapshot table does not begin with a cluster");
    }
    let mut at = header.snapshots_offset;
    let mut buffer = Vec::new();
    for _ in 0..header.snapshots {
        let fixed = tables.read("its snapshot table", at, FIXED)?;
        let [id0, id1, name0, name1] = [fixed[12], fixed[13], fixed[14], fixed[15]];
        let (l1_offset, l1_entries) = (u64_at(&fixed, 0), u64_at(&fixed, 8) >> 32);
        let extra = u64_at(&fixed, 32) & 0xffff_ffff;
        let names = u64::from(u16::from_be_bytes([id0, id1])) + u64::from(u16::from_be_bytes([name0, name1]));
        at = at.saturating_add((FIXED + extra + names).next_multiple_of(8));
        let l1 = tables.l1("the L1 table of a snapshot", l1_offset, l1_entries)?;
        uses.add(l1_offset, l1_entries * 8, Use::Metadata)?;
        for entry in l1 {
            uses.add(entry.offset, header.cluster(), Use::SnapshotL2)?;
            tables.l2(&mut buffer, entry.offset, |entry| match entry {
                L2Entry::Unallocated => Ok(()),
                L2Entry::Cluster { offset, .. } => uses.add(offset, 1, Use::Snapshot),
                L2Entry::Compressed { offset, len } => uses.add(offset, len, Use::Snapshot),
            })?;
        }
    }
    if at > tables.len {
        return fault("its snapshot table is not in the file");
    }
    uses.add(header.snapshots_offset, at - header.snapshots_offset, Use::Metadata)
}

/// Every use is counted, and the copied flags are right; the number of clusters that are counted too often.
fn compare(tables: &mut Tables<'_>, uses: &Uses, blocks: &[u64]) -> Result<u64, Verdict> {
    let header = tables.header;
    // Refcounts in a block.
    let per_block = ((header.cluster() * 8) >> header.refcount_order) as usize;
    let mut buffer = Vec::new();
    let mut leaked = 0;
    for number in 0..blocks.len().max(uses.clusters.len().div_ceil(per_block)) {
        let first = number.saturating_mul(per_block);
        match blocks.get(number) {
            Some(offset) if *offset != 0 => {
                tables.read_into(&mut buffer, "a refcount block", *offset, header.cluster())?;
            }
            // There is none: zero for all that it would hold, also for what is not in the file.
            _ if first >= uses.clusters.len() => continue,
            _ => {
                buffer.clear();
                buffer.resize(header.cluster() as usize, 0);
            }
        }
        for index in 0..per_block {
            let used = uses.clusters.get(first.saturating_add(index)).copied().unwrap_or(0);
            let refcount = refcount(&buffer, index, header.refcount_order);
            if compare_one(first.saturating_add(index), used, refcount)? {
                leaked += 1;
            }
        }
    }
    Ok(leaked)
}

/// It is counted more often than it is used.
fn compare_one(cluster: usize, used: u32, refcount: u64) -> Result<bool, Verdict> {
    let count = u64::from(used & flag::COUNT);
    if refcount < count {
        return fault(format!("cluster {cluster} has a refcount of {refcount} but is used {count} times"));
    }
    if used & flag::ACTIVE != 0 && (used & flag::COPIED != 0) != (refcount == 1) {
        return fault(format!(
            "the copied flag for cluster {cluster} contradicts its refcount of {refcount}"
        ));
    }
    Ok(refcount > count)
}

/// Number `index` of a refcount block, whose numbers have `1 << order` bits; those below a byte begin with the low bits.
pub fn refcount(block: &[u8], index: usize, order: u32) -> u64 {
    match order {
        0..=2 => {
            let bits = 1 << order;
            let byte = u64::from(block[index * bits / 8]);
            (byte >> (index * bits % 8)) & ((1 << bits) - 1)
        }
        _ => {
            let bytes = 1 << (order - 3);
            let mut value = 0;
            for byte in &block[index * bytes..(index + 1) * bytes] {
                value = (value << 8) | u64::from(*byte);
            }
            value
        }
    }
}
