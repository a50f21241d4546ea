//! A wake-up that one thread signals and another waits for, backed by a file descriptor.

#![allow(unsafe_code)] // UNSAFETY: eventfd(2), pipe(2) and poll(2) have no wrapper in std.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// A counter that becomes readable when signalled: an eventfd on Linux, a non-blocking pipe elsewhere.
///
/// On Linux the descriptor can be handed to the kernel (KVM's ioeventfd and irqfd take it).
#[derive(Debug)]
pub struct Event {
    read: OwnedFd,
    /// The pipe's write end; an eventfd is its own.
    #[cfg(not(target_os = "linux"))]
    write: OwnedFd,
}

impl Event {
    /// A new, unsignalled event.
    ///
    /// # Errors
    /// The operating system's, when the process is out of file descriptors.
    #[cfg(target_os = "linux")]
    pub fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so fd is open and owned by nobody else.
        Ok(Self { read: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// A new, unsignalled event.
    ///
    /// # Errors
    /// The operating system's, when the process is out of file descriptors.
    #[cfg(not(target_os = "linux"))]
    pub fn new() -> io::Result<Self> {
        let mut fds = [0; 2];
        // SAFETY: fds has room for the two descriptors pipe writes.
        if unsafe { libc::pipe(fds.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so both descriptors are open and owned by nobody else.
        let (read, write) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
        for fd in [&read, &write] {
            // SAFETY: fcntl on an open descriptor with integer arguments.
            let failed = unsafe {
                libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) < 0
                    || libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) < 0
            };
            if failed {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self { read, write })
    }

    /// Wakes whoever waits. Signals merge; never blocks.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: `one` is 8 readable bytes. A full counter or pipe (EAGAIN) means that the event is already signalled.
        unsafe { libc::write(self.write_end().as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Takes back all signals so far; `true` if there were any. Never blocks.
    pub fn take(&self) -> bool {
        let mut buffer = [0u8; 64];
        let mut any = false;
        loop {
            // SAFETY: `buffer` is writable for its whole length; the descriptor is non-blocking.
            let n = unsafe { libc::read(self.read.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
            any |= n > 0;
            // An eventfd is empty after one read; a pipe is when it gave less than was asked for.
            if n < buffer.len() as isize {
                return any;
            }
        }
    }

    /// Waits until signalled, then takes the signals back.
    ///
    /// # Errors
    /// That of poll(2), which does not fail for an open descriptor.
    pub fn wait(&self) -> io::Result<()> {
        loop {
            // Poll first: who waits has usually nothing to take yet, and a read that finds nothing is a call for nothing.
            poll(&mut [pollfd(self.as_fd(), libc::POLLIN)], None)?;
            if self.take() {
                return Ok(());
            }
        }
    }

    #[cfg(target_os = "linux")]
    fn write_end(&self) -> &OwnedFd {
        &self.read
    }

    #[cfg(not(target_os = "linux"))]
    fn write_end(&self) -> &OwnedFd {
        &self.write
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}

/// Waits until one of `fds` is readable, closed or in error, or until `timeout` is over; `None` waits for ever.
///
/// Returns one flag for each descriptor, in order; all false after a timeout or a signal handler's interruption.
///
/// # Errors
/// That of poll(2).
pub fn poll_readable(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut polled: Vec<libc::pollfd> = fds.iter().map(|fd| pollfd(*fd, libc::POLLIN)).collect();
    poll(&mut polled, timeout)?;
    Ok(polled.iter().map(|p| p.revents != 0).collect())
}

/// Waits until `fd` takes bytes (or is closed or in error): `true`. `false` once `stop` is readable or `timeout` is over.
///
/// # Errors
/// That of poll(2).
pub fn poll_writable(fd: BorrowedFd<'_>, stop: &Event, timeout: Option<Duration>) -> io::Result<bool> {
    let mut polled = [pollfd(fd, libc::POLLOUT), pollfd(stop.as_fd(), libc::POLLIN)];
    poll(&mut polled, timeout)?;
    Ok(polled[0].revents != 0)
}

fn pollfd(fd: BorrowedFd<'_>, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 }
}

fn poll(fds: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    // Rounded up, so that a short timeout does not spin.
    let timeout_ms = timeout.map_or(-1, |t| i32::try_from(t.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
    // SAFETY: `fds` is a valid array of its own length.
    if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) } >= 0 {
        return Ok(());
    }
    // What poll wrote before it failed means nothing.
    fds.iter_mut().for_each(|p| p.revents = 0);
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_merge_and_are_taken_once() {
        let event = Event::new().unwrap();
        assert!(!event.take());
        event.signal();
        event.signal();
        assert!(event.take());
        assert!(!event.take());
    }

    #[test]
    fn wait_returns_after_a_signal_from_another_thread() {
        let event = Event::new().unwrap();
        std::thread::scope(|s| {
            s.spawn(|| event.signal());
            event.wait().unwrap();
        });
        assert!(!event.take());
    }

    #[test]
    fn poll_names_the_readable_one() {
        let (a, b) = (Event::new().unwrap(), Event::new().unwrap());
        b.signal();
        assert_eq!(poll_readable(&[a.as_fd(), b.as_fd()], None).unwrap(), [false, true]);
        b.take();
        let none = poll_readable(&[a.as_fd(), b.as_fd()], Some(Duration::from_millis(1))).unwrap();
        assert_eq!(none, [false, false]);
    }

    #[test]
    fn a_stop_ends_the_wait_for_a_full_pipe() {
        let (reader, writer) = std::io::pipe().unwrap();
        let stop = Event::new().unwrap();
        assert!(poll_writable(writer.as_fd(), &stop, None).unwrap());
        // SAFETY: fcntl on an open descriptor with integer arguments.
        unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        while io::Write::write(&mut &writer, &[0; 4096]).is_ok() {}
        assert!(!poll_writable(writer.as_fd(), &stop, Some(Duration::from_millis(1))).unwrap());
        stop.signal();
        assert!(!poll_writable(writer.as_fd(), &stop, None).unwrap());
        drop(reader);
    }
}
