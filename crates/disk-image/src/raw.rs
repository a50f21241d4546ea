//! A raw image: each request is one system call between the file and guest memory.

#![allow(unsafe_code)] // UNSAFETY: preadv(2), pwritev(2) and fallocate(2) have no wrapper in std.

use crate::{GuestSlice, SECTOR};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Most buffers in one call (POSIX: at least 16; Linux and macOS: 1024).
const MAX_IOVECS: usize = 1024;

/// A worker's reusable vector of buffers.
#[derive(Debug, Default)]
pub struct Scratch(Vec<libc::iovec>);

#[derive(Debug)]
pub struct RawDisk {
    file: File,
    /// Bytes of the file when it was opened.
    file_len: u64,
}

type Transfer =
    unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

impl RawDisk {
    /// A disk of `file`, which has `file_len` bytes.
    pub fn new(file: File, file_len: u64) -> Self {
        Self { file, file_len }
    }

    /// Bytes: as in QEMU, a last sector that the file has only the beginning of is a whole one, of zeros from there on.
    pub fn len(&self) -> u64 {
        self.file_len.next_multiple_of(SECTOR)
    }

    pub fn read(&self, slices: &[GuestSlice<'_>], offset: u64, scratch: &mut Scratch) -> io::Result<()> {
        self.transfer(libc::preadv, slices, offset, scratch, true)
    }

    pub fn write(&self, slices: &[GuestSlice<'_>], offset: u64, scratch: &mut Scratch) -> io::Result<()> {
        self.transfer(libc::pwritev, slices, offset, scratch, false)
    }

    fn transfer(
        &self,
        call: Transfer,
        slices: &[GuestSlice<'_>],
        mut offset: u64,
        Scratch(iovecs): &mut Scratch,
        reads: bool,
    ) -> io::Result<()> {
        iovecs.clear();
        iovecs.extend(slices.iter().map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        }));
        let mut first = 0;
        while first < iovecs.len() {
            let part = &iovecs[first..iovecs.len().min(first + MAX_IOVECS)];
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            // SAFETY: each buffer lies in guest RAM, which `slices` keeps mapped for reading and writing over the call;
            // the guest may change it at any time, which the kernel's copy tolerates. `call` is preadv or pwritev.
            let n = unsafe { call(self.file.as_raw_fd(), part.as_ptr(), part.len() as libc::c_int, at) };
            if n < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            if n == 0 && reads && offset >= self.file_len {
                return fill_tail(slices, iovecs[first..].iter().map(|iovec| iovec.iov_len).sum());
            }
            if n == 0 {
                // The file has become shorter than it was when it was opened.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            offset += n as u64;
            first += advance(&mut iovecs[first..], n as usize);
        }
        Ok(())
    }

    pub fn flush(&self) -> io::Result<()> {
        // fdatasync; on macOS std issues F_FULLFSYNC, which reaches the medium.
        self.file.sync_data()
    }

    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        punch_hole(&self.file, offset, len)
    }

    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let quick =
            if unmap { punch_hole(&self.file, offset, len) } else { zero_range(&self.file, offset, len) };
        match quick {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => self.write_zero_bytes(offset, len),
            other => other,
        }
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        while len > 0 {
            let part = len.min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..part as usize], offset)?;
            offset += part;
            len -= part;
        }
        Ok(())
    }
}

/// Zeros the last `len` bytes of `slices`, less than a sector.
fn fill_tail(slices: &[GuestSlice<'_>], mut len: usize) -> io::Result<()> {
    const ZEROS: [u8; SECTOR as usize] = [0; SECTOR as usize];
    for slice in slices.iter().rev() {
        let part = len.min(slice.len());
        let Ok(tail) = slice.offset(slice.len() - part) else { unreachable!("part is within the slice") };
        let Some(zeros) = ZEROS.get(..part) else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        tail.copy_from(zeros);
        len -= part;
    }
    Ok(())
}

/// Drops `done` bytes from the front of `iovecs`; returns how many of them are used up.
fn advance(iovecs: &mut [libc::iovec], mut done: usize) -> usize {
    for (i, iovec) in iovecs.iter_mut().enumerate() {
        if done < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(done);
            iovec.iov_len -= done;
            return i;
        }
        done -= iovec.iov_len;
    }
    iovecs.len()
}

#[cfg(target_os = "linux")]
fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let range = (libc::off_t::try_from(offset), libc::off_t::try_from(len));
    let (Ok(offset), Ok(len)) = range else { return Err(io::ErrorKind::InvalidInput.into()) };
    // SAFETY: fallocate takes no pointers.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

#[cfg(target_os = "linux")]
fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

#[cfg(target_os = "linux")]
fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// macOS punches holes in whole file system blocks only, so a range is seldom one: not offered there.
#[cfg(not(target_os = "linux"))]
fn punch_hole(_: &File, _: u64, _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
fn zero_range(_: &File, _: u64, _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
