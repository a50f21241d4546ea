//! Hosts without seccomp and Landlock. A Mac confines a process with a profile that it is started under (macos/outboard.sb).

use crate::{Confinement, Error, Policy, ThreadKind};
use std::io;
use std::path::Path;
use std::thread::JoinHandle;

pub(crate) fn enter(policy: &Policy) -> Result<Confinement, Error> {
    let missing = vec!["a sandbox: this host takes macos/outboard.sb from whoever starts the process".into()];
    Ok(Confinement { mode: policy.mode, landlock: None, seccomp: false, missing })
}

pub(crate) fn spawn<T: Send + 'static>(
    _: ThreadKind,
    name: String,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    std::thread::Builder::new().name(name).spawn(body)
}

pub(crate) fn confine(_: ThreadKind) {}

pub(crate) fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    std::fs::read(path)
}

pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path)
}
