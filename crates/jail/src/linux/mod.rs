//! Seccomp filters by kind of thread, Landlock, and what they make necessary.

#![allow(unsafe_code)] // UNSAFETY: signal handler, fork(2), and system calls without wrappers.

mod calls;
mod early;
mod files;
mod filter;
mod keeper;
mod spawner;
mod table;
mod violation;

#[cfg(test)]
mod tests;

use crate::{Confinement, Error, Mode, Policy, ThreadKind, VIOLATION_STATUS};
use calls::Who;
use keeper::Keeper;
use landlock::RulesetCreated;
use spawner::Spawner;
use std::cell::Cell;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;
use std::thread::JoinHandle;

pub(crate) use table::table;

/// What confined threads share; there from [`enter`] on.
struct Jail {
    mode: Mode,
    seccomp: bool,
    /// For threads that were started before.
    rules: Option<OwnedFd>,
    keeper: Option<Keeper>,
    spawner: Spawner,
}

static JAIL: OnceLock<Jail> = OnceLock::new();

thread_local! {
    /// The thread was started by one that Landlock binds, and so it is bound as well.
    static BOUND: Cell<bool> = const { Cell::new(false) };
}

pub(crate) fn enter(policy: &Policy) -> Result<Confinement, Error> {
    let seccomp = has_seccomp();
    let abi = files::abi().filter(|_| policy.mode == Mode::On);
    let missing = missing(seccomp, abi, policy.mode);
    // Also without seccomp: nothing that the process executes gets more rights than it has.
    no_new_privileges().map_err(|source| Error::new("prctl(PR_SET_NO_NEW_PRIVS)", source))?;
    violation::install(policy.last_words).map_err(|source| Error::new("sigaction for SIGSYS", source))?;
    let keeper = match policy.mode {
        Mode::On => Keeper::start(policy, abi.is_some(), seccomp)?,
        Mode::Off | Mode::Log => None,
    };
    let mut rules = None;
    if abi.is_some() {
        let created = files::of_process(policy)?;
        rules = duplicate(&created)?;
        created.restrict_self().map_err(|error| Error::new("landlock_restrict_self", error))?;
    }
    BOUND.set(true);
    if seccomp {
        let who = Who { process: std::process::id(), thread: None };
        for filter in filter::of_process(who, policy.mode)? {
            seccompiler::apply_filter_all_threads(&filter)
                .map_err(|error| Error::new("seccomp for the whole process", error))?;
        }
    }
    if let Some(rules) = &rules {
        early::bind(rules.as_fd())?;
    }
    let spawner = Spawner::start().map_err(|source| Error::new("starting a thread", source))?;
    let jail = Jail { mode: policy.mode, seccomp, rules, keeper, spawner };
    if JAIL.set(jail).is_err() {
        return Err(Error::new(
            "a second machine in one process",
            io::Error::from(io::ErrorKind::AlreadyExists),
        ));
    }
    confine(ThreadKind::Main);
    Ok(Confinement { mode: policy.mode, landlock: abi, seccomp, missing })
}

fn missing(seccomp: bool, abi: Option<u32>, mode: Mode) -> Vec<String> {
    let mut missing = Vec::new();
    if !seccomp {
        missing.push("seccomp, which this host's kernel does not have (CONFIG_SECCOMP_FILTER)".to_owned());
    }
    if abi.is_none() && mode == Mode::On {
        missing.push(
            "Landlock, which this host's kernel does not have or not switched on (Linux 5.13, `lsm=landlock,…`)".to_owned(),
        );
    }
    missing
}

fn has_seccomp() -> bool {
    // SAFETY: the call takes no pointers. The action's number is looked at in memory of this process.
    let action: libc::c_uint = libc::SECCOMP_RET_TRAP;
    // SAFETY: `action` is readable.
    unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, std::ptr::from_ref(&action)) == 0
    }
}

fn no_new_privileges() -> io::Result<()> {
    // SAFETY: the call takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn duplicate(rules: &RulesetCreated) -> Result<Option<OwnedFd>, Error> {
    let copy = rules.try_clone().map_err(|source| Error::new("dup of Landlock rules", source))?;
    Ok(copy.into())
}

pub(crate) fn spawn<T: Send + 'static>(
    kind: ThreadKind,
    name: String,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let jail = JAIL.get();
    let is_early = jail.is_none();
    let (listed, is_listed) = std::sync::mpsc::channel();
    let start = move || {
        std::thread::Builder::new().name(name).spawn(move || {
            BOUND.set(!is_early);
            let _listed = is_early.then(early::Listed::new);
            // Nobody may wait any more.
            let _ = listed.send(());
            confine(kind);
            body()
        })
    };
    match jail {
        Some(jail) => jail.spawner.run(start),
        None => {
            let thread = start()?;
            // `enter` must find it. It has ended already where this fails.
            let _ = is_listed.recv();
            Ok(thread)
        }
    }
}

pub(crate) fn confine(kind: ThreadKind) {
    let Some(jail) = JAIL.get() else { return };
    if violation::kind().is_some() {
        return;
    }
    violation::set_kind(kind);
    if let Err(error) = jail.confine(kind) {
        // Where nobody reads it the status says it.
        let _ = writeln!(io::stderr(), "outboard: {error}");
        std::process::exit(VIOLATION_STATUS);
    }
}

impl Jail {
    fn confine(&self, kind: ThreadKind) -> Result<(), Error> {
        if let Some(rules) = self.rules.as_ref().filter(|_| !BOUND.get()) {
            // SAFETY: the call takes a descriptor and flags.
            if unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) } < 0 {
                return Err(Error::new("landlock_restrict_self", io::Error::last_os_error()));
            }
        }
        if !self.seccomp {
            return Ok(());
        }
        // SAFETY: gettid takes no arguments.
        let thread = unsafe { libc::gettid() }.cast_unsigned();
        let who = Who { process: std::process::id(), thread: Some(thread) };
        let filter = filter::of_thread(kind, who, self.mode)?;
        seccompiler::apply_filter(&filter).map_err(|error| Error::new("seccomp", error))
    }
}

pub(crate) fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    match JAIL.get().and_then(|jail| jail.keeper.as_ref()) {
        Some(keeper) => keeper.read(path),
        None => std::fs::read(path),
    }
}

pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    match JAIL.get().and_then(|jail| jail.keeper.as_ref()) {
        Some(keeper) => keeper.remove(path),
        None => std::fs::remove_file(path),
    }
}
