//! Sockets to the host.

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept as accept_fd, bind, connect,
    listen as listen_fd, socket,
};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The host's address (virtio 1.2, 5.10.4), and any.
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;

fn new_socket() -> Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .context("no vsock in this kernel")
}

/// Listens on `port`.
pub fn listen(port: u32) -> Result<OwnedFd> {
    let fd = new_socket()?;
    bind(fd.as_raw_fd(), &VsockAddr::new(ANY, port)).context("cannot bind a vsock port")?;
    listen_fd(&fd, Backlog::new(4)?)?;
    Ok(fd)
}

/// Takes a connection.
pub fn accept(listener: &OwnedFd) -> Result<File> {
    let fd = accept_fd(listener.as_raw_fd()).context("cannot accept on a vsock port")?;
    #[allow(unsafe_code)] // UNSAFETY: nix returns a bare number here.
    // SAFETY: the number was just given to this process, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(File::from(fd))
}

/// Connects to `port` of the host.
pub fn connect_to_host(port: u32) -> Result<File> {
    let fd = new_socket()?;
    connect(fd.as_raw_fd(), &VsockAddr::new(HOST, port))
        .context("cannot connect to the host's vsock port")?;
    Ok(File::from(fd))
}
