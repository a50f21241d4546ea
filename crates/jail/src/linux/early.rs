//! Threads that wait since before the process was confined. A seccomp filter can be given to all threads at once; Landlock's rules each thread takes
//! on by itself (before Linux 7.0), so those are made to by a signal, whatever they wait for.

use super::BOUND;
use crate::Error;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most time for all of them: they only have to be scheduled.
const PATIENCE: Duration = Duration::from_secs(30);

static THREADS: Mutex<Vec<libc::pid_t>> = Mutex::new(Vec::new());
/// The rules' descriptor.
static RULES: AtomicI32 = AtomicI32::new(-1);
/// Threads that have taken them on.
static DONE: AtomicUsize = AtomicUsize::new(0);

fn threads() -> MutexGuard<'static, Vec<libc::pid_t>> {
    THREADS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The calling thread, listed until this is dropped.
pub(super) struct Listed(libc::pid_t);

impl Listed {
    pub(super) fn new() -> Self {
        // SAFETY: gettid takes no arguments.
        let thread = unsafe { libc::gettid() };
        threads().push(thread);
        Self(thread)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        threads().retain(|thread| *thread != self.0);
    }
}

/// Has every thread that is listed take on `rules`, and waits until they have.
pub(super) fn bind(rules: BorrowedFd<'_>) -> Result<(), Error> {
    // Locked to the end: none of them ends meanwhile.
    let threads = threads();
    if threads.is_empty() {
        return Ok(());
    }
    RULES.store(rules.as_raw_fd(), Ordering::SeqCst);
    let signal = libc::SIGRTMIN() + 1;
    // SAFETY: an all-zero sigaction is a valid one, and the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
    for thread in &*threads {
        // SAFETY: takes no pointers.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), *thread, signal) };
        if sent < 0 {
            return Err(Error::new("a signal to a thread", io::Error::last_os_error()));
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while DONE.load(Ordering::SeqCst) < threads.len() {
        if Instant::now() > deadline {
            let source = io::Error::from(io::ErrorKind::TimedOut);
            return Err(Error::new("Landlock rules for threads that run already", source));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

extern "C" fn on_signal(_: libc::c_int) {
    // SAFETY: numbers only. A thread needs the first for the second; the filter for the whole process allows both. errno is put back.
    unsafe {
        let errno = *libc::__errno_location();
        libc::syscall(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        if libc::syscall(libc::SYS_landlock_restrict_self, RULES.load(Ordering::SeqCst), 0) == 0 {
            BOUND.set(true);
            DONE.fetch_add(1, Ordering::SeqCst);
        }
        *libc::__errno_location() = errno;
    }
}
