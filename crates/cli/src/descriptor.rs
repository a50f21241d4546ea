//! Standard output and error, and writing all of something to a descriptor in whatever mode others have left it.

#![allow(unsafe_code)] // UNSAFETY: poll(2) and pthread_sigmask(3) have no wrapper in std.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};

/// The descriptor without std's buffers and locks, which a thread that hangs in a write would keep.
///
/// # Errors
/// The operating system's, when it has no descriptors left.
pub(crate) fn duplicate(fd: &impl AsFd) -> io::Result<File> {
    fd.as_fd().try_clone_to_owned().map(File::from)
}

/// Writes all of `data`. A descriptor that somebody else has made non-blocking is waited for. Returns how much was written, and the error that
/// ended it.
pub(crate) fn write_all(mut file: &File, data: &[u8]) -> (usize, io::Result<()>) {
    let mut done = 0;
    while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
        match file.write(rest) {
            Ok(0) => return (done, Err(io::ErrorKind::WriteZero.into())),
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Err(error) = wait_writable(file) {
                    return (done, Err(error));
                }
            }
            Err(error) => return (done, Err(error)),
        }
    }
    (done, Ok(()))
}

fn wait_writable(file: &File) -> io::Result<()> {
    let mut polled = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid pollfd.
    if unsafe { libc::poll(&raw mut polled, 1, -1) } >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

/// Lets this thread write to a terminal from the background, where the terminal is set to stop those that do (`stty tostop`), and change its settings.
pub fn survive_background() {
    // SAFETY: sigset_t is plain data that sigemptyset fills.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

extern "C" fn ignore(_: libc::c_int) {}

/// A file that reaches the limit on its size (`ulimit -f`) then gives an error. The signal that comes with it ends the process otherwise. A handler and
/// not SIG_IGN, which programs that are started would inherit.
pub(crate) fn survive_file_size_limit() {
    // SAFETY: the handler does nothing, so it may run at any time; the structure is plain data.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGXFSZ, &raw const action, std::ptr::null_mut());
    }
}
