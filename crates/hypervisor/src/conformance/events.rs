//! An eventfd with its count, which tells how often the kernel signalled it.

use super::rig::{Outcome, fail};
use std::os::fd::BorrowedFd;

/// An eventfd(2); on other systems there is none to be had, and no back end with kernel events either.
pub struct EventFd(
    #[cfg(target_os = "linux")] std::fs::File,
    #[cfg(not(target_os = "linux"))] std::convert::Infallible,
);

#[cfg(target_os = "linux")]
impl EventFd {
    /// A new one, not signalled.
    #[allow(unsafe_code)] // UNSAFETY: eventfd(2) has no wrapper in std.
    pub fn new() -> Outcome<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return fail(format!("eventfd: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: just opened, owned by nobody else.
        Ok(Self(unsafe { std::fs::File::from_raw_fd(fd) }))
    }

    /// Its descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.0.as_fd()
    }

    /// Signals it once.
    pub fn signal(&self) -> Outcome {
        use std::io::Write;
        (&self.0).write_all(&1u64.to_ne_bytes()).or_else(|e| fail(format!("writing an eventfd: {e}")))
    }

    /// Takes the signals back and says how many there were.
    pub fn take(&self) -> Outcome<u64> {
        use std::io::{ErrorKind, Read};
        let mut count = [0; 8];
        match (&self.0).read_exact(&mut count) {
            Ok(()) => Ok(u64::from_ne_bytes(count)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
            Err(error) => fail(format!("reading an eventfd: {error}")),
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl EventFd {
    /// Fails: this system has none.
    pub fn new() -> Outcome<Self> {
        fail("this system has no eventfd")
    }

    /// Never called.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self.0 {}
    }

    /// Never called.
    pub fn signal(&self) -> Outcome {
        match self.0 {}
    }

    /// Never called.
    pub fn take(&self) -> Outcome<u64> {
        match self.0 {}
    }
}
