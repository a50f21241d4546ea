use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// How the process is confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// A forbidden system call ends the process, a forbidden file cannot be opened.
    #[default]
    On,
    /// Not at all.
    Off,
    /// Forbidden system calls are made, and the kernel logs them (`dmesg`, `ausearch -m SECCOMP`); files are not restricted.
    Log,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            "log" => Ok(Self::Log),
            _ => Err(format!("'{text}' is not one of on, off, log")),
        }
    }
}

/// What a process may do with a place that is not open yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Read the file.
    Read,
    /// Read the folder's listing and every file below it.
    ReadBelow,
    /// Write the file.
    Write,
    /// Read, write and control the device, or every device below the folder.
    Device,
    /// Create, write, rename and remove files in the folder: rotation of a log.
    Rotate,
}

/// What stays possible after [`crate::enter`], beside what is open by then.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// How strictly.
    pub mode: Mode,
    /// Places that may still be opened; what does not exist is left out.
    pub files: Vec<(PathBuf, Access)>,
    /// Files that others may replace while the machine runs, read with [`crate::read_file`] only.
    pub reread: Vec<PathBuf>,
    /// Files of ours that are removed at the end with [`crate::remove_file`].
    pub remove: Vec<PathBuf>,
    /// TCP connections may be made: there is a user-mode network.
    pub network: bool,
    /// Bytes of private memory the process may have at most, guest memory included.
    pub memory: u64,
    /// Called before a violation ends the process, from a signal handler: it must be async-signal-safe.
    pub last_words: Option<fn()>,
}

/// How far the process is confined, for `outboard status` and the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// Asked for with `--jail`.
    pub mode: Mode,
    /// Landlock's ABI that is in force; `None` without Landlock.
    pub landlock: Option<u32>,
    /// Seccomp filters are in force.
    pub seccomp: bool,
    /// What this host cannot do, each a clause.
    pub missing: Vec<String>,
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Mode::Off => return f.write_str("off"),
            Mode::Log => f.write_str("only logs")?,
            Mode::On => f.write_str("on")?,
        }
        match (self.seccomp, self.landlock) {
            (true, Some(abi)) => write!(f, " (seccomp, Landlock ABI {abi})")?,
            (true, None) => f.write_str(" (seccomp)")?,
            (false, Some(abi)) => write!(f, " (Landlock ABI {abi})")?,
            (false, None) => {}
        }
        if self.missing.is_empty() { Ok(()) } else { write!(f, "; missing: {}", self.missing.join("; ")) }
    }
}
