//! The host's end of a guest console: terminal, file or Unix socket, and the thread between it and the UART.

mod escape;
mod host;
mod outlet;
mod panic_watch;
mod pump;
mod virtio;

pub(crate) use host::ConsoleHost;
pub(crate) use outlet::Outlet;
pub(crate) use panic_watch::PanicWatch;
pub(crate) use pump::ConsolePump;
pub(crate) use virtio::VirtioEnd;

use outboard_cli::FileTarget;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a guest console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// Nowhere: output is dropped, there is no input.
    None,
    /// This process's standard input and output.
    Stdio,
    /// A file that takes the output, emptied first and kept to a size; there is no input.
    File(FileTarget),
    /// A Unix socket that takes one client at a time; output is dropped while there is none.
    Socket(PathBuf),
}

impl FromStr for ConsoleTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", file)) => file.parse().map(Self::File),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(format!("'{text}' is not one of stdio, none, file:PATH[,limit=SIZE|off], socket:PATH")),
        }
    }
}

impl fmt::Display for ConsoleTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Stdio => f.write_str("stdio"),
            Self::File(file) => write!(f, "file:{file}"),
            Self::Socket(path) => write!(f, "socket:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_read_back_as_they_are_written() {
        for text in ["stdio", "none", "file:/tmp/con", "file:a,limit=128K", "socket:a b:c"] {
            assert_eq!(text.parse::<ConsoleTarget>().unwrap().to_string(), text);
        }
        for text in ["", "tty", "file:", "file:a,limit=512iB", "socket:", "stdio:x"] {
            assert!(text.parse::<ConsoleTarget>().is_err(), "{text}");
        }
    }
}
