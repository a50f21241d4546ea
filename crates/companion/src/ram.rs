//! Guest RAM as a hostile guest's device must see it: checked ranges, copies.

use std::ptr::NonNull;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, VolatileSlice};

/// Guest RAM.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// `len` bytes of RAM at `address`, if all of them are one piece of it; 0 bytes are none.
pub(crate) fn slice(ram: &GuestMemory, address: u64, len: u64) -> Option<VolatileSlice<'_>> {
    let len = usize::try_from(len).ok().filter(|len| *len > 0)?;
    address.checked_add(len as u64)?;
    ram.get_slice(GuestAddress(address), len).ok().filter(|slice| slice.len() == len)
}

/// Where that is in this process. The memory stays for as long as `ram`, or a clone of it, does.
pub(crate) fn host(ram: &GuestMemory, address: u64, len: u64) -> Option<NonNull<u8>> {
    NonNull::new(slice(ram, address, len)?.ptr_guard_mut().as_ptr())
}

/// A copy of it: what the guest changes afterwards is not seen.
pub(crate) fn copy(ram: &GuestMemory, address: u64, len: u64) -> Option<Vec<u8>> {
    let slice = slice(ram, address, len)?;
    let mut bytes = vec![0; slice.len()];
    slice.read_slice(&mut bytes, 0).ok()?;
    Some(bytes)
}

/// The little-endian number of `N` bytes at `at`; missing bytes are 0.
pub(crate) fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.iter().skip(at).take(N);
    bytes.zip((0u32..).step_by(8)).fold(0, |value, (byte, shift)| value | u64::from(*byte) << shift)
}
