//! Interrupting KVM_RUN from other threads without losing a request.
//!
//! A kick sets the vCPU's flag, then sends its thread a signal. The signal's handler, which runs on that very thread,
//! sets `immediate_exit` in the vCPU's `kvm_run`, with which the current or the next KVM_RUN fails with EINTR. The run
//! loop clears `immediate_exit` *before* it looks at the flag. So, whenever the signal comes:
//! - before the clear: the flag was set earlier still, and the look after the clear sees it;
//! - after the clear: `immediate_exit` stays set, KVM_RUN comes back, and the loop looks again.

#![allow(unsafe_code)] // UNSAFETY: signal handler, tgkill(2) and the thread's pointer into kvm_run.

use crate::{Error, Kick, Result, ThreadPriority};
use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

thread_local! {
    /// `immediate_exit` of the vCPU bound to this thread; null without one. Constant and without destructor, so that
    /// reading it in a signal handler is a plain load.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// A real-time signal: no C library and no shell uses it for something else.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_signal(_: libc::c_int) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: it points into the mapping of the vCPU that is bound to this thread: `Binding` clears it, on this
        // thread, before the mapping goes. Only this thread and the kernel touch the byte.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

/// Lets the signal do nothing but the above, in the whole process.
pub fn install_handler() -> Result<()> {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
    // Other system calls of a vCPU thread restart; KVM_RUN does not, whatever the flags.
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: the handler is async-signal-safe: a thread-local load and a store.
    if unsafe { libc::sigaction(signal(), &action, ptr::null_mut()) } < 0 {
        return Err(host("sigaction for the vCPU kick signal"));
    }
    Ok(())
}

/// The other threads' handle. It holds nothing of the VM, so it may outlive it.
#[derive(Debug, Default)]
pub struct Kicker {
    pending: AtomicBool,
    /// The vCPU's thread, while it is bound. Locked while a signal is sent, so that it cannot end meanwhile.
    thread: Mutex<Option<libc::pid_t>>,
}

impl Kicker {
    /// Whether a kick waits to be taken.
    pub fn is_pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    /// Takes all kicks so far; `true` if there were any.
    pub fn take(&self) -> bool {
        self.pending.swap(false, Ordering::SeqCst)
    }

    fn set_thread(&self, thread: Option<libc::pid_t>) {
        *self.thread.lock().unwrap_or_else(|e| e.into_inner()) = thread;
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        if self.pending.swap(true, Ordering::SeqCst) {
            // Whoever set it sends the signal; nobody has taken the flag since.
            return;
        }
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(tid) = *thread {
            // tgkill and not pthread_kill: for a thread that is gone (a leaked vCPU) it fails instead of being undefined.
            // SAFETY: takes no pointers. The thread unblocked the signal and the process handles it.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal()) };
        }
    }
}

/// The calling thread's claim to a vCPU: from here on kicks reach it, until this is dropped on the same thread.
#[derive(Debug)]
pub struct Binding {
    pub kicker: std::sync::Arc<Kicker>,
    immediate_exit: *mut u8,
}

impl Binding {
    /// Binds the calling thread; `immediate_exit` is that of the vCPU's `kvm_run`.
    ///
    /// # Errors
    /// [`Error::WrongPhase`] if the thread has a vCPU already (a Mac allows one), [`Error::Host`].
    ///
    /// # Safety
    /// `immediate_exit` must stay valid, and be touched only through this type, until the binding is dropped.
    pub unsafe fn new(immediate_exit: *mut u8) -> Result<Self> {
        if !IMMEDIATE_EXIT.get().is_null() {
            return Err(Error::WrongPhase("this thread has a vCPU already: each needs a thread of its own"));
        }
        unblock_signal()?;
        let kicker = std::sync::Arc::new(Kicker::default());
        IMMEDIATE_EXIT.set(immediate_exit);
        // SAFETY: gettid takes no arguments.
        kicker.set_thread(Some(unsafe { libc::gettid() }));
        Ok(Self { kicker, immediate_exit })
    }

    /// Says whether the next KVM_RUN shall come back at once.
    pub fn set_immediate_exit(&self, on: bool) {
        // SAFETY: valid by the contract of `new`. Volatile, because the signal handler and the kernel look at it.
        unsafe { self.immediate_exit.write_volatile(on.into()) };
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        self.kicker.set_thread(None);
        // A signal that is still under way finds nothing.
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Threads inherit their creator's signal mask, which may block everything.
fn unblock_signal() -> Result<()> {
    // SAFETY: an all-zero set is valid storage for sigemptyset, and each call gets pointers to live sets.
    let result = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut())
    };
    if result != 0 {
        return Err(Error::Host {
            call: "pthread_sigmask for the vCPU kick signal".into(),
            source: io::Error::from_raw_os_error(result),
        });
    }
    Ok(())
}

/// Gives the calling thread, which will run vCPU `index`, its priority.
pub fn set_priority(index: u32, priority: ThreadPriority) -> Result<()> {
    if priority == ThreadPriority::Normal {
        return Ok(());
    }
    // SAFETY: an all-zero sched_param is valid; the calls get a pointer to a live one and this thread's own handle.
    let result = unsafe {
        let mut param: libc::sched_param = std::mem::zeroed();
        param.sched_priority = libc::sched_get_priority_min(libc::SCHED_RR);
        // pthread_ and not sched_setscheduler, which musl does not have. Threads made by this one start as normal ones.
        libc::pthread_setschedparam(libc::pthread_self(), libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &param)
    };
    if result == 0 {
        return Ok(());
    }
    Err(Error::Host {
        call: format!(
            "giving the thread of vCPU {index} real-time priority (allow it with CAP_SYS_NICE or `ulimit -r 1`, or run with normal priority)"
        ),
        source: io::Error::from_raw_os_error(result),
    })
}

fn host(call: &str) -> Error {
    Error::Host { call: call.into(), source: io::Error::last_os_error() }
}
