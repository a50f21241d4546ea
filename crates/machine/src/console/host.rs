use super::ConsoleTarget;
use super::escape::Escape;
use super::outlet::Outlet;
use crate::{Error, terminal};
use outboard_bus::{Event, poll_readable, poll_writable};
use outboard_cli::RotatingFile;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long what the guest has printed may take to get out once the machine stops.
const DRAIN: Duration = Duration::from_secs(2);
/// How long a reader may take nothing before output is dropped. Until then the guest is held back, so that a slow reader gets all; after it the guest goes on,
/// since a kernel that prints waits for its console with interrupts off.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longest time between two looks at whether the machine stops.
const LOOK: Duration = Duration::from_millis(50);

/// An open console target; stays open while the guest reboots.
pub(crate) struct ConsoleHost {
    end: End,
    /// The reader has taken nothing for [`PATIENCE`], and nothing since.
    stalled: bool,
}

enum End {
    None,
    Stdio { input: File, escape: Escape, terminal: bool, ended: bool, outlet: Arc<Outlet> },
    File(Arc<Outlet>),
    Socket { path: PathBuf, listener: UnixListener, client: Option<UnixStream> },
}

/// What came from the host's side.
pub(crate) enum Input {
    /// Bytes for the guest were appended.
    Some,
    /// The user wants to leave.
    Leave,
}

/// What became of output.
enum Taken {
    /// So many bytes were taken, at least one.
    Bytes(usize),
    /// None for now.
    Nothing,
    /// Nobody is there to take any.
    Nobody,
}

impl ConsoleHost {
    /// Opens `target`, and changes nothing of it before its [`Outlet::begin`].
    ///
    /// # Errors
    /// [`Error::Console`].
    pub(crate) fn open(target: &ConsoleTarget) -> Result<Self, Error> {
        let failed = |source| Error::Console { target: target.to_string(), source };
        let end = match target {
            ConsoleTarget::None => End::None,
            ConsoleTarget::Stdio => End::Stdio {
                input: io::stdin().as_fd().try_clone_to_owned().map_err(failed)?.into(),
                escape: Escape::default(),
                terminal: io::stdin().is_terminal(),
                ended: false,
                outlet: Outlet::stdout().map_err(failed)?,
            },
            ConsoleTarget::File(file) => {
                End::File(Outlet::file(target, RotatingFile::open(file).map_err(failed)?))
            }
            ConsoleTarget::Socket(path) => {
                let listener = listen(path).map_err(failed)?;
                End::Socket { path: path.clone(), listener, client: None }
            }
        };
        Ok(Self { end, stalled: false })
    }

    /// What has to begin before the guest does.
    pub(crate) fn outlet(&self) -> Option<&Arc<Outlet>> {
        match &self.end {
            End::Stdio { outlet, .. } | End::File(outlet) => Some(outlet),
            End::None | End::Socket { .. } => None,
        }
    }

