//! Where console output goes that is not a socket's: standard output or a file, by a queue, so that nobody of the machine waits for it for long.

use super::ConsoleTarget;
use crate::{Error, terminal};
use outboard_cli::{Begin, Kind, RotatingFile, Writer};
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock};

/// Bytes that may wait for the host.
const LIMIT: usize = 64 << 10;

/// Standard output or a file, open. Until [`Outlet::begin`] nothing of it has changed: a machine that cannot start leaves files and terminal as they were.
#[derive(Debug)]
pub(crate) struct Outlet {
    target: ConsoleTarget,
    waiting: Mutex<Option<Waiting>>,
    writer: OnceLock<Writer>,
}

/// What has not begun.
#[derive(Debug)]
enum Waiting {
    Stdout(File),
    File(RotatingFile),
}

impl Outlet {
    /// Standard output, with standard input to be made raw where that is a terminal.
    ///
    /// # Errors
    /// The operating system's, when it has no descriptors left.
    pub(super) fn stdout() -> io::Result<Arc<Self>> {
        // Without std's buffer: a prompt has no newline.
        let file = io::stdout().as_fd().try_clone_to_owned()?;
        Ok(Arc::new(Self::new(ConsoleTarget::Stdio, Waiting::Stdout(file.into()))))
    }

    /// The file that `target` names.
    pub(super) fn file(target: &ConsoleTarget, file: RotatingFile) -> Arc<Self> {
        Arc::new(Self::new(target.clone(), Waiting::File(file)))
    }

    fn new(target: ConsoleTarget, waiting: Waiting) -> Self {
        Self { target, waiting: Mutex::new(Some(waiting)), writer: OnceLock::new() }
    }

    /// From here on output is written; the second time, after a reboot, it does nothing.
    ///
    /// # Errors
    /// [`Error::Console`], [`Error::Thread`].
    pub(crate) fn begin(&self) -> Result<(), Error> {
        let Some(waiting) = self.waiting.lock().unwrap_or_else(|e| e.into_inner()).take() else {
            return Ok(());
        };
        let failed = |source| Error::Console { target: self.target.to_string(), source };
        let what = format!("bytes of the guest's console ({})", self.target);
        let writer = match waiting {
            Waiting::Stdout(file) => {
                if io::stdin().is_terminal() {
                    terminal::make_raw().map_err(failed)?;
                }
                Writer::to_descriptor(&what, Kind::Stream, LIMIT, file)
            }
            Waiting::File(mut file) => {
                file.begin(Begin::Empty).map_err(failed)?;
                Writer::to_file(&what, Kind::Stream, LIMIT, file)
            }
        };
        // Only who took `waiting` comes here.
        let _ = self.writer.set(writer.map_err(Error::Thread)?);
        Ok(())
    }

    /// The queue; `None` before it has begun, when no guest runs.
    pub(super) fn writer(&self) -> Option<&Writer> {
        self.writer.get()
    }
}
