//! The side of the VM.

use crate::{Answer, Error, Folder, Name, Request, line};
use mio::net::UnixListener;
use mio::{Events, Interest, Poll, Token, Waker};
use outboard_jail::ThreadKind;
use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// Most bytes of a request.
const MOST: usize = 4096;
/// Time for a client to send its request, and to take its reply.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections at a time; more are turned away.
const CONNECTIONS: usize = 16;

const LISTENER: Token = Token(0);
const STOP: Token = Token(1);

/// Answers requests. Called on threads of the server, several at a time; once the VM is at its end it must answer soon, since
/// the server waits for it.
pub trait Handler: Send + Sync {
    /// What was asked for, or why not, in a sentence for the user.
    ///
    /// # Errors
    /// The reason.
    fn handle(&self, request: Request) -> Result<Answer, String>;
}

/// Listens for requests to one VM until dropped.
pub struct Server {
    name: Name,
    socket: PathBuf,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    connections: Arc<Connections>,
    // Last: whoever gets the lock next finds no socket of ours.
    lock: Lock,
}

impl Server {
    /// Listens as `name`; a socket that a killed process left behind is replaced. Without a name the first free one of vm1, vm2, … is taken.
    ///
    /// # Errors
    /// [`Error::Taken`] while another process has the name, [`Error::Unsafe`], [`Error::File`], [`Error::Resources`].
    pub fn start(
        folder: &Folder,
        name: Option<Name>,
        handler: impl FnOnce(&Name) -> Arc<dyn Handler>,
    ) -> Result<Self, Error> {
        folder.create()?;
        let (name, lock) = match name {
            Some(name) => (name.clone(), Lock::take(folder, &name)?.ok_or(Error::Taken(name))?),
            None => first_free(folder)?,
        };
        let socket = folder.socket(&name);
        let failed = |what| {
            let path = socket.clone();
            move |source| Error::File { what, path, source }
        };
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("removing")(error)),
            _ => {}
        }
        let mut listener = UnixListener::bind(&socket).map_err(failed("listening on"))?;
        std::fs::set_permissions(&socket, Permissions::from_mode(0o600)).map_err(failed("protecting"))?;
        let poll = Poll::new().map_err(Error::Resources)?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE).map_err(Error::Resources)?;
        let waker = Waker::new(poll.registry(), STOP).map_err(Error::Resources)?;
        let connections = Arc::new(Connections { handler: handler(&name), open: Mutex::default() });
        let its = connections.clone();
        let body = move || {
            if let Err(error) = accept(poll, &listener, &its) {
                tracing::warn!("waiting for control requests: {error}; there are no more from here on");
            }
        };
        let thread = outboard_jail::spawn(ThreadKind::Control, "control", body).map_err(Error::Resources)?;
        Ok(Self { name, socket, waker, thread: Some(thread), connections, lock })
    }

    /// The VM's name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The files that are removed when it is dropped.
    pub fn files(&self) -> [&Path; 2] {
        [&self.socket, &self.lock.path]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It is ours: we have the lock. If it is gone already, so be it.
        let _ = outboard_jail::remove_file(&self.socket);
        if let Err(error) = self.waker.wake() {
            tracing::warn!("the control socket's thread cannot be stopped: {error}");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
        self.connections.finish();
    }
}

/// Turns clients into threads until woken up to stop.
fn accept(mut poll: Poll, listener: &UnixListener, connections: &Arc<Connections>) -> io::Result<()> {
    let mut events = Events::with_capacity(4);
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            polled => polled?,
        }
        // It waits since before the process was confined.
        outboard_jail::confine(ThreadKind::Control);
        if events.iter().any(|event| event.token() == STOP) {
            return Ok(());
        }
        loop {
            match listener.accept() {
                Ok((stream, _)) => connections.add(stream.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    // Out of descriptors, most likely. The client waits in the backlog until the next one wakes us.
                    tracing::debug!("a control connection was not taken: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                    break;
                }
            }
        }
    }
}

/// Clients that are being served.
struct Connections {
    handler: Arc<dyn Handler>,
    open: Mutex<Vec<(UnixStream, JoinHandle<()>)>>,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Vec<(UnixStream, JoinHandle<()>)>> {
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Serves `stream` on a thread of its own, if there is room.
    fn add(&self, stream: UnixStream) {
        let mut open = self.lock();
        open.retain(|(_, thread)| !thread.is_finished());
        if open.len() >= CONNECTIONS {
            // The socket's own buffer has room for this; it is still non-blocking.
            let _ = (&stream).write_all(b"{\"error\":\"too many requests at a time; try again\"}\n");
            return;
        }
        let handler = self.handler.clone();
        let served = stream.set_nonblocking(false).and_then(|()| {
            let ours = stream.try_clone()?;
            let body = move || {
                serve(&stream, &*handler);
                // By itself it closes only with `ours`. The client may be gone already.
                let _ = stream.shutdown(Shutdown::Both);
            };
            Ok((ours, outboard_jail::spawn(ThreadKind::Control, "control client", body)?))
        });
        match served {
            Ok(connection) => open.push(connection),
            Err(error) => tracing::debug!("a control client was not served: {error}"),
        }
    }

    /// Ends those that only wait for a request, and waits for the others to be answered.
    fn finish(&self) {
        let open = std::mem::take(&mut *self.lock());
        for (stream, _) in &open {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Read);
        }
        for (_, thread) in open {
            let _ = thread.join();
        }
    }
}

/// One request, one reply.
fn serve(stream: &UnixStream, handler: &dyn Handler) {
    let answer = match line::read(stream, MOST, PATIENCE) {
        Ok(line) => match serde_json::from_slice::<Request>(&line) {
            Ok(request) => handler.handle(request).unwrap_or_else(Answer::Error),
            Err(error) => Answer::Error(format!("the request is not understood: {error}")),
        },
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Answer::Error(format!("the request is longer than {MOST} bytes"))
        }
        // It said nothing: a look at whether somebody listens.
        Err(_) => return,
    };
    let text = serde_json::to_string(&answer).expect("answers are plain data");
    if let Err(error) = line::write(stream, text, PATIENCE) {
        tracing::debug!("a control client did not take its reply: {error}");
    }
}

/// A file that is locked as long as the process that has the name lives, however it ends.
struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// `None` if another process has it.
    fn take(folder: &Folder, name: &Name) -> Result<Option<Self>, Error> {
        let path = folder.lock(name);
        let failed = |what| {
            let path = path.clone();
            move |source| Error::File { what, path, source }
        };
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(&path).map_err(failed("creating"))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(failed("locking")(error)),
            }
            // Between opening and locking its owner may have removed it: then this is the lock of nothing.
            let same = |now: std::fs::Metadata| file.metadata().map(|ours| ours.ino() == now.ino());
            if std::fs::metadata(&path).and_then(same).unwrap_or(false) {
                return Ok(Some(Self { path, file }));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is still locked, so that it is ours that is removed.
        let _ = outboard_jail::remove_file(&self.path);
        let _ = self.file.unlock();
    }
}

fn first_free(folder: &Folder) -> Result<(Name, Lock), Error> {
    let mut number = 1;
    loop {
        let name = Name::numbered(number);
        if let Some(lock) = Lock::take(folder, &name)? {
            return Ok((name, lock));
        }
        number += 1;
    }
}
