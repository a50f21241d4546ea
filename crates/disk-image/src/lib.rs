//! Disk images and block devices of the host, raw and qcow2.

// What the tests share names this crate as those outside of it do.
#[cfg(test)]
extern crate self as outboard_disk_image;

mod device;
mod disk;
mod error;
mod lock;
mod open;
mod qcow2;
mod raw;

pub use disk::{Disk, DiskHealth, DiskOptions};
pub use error::{DiskError, Fault};
pub use open::DiskFormat;
pub use raw::Scratch;

use vm_memory::VolatileSlice;

/// A piece of guest memory that stays mapped as long as the reference lives; the guest may write to it at any time.
pub type GuestSlice<'m> = VolatileSlice<'m, ()>;

/// Bytes of the sector that a disk counts in.
pub const SECTOR: u64 = 512;
/// Most backing files behind an image.
pub const MAX_BACKING_FILES: usize = 64;
