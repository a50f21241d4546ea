//! An entry of a batch.

use crate::ENTRY_BYTES;
use crate::registers::constants;

constants! { ENTRY_OFFSETS:
    /// In an entry, 32 bits: [`Op`].
    ENTRY_OP: u32 = 0x00;
    /// In an entry, 32 bits: 0. Other bits are refused.
    ENTRY_FLAGS: u32 = 0x04;
    /// In an entry, 64 bits: guest-physical address to map.
    ENTRY_ADDRESS: u32 = 0x08;
    /// In an entry, 64 bits: bytes to map.
    ENTRY_LEN: u32 = 0x10;
    /// In an entry, 64 bits: name of a mapping. Written by the device for a mapping, by the guest for an unmapping.
    ENTRY_HANDLE: u32 = 0x18;
    /// In an entry, 64 bits: bus address of the mapping's first byte, written by the device.
    ENTRY_BUS: u32 = 0x20;
    /// In an entry, 32 bits: [`Status`], written by the device.
    ENTRY_STATUS: u32 = 0x28;
}

/// Defines a 32-bit code with its C name.
macro_rules! codes {
    ($(#[doc = $what:literal])+ $type:ident, $list:ident, $prefix:literal:
        $($(#[doc = $doc:literal])+ $name:ident $c:literal = $value:literal,)+) => {
        $(#[doc = $what])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $type { $($(#[doc = $doc])+ $name = $value,)+ }

        impl $type {
            /// The code `value` stands for, if it stands for one.
            pub const fn from_code(value: u32) -> Option<Self> {
                match value { $($value => Some(Self::$name),)+ _ => None }
            }

            /// As it is written.
            pub const fn code(self) -> u32 {
                self as u32
            }
        }

        /// The codes as the C header shows them: name, value, comment.
        pub const $list: &[(&str, u64, &[&str])] = &[$((concat!($prefix, $c), $value, &[$($doc),+])),+];
    };
}

codes! {
    /// What an entry asks for.
    Op, OPS, "OP_":
    /// Map `len` bytes at `address`.
    Map "MAP" = 1,
    /// Take down the mapping named `handle`, whole.
    Unmap "UNMAP" = 2,
}

codes! {
    /// What became of an entry, or of a batch.
    Status, STATUSES, "STATUS_":
    /// Done.
    Ok "OK" = 0,
    /// Unknown operation, or bits that must be 0 are not.
    Unknown "UNKNOWN" = 1,
    /// Not (all) guest RAM, or the end leaves the address space.
    BadRange "BAD_RANGE" = 2,
    /// Address or length is no multiple of the granule, or the length is 0.
    Misaligned "MISALIGNED" = 3,
    /// The limit of bytes is reached.
    OutOfBytes "OUT_OF_BYTES" = 4,
    /// The limit of mappings is reached.
    OutOfEntries "OUT_OF_ENTRIES" = 5,
    /// Enough is free, but not in one piece.
    Fragmented "FRAGMENTED" = 6,
    /// Enough will be free once addresses that were unmapped are returned.
    Returning "RETURNING" = 7,
    /// No mapping has this name.
    NoSuchHandle "NO_SUCH_HANDLE" = 8,
    /// The host refused for a reason of its own, which its log has.
    Host "HOST" = 9,
    /// The device is not enabled.
    Off "OFF" = 10,
    /// The queue has a batch under way.
    Busy "BUSY" = 11,
    /// The queue's base is not set, not aligned, or its entries are not (all) guest RAM.
    BadQueue "BAD_QUEUE" = 12,
    /// A count of 0 or beyond the limit.
    BadCount "BAD_COUNT" = 13,
    /// The served device is gone.
    Gone "GONE" = 14,
    /// A batch for later may only unmap.
    NotLater "NOT_LATER" = 15,
}

/// An entry, read from guest memory once and written back once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// [`Op`], as the guest wrote it.
    pub op: u32,
    /// Must be 0.
    pub flags: u32,
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Name of the mapping.
    pub handle: u64,
    /// Bus address.
    pub bus: u64,
    /// [`Status`].
    pub status: u32,
}

impl Entry {
    /// Reads an entry.
    pub fn read(bytes: &[u8; ENTRY_BYTES as usize]) -> Self {
        let u32_at = |at: u32| u32::from_le_bytes(piece(bytes, at));
        let u64_at = |at: u32| u64::from_le_bytes(piece(bytes, at));
        Self {
            op: u32_at(ENTRY_OP),
            flags: u32_at(ENTRY_FLAGS),
            address: u64_at(ENTRY_ADDRESS),
            len: u64_at(ENTRY_LEN),
            handle: u64_at(ENTRY_HANDLE),
            bus: u64_at(ENTRY_BUS),
            status: u32_at(ENTRY_STATUS),
        }
    }

    /// The entry's bytes; what is reserved is 0.
    pub fn bytes(&self) -> [u8; ENTRY_BYTES as usize] {
        let mut bytes = [0; ENTRY_BYTES as usize];
        let mut put = |at: u32, value: &[u8]| {
            for (byte, value) in bytes.iter_mut().skip(at as usize).zip(value) {
                *byte = *value;
            }
        };
        put(ENTRY_OP, &self.op.to_le_bytes());
        put(ENTRY_FLAGS, &self.flags.to_le_bytes());
        put(ENTRY_ADDRESS, &self.address.to_le_bytes());
        put(ENTRY_LEN, &self.len.to_le_bytes());
        put(ENTRY_HANDLE, &self.handle.to_le_bytes());
        put(ENTRY_BUS, &self.bus.to_le_bytes());
        put(ENTRY_STATUS, &self.status.to_le_bytes());
        bytes
    }
}

fn piece<const N: usize>(bytes: &[u8], at: u32) -> [u8; N] {
    let mut piece = [0; N];
    for (to, from) in piece.iter_mut().zip(bytes.iter().skip(at as usize)) {
        *to = *from;
    }
    piece
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_reads_back_and_stands_where_the_header_says() {
        let entry =
            Entry { op: 1, flags: 2, address: 3 << 40, len: 4 << 33, handle: 5 << 50, bus: 6, status: 7 };
        let bytes = entry.bytes();
        assert_eq!(Entry::read(&bytes), entry);
        assert_eq!(bytes[ENTRY_HANDLE as usize + 6], 5 << 2);
        assert_eq!(bytes[ENTRY_STATUS as usize], 7);
        assert!(bytes[ENTRY_STATUS as usize + 4..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn codes_read_back() {
        for code in 0..=15 {
            assert_eq!(Status::from_code(code).map(Status::code), Some(code));
        }
        assert_eq!(Status::from_code(16), None);
        assert_eq!(Op::from_code(0), None);
    }
}
