use crate::Name;
use std::io;
use std::path::PathBuf;

/// Why a VM cannot be reached, or does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No name for a VM.
    #[error(
        "'{0}' is no name for a virtual machine: give 1 to 32 letters, digits, '-', '_' or '.', beginning with a letter or digit"
    )]
    BadName(String),
    /// Another running VM has it.
    #[error(
        "a virtual machine called '{0}' is running already (`outboard status` shows it): give another --name"
    )]
    Taken(Name),
    /// No such VM.
    #[error("no virtual machine called '{0}' is running; `outboard status` lists those of this user")]
    NotRunning(Name),
    /// The folder for sockets belongs to somebody else, or others may enter it.
    #[error("{path} {why}: remove it, or set XDG_RUNTIME_DIR to a folder of your own")]
    Unsafe {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A file, folder or socket.
    #[error("{what} {path}: {source}; check who owns it, or set XDG_RUNTIME_DIR to a folder of your own")]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// It did not answer.
    #[error("the virtual machine '{name}' does not answer: {why}; its log may say what it is doing")]
    NoAnswer {
        /// Which.
        name: Name,
        /// In what way.
        why: String,
    },
    /// It answered that it cannot.
    #[error("{0}")]
    Refused(String),
    /// A thread or a poll could not be made.
    #[error(
        "listening for control requests: {0}; raise the limits on processes and open files (ulimit -u, ulimit -n)"
    )]
    Resources(#[source] io::Error),
}
