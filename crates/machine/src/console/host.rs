use super::ConsoleTarget;
use super::escape::Escape;
use crate::{Error, terminal};
use outboard_bus::{Event, poll_writable};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long what the guest has printed may take to get out once the machine stops.
const DRAIN: Duration = Duration::from_secs(2);
/// Most bytes that a pipe takes without blocking once poll(2) says that it takes any (PIPE_BUF).
const PIECE: usize = 4096;

/// An open console target; stays open while the guest reboots.
pub(crate) enum ConsoleHost {
    None,
    Stdio { escape: Escape, terminal: bool, ended: bool },
    File(File),
    Socket { path: PathBuf, listener: UnixListener, client: Option<UnixStream> },
}

/// What came from the host's side.
pub(crate) enum Input {
    /// Bytes for the guest were appended.
    Some,
    /// The user wants to leave.
    Leave,
}

impl ConsoleHost {
    /// Opens `target`. A terminal becomes raw.
    ///
    /// # Errors
    /// [`Error::Console`].
    pub(crate) fn open(target: &ConsoleTarget) -> Result<Self, Error> {
        let failed = |source| Error::Console { target: target.to_string(), source };
        match target {
            ConsoleTarget::None => Ok(Self::None),
            ConsoleTarget::Stdio => {
                let terminal = io::stdin().is_terminal();
                if terminal {
                    terminal::make_raw().map_err(failed)?;
                }
                Ok(Self::Stdio { escape: Escape::default(), terminal, ended: false })
            }
            ConsoleTarget::File(path) => File::create(path).map(Self::File).map_err(failed),
            ConsoleTarget::Socket(path) => {
                let listener = listen(path).map_err(failed)?;
                Ok(Self::Socket { path: path.clone(), listener, client: None })
            }
        }
    }

    /// What to poll for input: a client's or the terminal's bytes, or the next client.
    pub(super) fn input(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::None | Self::File(_) | Self::Stdio { ended: true, .. } => None,
            Self::Stdio { .. } => Some(STDIN.as_fd()),
            Self::Socket { client: Some(client), .. } => Some(client.as_fd()),
            Self::Socket { listener, .. } => Some(listener.as_fd()),
        }
    }

    /// Takes what is there once [`ConsoleHost::input`] is readable.
    pub(super) fn read(&mut self, out: &mut Vec<u8>) -> Input {
        let mut buffer = [0; 1024];
        match self {
            Self::None | Self::File(_) => {}
            Self::Stdio { escape, terminal, ended } => match (&*STDIN).read(&mut buffer) {
                Ok(0) => *ended = true,
                Ok(n) if *terminal => {
                    if escape.filter(&buffer[..n], out) {
                        return Input::Leave;
                    }
                }
                Ok(n) => out.extend_from_slice(&buffer[..n]),
                Err(error) => *ended = !is_transient(&error),
            },
            Self::Socket { client, listener, .. } => match client {
                None => {
                    *client =
                        listener.accept().ok().and_then(|(c, _)| c.set_nonblocking(true).is_ok().then_some(c))
                }
                Some(stream) => match stream.read(&mut buffer) {
                    Ok(0) => *client = None,
                    Ok(n) => out.extend_from_slice(&buffer[..n]),
                    Err(error) if is_transient(&error) => {}
                    Err(_) => *client = None,
                },
            },
        }
        Input::Some
    }

    /// Writes all of `output`, waiting while the host does not take it; after `stop` only for a while.
    pub(super) fn write(&mut self, mut output: &[u8], stop: &Event) {
        let mut deadline = None;
        while !output.is_empty() {
            let Some(fd) = self.output() else { return };
            let timeout = deadline.map(|d: Instant| d.saturating_duration_since(Instant::now()));
            let ready = match (poll_writable(fd, stop, timeout), timeout) {
                (Ok(ready), _) => ready,
                (Err(_), _) => return,
            };
            if !ready {
                match deadline {
                    // The stop event stays signalled, so from now on wait by time alone.
                    None => deadline = Some(Instant::now() + DRAIN),
                    Some(deadline) if Instant::now() >= deadline => return,
                    Some(_) => std::thread::sleep(Duration::from_millis(5)),
                }
                continue;
            }
            match self.write_some(&output[..output.len().min(PIECE)]) {
                Ok(n) => output = &output[n..],
                Err(error) if is_transient(&error) => {}
                Err(_) => return self.lose_output(),
            }
        }
    }

    fn output(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::None | Self::Socket { client: None, .. } => None,
            Self::Stdio { .. } => Some(STDOUT.as_fd()),
            Self::File(file) => Some(file.as_fd()),
            Self::Socket { client: Some(client), .. } => Some(client.as_fd()),
        }
    }

    fn write_some(&mut self, output: &[u8]) -> io::Result<usize> {
        match self {
            Self::None => Ok(output.len()),
            // Not through std's line buffer: a prompt has no newline.
            Self::Stdio { .. } => (&*STDOUT).write(output),
            Self::File(file) => file.write(output),
            Self::Socket { client, .. } => client.as_mut().map_or(Ok(output.len()), |c| c.write(output)),
        }
    }

    /// The target takes no more: a closed pipe, a full disk, a client that went.
    fn lose_output(&mut self) {
        match self {
            Self::Socket { client, .. } => *client = None,
            Self::File(_) | Self::Stdio { .. } => {
                outboard_bus::warn_limited!(
                    "the guest's console output can no longer be written and is dropped"
                );
            }
            Self::None => {}
        }
    }
}

impl Drop for ConsoleHost {
    fn drop(&mut self) {
        match self {
            Self::Stdio { .. } => terminal::restore_terminal(),
            Self::Socket { path, .. } => {
                let _ = outboard_jail::remove_file(path);
            }
            Self::None | Self::File(_) => {}
        }
    }
}

/// Standard input and output without std's buffers and locks.
static STDIN: std::sync::LazyLock<File> = std::sync::LazyLock::new(|| duplicate(io::stdin().as_fd()));
static STDOUT: std::sync::LazyLock<File> = std::sync::LazyLock::new(|| duplicate(io::stdout().as_fd()));

fn duplicate(fd: BorrowedFd<'_>) -> File {
    // A process started without the descriptor reads and writes nothing instead.
    fd.try_clone_to_owned().map(File::from).unwrap_or_else(|_| {
        File::options().read(true).write(true).open("/dev/null").expect("every Unix has /dev/null")
    })
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Listens at `path`; a socket that a dead process left there is replaced, anything else is not.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let stale = || UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && stale() => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}
