//! The jail: what the process may still do once its machine is set up.
//!
//! [`enter`] is called once, when everything that was asked for is open and no guest has run. From there on threads come from [`spawn`] and are
//! confined by their [`ThreadKind`].

mod kind;
mod limits;
mod policy;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
use linux as system;
#[cfg(not(target_os = "linux"))]
mod elsewhere;
#[cfg(not(target_os = "linux"))]
use elsewhere as system;

pub use kind::ThreadKind;
pub use policy::{Access, Confinement, Mode, Policy};

use std::io;
use std::path::Path;
use std::thread::JoinHandle;

/// Exit status of a process that a forbidden system call ended.
pub const VIOLATION_STATUS: i32 = 5;

/// The jail could not be entered although the host has what it takes.
#[derive(Debug, thiserror::Error)]
#[error("the process could not be confined: {call}; `--jail off` runs without that protection")]
pub struct Error {
    /// What failed.
    pub call: String,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl Error {
    fn new(call: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let source = io::Error::other(source);
        Self { call: format!("{}: {source}", call.into()), source }
    }
}

/// Confines the calling thread, which is the main one, and all that are started from here on, as `policy` says. What is open stays open.
///
/// Threads that run already are confined by a filter that holds for the whole process, those from [`spawn`] also by the rules for files; the filter
/// of their kind they take on themselves, with [`confine`].
///
/// # Errors
/// [`Error`] if the host has what it takes and refuses all the same. What it does not have is left out, and said in the answer.
pub fn enter(policy: &Policy) -> Result<Confinement, Error> {
    if policy.mode == Mode::Off {
        return Ok(Confinement { mode: Mode::Off, landlock: None, seccomp: false, missing: Vec::new() });
    }
    limits::forget_environment();
    limits::lower(policy.memory).map_err(|source| Error::new("limiting core files and memory", source))?;
    system::enter(policy)
}

/// Starts a thread called `name`, confined to what threads of its kind do if the process is.
///
/// # Errors
/// The operating system's, when there can be no more threads.
pub fn spawn<T: Send + 'static>(
    kind: ThreadKind,
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    system::spawn(kind, name.to_owned(), body)
}

/// Confines the calling thread for good, if the process is confined by now; does nothing the second time. For the loops of threads that are
/// started before [`enter`].
pub fn confine(kind: ThreadKind) {
    system::confine(kind);
}

/// Reads `path`, which is in [`Policy::reread`].
///
/// # Errors
/// That of reading it.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    system::read_file(path)
}

/// Removes `path`, which is in [`Policy::remove`].
///
/// # Errors
/// That of removing it.
pub fn remove_file(path: &Path) -> io::Result<()> {
    system::remove_file(path)
}

/// The allow-list as the text of docs/jail.md has it: a table of system calls by kind of thread.
#[cfg(target_os = "linux")]
pub fn table() -> String {
    linux::table()
}
