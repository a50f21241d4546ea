//! Why a recording failed, and what to do about it.

use std::io;
use std::path::PathBuf;

/// Why `outboard record` failed. Each message says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another operating system.
    #[error(
        "recording needs Linux: it uses the kernel's dma:* trace events. Record on a Linux machine with the same device and driver"
    )]
    NotLinux,
    /// No tracefs is mounted.
    #[error("no tracefs is mounted; as root, run: mount -t tracefs nodev /sys/kernel/tracing")]
    NoTracefs,
    /// The kernel has none.
    #[error(
        "Linux {release} is built without tracing (no tracefs in /proc/filesystems): boot a distribution's kernel, 6.12 or newer"
    )]
    NoTracing {
        /// The kernel's release.
        release: String,
    },
    /// Not enough rights.
    #[error("recording needs root: {path}: {source}; run it with sudo")]
    NotRoot {
        /// What could not be done.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Lockdown, a container, a read-only mount: root, and refused all the same.
    #[error(
        "the kernel refuses tracing here: {path}: {source} (a container, or a locked-down kernel: see /sys/kernel/security/lockdown)"
    )]
    Refused {
        /// What could not be done.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel is older than the events.
    #[error(
        "Linux {release} has no dma:* trace events: they came with Linux 6.12. Boot a newer kernel (Debian: the backports' linux-image-amd64; Ubuntu: 25.04 or newer) and record there"
    )]
    TooOld {
        /// The kernel's release.
        release: String,
    },
    /// New enough, and without the events.
    #[error(
        "Linux {release} has no dma:* trace events in {path}, although it is new enough: it is built without CONFIG_EVENT_TRACING or without DMA support. Use a distribution's kernel"
    )]
    NoEvents {
        /// The kernel's release.
        release: String,
        /// Where they were looked for.
        path: PathBuf,
    },
    /// A file of tracefs could not be read or written.
    #[error("cannot {what} {path}: {source}")]
    Trace {
        /// Read, write, create.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel describes an event in an unknown way.
    #[error(
        "this kernel's {what} is unknown to this version of outboard: {detail}. Record the text instead: trace-cmd record -e 'dma:*', then trace-cmd report"
    )]
    Unknown {
        /// An event or the ring buffer.
        what: String,
        /// What was expected.
        detail: String,
    },
    /// The device named does not exist.
    #[error("there is no PCI device {device}; {there}")]
    NoDevice {
        /// Asked for.
        device: String,
        /// What there is instead, in words.
        there: String,
    },
    /// The trace could not be written.
    #[error("cannot write the trace {path}: {source}")]
    Output {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The command does not exist.
    #[error("command not found: {0}")]
    NotFound(String),
    /// The command cannot be started.
    #[error("cannot run {command}: {source}")]
    NotRunnable {
        /// Which.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// Signals could not be set up.
    #[error("cannot watch for signals: {0}")]
    Signals(io::Error),
}

impl Error {
    /// The exit status, as `env` and `timeout` have it: 127 no such command, 126 not runnable, 125 anything of our own.
    pub fn status(&self) -> u8 {
        match self {
            Self::NotFound(_) => 127,
            Self::NotRunnable { .. } => 126,
            _ => 125,
        }
    }
}
