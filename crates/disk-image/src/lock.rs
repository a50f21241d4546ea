//! Locks that keep two users off one image: ours (flock) and QEMU's (byte-range locks of the open file description).
//!
//! QEMU (block/file-posix.c) holds a read lock on byte 100 + n for each permission n that it uses, and on byte 200 + n for
//! each that it lets nobody else use; before it starts it looks for the other's locks on the opposite bytes. The same is done
//! here, so that each refuses what the other has open. macOS has no such locks for programs, and QEMU takes none there.

#![allow(unsafe_code)] // UNSAFETY: fcntl(2) has no wrapper in std.

use std::fs::{File, TryLockError};
use std::io;
use std::time::Duration;

/// How often and how far apart a lock is tried: udev locks a block device for a moment when it appears, and a process
/// that is starting another one holds a copy of each lock until that one runs.
pub const TRIES: u32 = 5;
pub const PAUSE: Duration = Duration::from_millis(20);

/// Who has the image.
pub const BY_OUTBOARD: &str = "another Outboard or another disk of this machine holds its flock";
#[cfg(target_os = "linux")]
const BY_QEMU: &str = "QEMU or a program of its kind holds a lock on it";

/// Locks `file`, exclusively to write, shared to read; who has it, if somebody has. The locks go with the file.
pub fn lock(file: &File, writable: bool) -> io::Result<Option<&'static str>> {
    match if writable { file.try_lock() } else { file.try_lock_shared() } {
        Ok(()) => qemu(file, writable),
        Err(TryLockError::WouldBlock) => Ok(Some(BY_OUTBOARD)),
        Err(TryLockError::Error(e)) => Err(e),
    }
}

#[cfg(not(target_os = "linux"))]
fn qemu(_: &File, _: bool) -> io::Result<Option<&'static str>> {
    Ok(None)
}

/// First byte for permissions that are used, and for those that are not shared.
#[cfg(target_os = "linux")]
const USED: i64 = 100;
#[cfg(target_os = "linux")]
const NOT_SHARED: i64 = 200;

#[cfg(target_os = "linux")]
fn qemu(file: &File, writable: bool) -> io::Result<Option<&'static str>> {
    // BLK_PERM_* of QEMU's include/block/block-common.h, by number of the bit.
    const CONSISTENT_READ: i64 = 0;
    const WRITE: i64 = 1;
    const RESIZE: i64 = 3;
    let used: &[i64] = if writable { &[CONSISTENT_READ, WRITE, RESIZE] } else { &[CONSISTENT_READ] };
    let not_shared = [WRITE, RESIZE];
    let own = used.iter().map(|bit| USED + bit).chain(not_shared.iter().map(|bit| NOT_SHARED + bit));
    for byte in own {
        match set_read_lock(file, byte) {
            Ok(()) => {}
            // A file system or kernel without such locks: QEMU has none there either.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP)) => {
                return Ok(None);
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(Some(BY_QEMU));
            }
            Err(e) => return Err(e),
        }
    }
    let others = used.iter().map(|bit| NOT_SHARED + bit).chain(not_shared.iter().map(|bit| USED + bit));
    for byte in others {
        if is_locked(file, byte)? {
            return Ok(Some(BY_QEMU));
        }
    }
    Ok(None)
}

#[cfg(target_os = "linux")]
fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(target_os = "linux")]
fn set_read_lock(file: &File, byte: i64) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let lock = byte_lock(libc::F_RDLCK, byte);
    // SAFETY: the descriptor is open and `lock` is a flock, as the command demands.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Somebody else has a lock on the byte.
#[cfg(target_os = "linux")]
fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    // SAFETY: the descriptor is open and `lock` is a flock that may be written to, as the command demands.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } == 0 {
        return Ok(i32::from(lock.l_type) != libc::F_UNLCK);
    }
    Err(io::Error::last_os_error())
}
