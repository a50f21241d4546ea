//! A process beside the machine's own for the two things that Landlock has no rule for: to read a file that others replace (resolv.conf), and
//! to remove sockets of ours without the right to remove what lies beside them. It takes the number of a file in a list that was fixed
//! before it was made, and nothing else; of the machine it has no descriptor.
//!
//! It comes into being by fork(2) in a process that may have other threads, so all it does is async-signal-safe: system calls on what was
//! prepared before.

use super::files::{folders_of, ruleset};
use super::filter;
use crate::linux::calls::keeper_calls;
use crate::{Error, Mode, Policy};
use seccompiler::BpfProgram;
use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Most bytes of a file that is read: resolv.conf(5) has three servers.
const MOST: usize = 64 << 10;
const READ: u8 = b'r';
const REMOVE: u8 = b'x';

/// This side of it.
pub(super) struct Keeper {
    stream: Mutex<UnixStream>,
    reread: Vec<PathBuf>,
    remove: Vec<PathBuf>,
}

impl Keeper {
    /// Starts it; `None` if there is nothing for it to do.
    pub(super) fn start(policy: &Policy, landlock: bool, seccomp: bool) -> Result<Option<Self>, Error> {
        if policy.reread.is_empty() && policy.remove.is_empty() {
            return Ok(None);
        }
        let failed = |error: io::Error| Error::new("starting a process that keeps files", error);
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let names = |paths: &[PathBuf]| {
            let name = |path: &PathBuf| CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
            paths.iter().map(name).collect::<Vec<_>>()
        };
        let (reread, remove) = (names(&policy.reread), names(&policy.remove));
        let rules = if landlock { Some(own_rules(policy)?) } else { None };
        let filter = if seccomp { Some(filter::compile(&keeper_calls(), Mode::On)?) } else { None };
        let mut buffer = vec![0; MOST];
        // SAFETY: the child calls nothing but `serve`, which is async-signal-safe, and never returns.
        match unsafe { libc::fork() } {
            0 => serve(theirs.as_raw_fd(), (&reread, &remove), &mut buffer, rules, filter),
            process if process > 0 => {
                let (reread, remove) = (policy.reread.clone(), policy.remove.clone());
                Ok(Some(Self { stream: Mutex::new(ours), reread, remove }))
            }
            _ => Err(failed(io::Error::last_os_error())),
        }
    }

    /// Has it read `path`.
    pub(super) fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.ask(READ, index(&self.reread, path)?)
    }

    /// Has it remove `path`.
    pub(super) fn remove(&self, path: &Path) -> io::Result<()> {
        self.ask(REMOVE, index(&self.remove, path)?).map(drop)
    }

    /// Request: what and which. Answer: an error number or 0, a length, so many bytes.
    fn ask(&self, what: u8, which: u8) -> io::Result<Vec<u8>> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(&[what, which])?;
        let mut head = [0; 8];
        stream.read_exact(&mut head)?;
        let [a, b, c, d, e, f, g, h] = head;
        let (error, len) = (i32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let mut bytes = vec![0; (len as usize).min(MOST)];
        stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn index(paths: &[PathBuf], path: &Path) -> io::Result<u8> {
    let found = paths.iter().position(|known| known == path);
    found.and_then(|index| u8::try_from(index).ok()).ok_or_else(|| io::ErrorKind::PermissionDenied.into())
}

/// Landlock has no "this name in that folder": what the child may do in these folders is bounded by its list.
fn own_rules(policy: &Policy) -> Result<landlock::RulesetCreated, Error> {
    use crate::Access;
    let read =
        policy.reread.iter().flat_map(|path| folders_of(path)).map(|folder| (folder, Access::ReadBelow));
    let remove =
        policy.remove.iter().flat_map(|path| folders_of(path)).map(|folder| (folder, Access::Rotate));
    ruleset(&read.chain(remove).collect::<Vec<_>>(), false)
}

/// The child's whole life.
fn serve(
    socket: libc::c_int,
    (reread, remove): (&[CString], &[CString]),
    buffer: &mut [u8],
    rules: Option<landlock::RulesetCreated>,
    filter: Option<BpfProgram>,
) -> ! {
    const STREAM: libc::c_int = 3;
    // SAFETY: system calls on descriptors of this process and on memory that was prepared before the fork.
    unsafe {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGPIPE, libc::SIGTSTP]
        {
            libc::signal(signal, libc::SIG_IGN);
        }
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        // Before the descriptors go: it is one of them.
        if let Some(rules) = rules
            && rules.restrict_self().is_err()
        {
            libc::_exit(1);
        }
        for standard in 0..3 {
            libc::dup2(null, standard);
        }
        if socket != STREAM {
            libc::dup2(socket, STREAM);
        }
        libc::syscall(libc::SYS_close_range, STREAM + 1, libc::c_uint::MAX, 0);
        if let Some(filter) = &filter
            && seccompiler::apply_filter(filter).is_err()
        {
            libc::_exit(1);
        }
        loop {
            let mut request = [0u8; 2];
            if libc::recv(STREAM, request.as_mut_ptr().cast(), 2, libc::MSG_WAITALL) != 2 {
                libc::_exit(0);
            }
            let which = usize::from(request[1]);
            let done = match request[0] {
                READ => reread.get(which).map(|path| read_into(path, buffer)),
                REMOVE => remove
                    .get(which)
                    .map(|path| if libc::unlink(path.as_ptr()) < 0 { Err(errno()) } else { Ok(0) }),
                _ => None,
            };
            let (error, len) = match done.unwrap_or(Err(libc::EINVAL)) {
                Ok(len) => (0, len),
                Err(error) => (error, 0),
            };
            let mut head = [0; 8];
            head[..4].copy_from_slice(&error.to_ne_bytes());
            head[4..].copy_from_slice(&(len as u32).to_ne_bytes());
            send_all(STREAM, &head);
            send_all(STREAM, &buffer[..len]);
        }
    }
}

fn errno() -> libc::c_int {
    // SAFETY: the C library's errno of this thread.
    unsafe { *libc::__errno_location() }
}

/// # Safety
/// For the child only, where nothing else uses descriptors.
unsafe fn read_into(path: &CString, buffer: &mut [u8]) -> Result<usize, libc::c_int> {
    // SAFETY: the path ends in NUL, each read goes into the rest of the buffer.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK);
        if fd < 0 {
            return Err(errno());
        }
        let mut len = 0;
        while len < buffer.len() {
            let n = libc::read(fd, buffer[len..].as_mut_ptr().cast(), buffer.len() - len);
            if n <= 0 {
                break;
            }
            len += n as usize;
        }
        libc::close(fd);
        Ok(len)
    }
}

/// # Safety
/// `socket` is this process's own.
unsafe fn send_all(socket: libc::c_int, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the bytes are readable.
        let n = unsafe { libc::send(socket, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
        match usize::try_from(n) {
            Ok(n) if n > 0 => bytes = &bytes[n..],
            // The other side has gone, which the next request shows.
            _ => return,
        }
    }
}