    /// What to poll for input: a client's or the terminal's bytes, or the next client.
    pub(super) fn input(&self) -> Option<BorrowedFd<'_>> {
        match &self.end {
            End::None | End::File(_) | End::Stdio { ended: true, .. } => None,
            End::Stdio { input, .. } => Some(input.as_fd()),
            End::Socket { client: Some(client), .. } => Some(client.as_fd()),
            End::Socket { listener, .. } => Some(listener.as_fd()),
        }
    }

    /// Takes what is there once [`ConsoleHost::input`] is readable.
    pub(super) fn read(&mut self, out: &mut Vec<u8>) -> Input {
        let mut buffer = [0; 1024];
        match &mut self.end {
            End::None | End::File(_) => {}
            End::Stdio { input, escape, terminal, ended, .. } => match input.read(&mut buffer) {
                Ok(0) => *ended = true,
                Ok(n) if *terminal => {
                    if escape.filter(&buffer[..n], out) {
                        return Input::Leave;
                    }
                }
                Ok(n) => out.extend_from_slice(&buffer[..n]),
                Err(error) => *ended = !is_transient(&error),
            },
            End::Socket { client, listener, .. } => match client {
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

    /// Writes all of `output`, or drops what the host does not take. Waits while a reader is slow, but not for one that has stopped.
    pub(super) fn write(&mut self, mut output: &[u8], stop: &Event) {
        let (mut progress, mut stopping) = (Instant::now(), None);
        while !output.is_empty() {
            match self.take(output) {
                Taken::Bytes(taken) => {
                    output = &output[taken..];
                    self.stalled = false;
                    progress = Instant::now();
                }
                Taken::Nobody => return,
                Taken::Nothing => {
                    let is_late = stopping.is_some_and(|since: Instant| since.elapsed() >= DRAIN);
                    if self.stalled || is_late || progress.elapsed() >= PATIENCE {
                        self.stalled = true;
                        return self.lose(output.len());
                    }
                    self.wait(stop);
                    if stopping.is_none() && is_signalled(stop) {
                        stopping = Some(Instant::now());
                    }
                }
            }
        }
    }

    /// Takes as much of `output` as goes without waiting.
    fn take(&mut self, output: &[u8]) -> Taken {
        match &mut self.end {
            End::None => Taken::Nobody,
            End::Stdio { outlet, .. } | End::File(outlet) => match outlet.writer() {
                None => Taken::Nobody,
                Some(writer) => match writer.push_some(output) {
                    0 => Taken::Nothing,
                    taken => Taken::Bytes(taken),
                },
            },
            End::Socket { client, .. } => {
                let Some(stream) = client else { return Taken::Nobody };
                match stream.write(output) {
                    Ok(0) => Taken::Nothing,
                    Ok(taken) => Taken::Bytes(taken),
                    Err(error) if is_transient(&error) => Taken::Nothing,
                    Err(_) => {
                        *client = None;
                        Taken::Nobody
                    }
                }
            }
        }
    }

    /// Waits a moment for the reader.
    fn wait(&self, stop: &Event) {
        match &self.end {
            End::Stdio { outlet, .. } | End::File(outlet) => {
                if let Some(writer) = outlet.writer() {
                    writer.wait_for_room(LOOK);
                }
            }
            End::Socket { client: Some(client), .. } => {
                if !poll_writable(client.as_fd(), stop, Some(LOOK)).unwrap_or(false) {
                    // The stop event stays signalled, so from now on wait by time alone.
                    std::thread::sleep(LOOK / 10);
                }
            }
            End::None | End::Socket { .. } => {}
        }
    }

    fn lose(&self, bytes: usize) {
        match &self.end {
            End::Stdio { outlet, .. } | End::File(outlet) => {
                if let Some(writer) = outlet.writer() {
                    writer.lose(bytes);
                }
            }
            End::Socket { path, .. } => outboard_bus::warn_limited!(
                "{bytes} bytes of the guest's console (socket:{}) were lost: its client does not take them",
                path.display()
            ),
            End::None => {}
        }
    }
}

fn is_signalled(event: &Event) -> bool {
    // What cannot be asked is taken as said: then nothing waits for long.
    poll_readable(&[event.as_fd()], Some(Duration::ZERO)).map_or(true, |ready| ready[0])
}

impl Drop for ConsoleHost {
    fn drop(&mut self) {
        if let Some(writer) = self.outlet().and_then(|outlet| outlet.writer()) {
            writer.flush(if self.stalled { Duration::ZERO } else { DRAIN });
        }
        match &self.end {
            End::Stdio { .. } => terminal::restore_terminal(),
            End::Socket { path, .. } => {
                let _ = std::fs::remove_file(path);
            }
            End::None | End::File(_) => {}
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use outboard_cli::FileTarget;

    /// More than a socket's buffers take.
    const MUCH: usize = 4 << 20;

    #[test]
    fn a_client_that_stops_reading_holds_the_guest_back_once_and_gets_what_comes_later() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let mut host = ConsoleHost::open(&ConsoleTarget::Socket(path.clone())).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        host.read(&mut Vec::new());
        let stop = Event::new().unwrap();
        host.write(&vec![b'x'; MUCH], &stop);
        assert!(host.stalled, "4 MiB fit into no socket");
        let start = Instant::now();
        for _ in 0..100 {
            host.write(&[b'x'; 4096], &stop);
        }
        // A hundred times the patience would be 100 s.
        assert!(start.elapsed() < Duration::from_secs(50));
        client.set_nonblocking(true).unwrap();
        let mut buffer = vec![0; MUCH];
        while client.read(&mut buffer).is_ok() {}
        host.write(b"and on", &stop);
        client.set_nonblocking(false).unwrap();
        client.read_exact(&mut buffer[..6]).unwrap();
        assert_eq!(&buffer[..6], b"and on");
    }

    #[test]
    fn a_file_is_emptied_when_the_guest_begins_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        std::fs::write(&path, "what the last guest said").unwrap();
        let target = ConsoleTarget::File(FileTarget { path: path.clone(), limit: None });
        drop(ConsoleHost::open(&target).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"what the last guest said");
        let mut host = ConsoleHost::open(&target).unwrap();
        host.outlet().unwrap().begin().unwrap();
        host.outlet().unwrap().begin().unwrap();
        host.write(b"new", &Event::new().unwrap());
        drop(host);
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
    }

    /// Where `/dev/full` is, it stands for any disk that is full.
    #[test]
    fn a_full_disk_does_not_hold_the_guest_back() {
        if !Path::new("/dev/full").exists() {
            return;
        }
        let target = ConsoleTarget::File(FileTarget { path: "/dev/full".into(), limit: None });
        let mut host = ConsoleHost::open(&target).unwrap();
        host.outlet().unwrap().begin().unwrap();
        let stop = Event::new().unwrap();
        for _ in 0..1000 {
            host.write(&[b'x'; 4096], &stop);
        }
        assert!(!host.stalled);
    }
}
