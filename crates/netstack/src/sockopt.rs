//! Options of the host's datagram sockets that neither std nor socket2 has.

#![allow(unsafe_code)] // UNSAFETY: setsockopt(2) and getsockopt(2) have no wrapper for these options.

pub(crate) use system::{forget_errors, path_mtu, report_all_errors, set_dont_fragment};

use std::io;
use std::os::fd::RawFd;

/// Sets the IPv4 option `name` to `value`.
fn set(fd: RawFd, name: i32, value: i32) -> io::Result<()> {
    let len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the system reads `len` bytes at the address of `value`, which lives until the call returns.
    let result = unsafe { libc::setsockopt(fd, libc::IPPROTO_IP, name, (&raw const value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(target_os = "linux")]
mod system {
    use super::set;
    use mio::net::UdpSocket;
    use std::io;
    use std::mem::MaybeUninit;
    use std::os::fd::AsRawFd;

    /// Has `socket` report every ICMP error for what it sent, not only the fatal ones.
    pub(crate) fn report_all_errors(socket: &UdpSocket) -> io::Result<()> {
        set(socket.as_raw_fd(), libc::IP_RECVERR, 1)
    }

    /// Throws away what the system keeps of errors that were already reported: it would fill the socket's buffer.
    pub(crate) fn forget_errors(socket: &UdpSocket) {
        let socket = socket2::SockRef::from(socket);
        let mut packet = [MaybeUninit::uninit(); 1];
        while socket.recv_with_flags(&mut packet, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT).is_ok() {}
    }

    /// Forbids or allows fragments of what `socket` sends; where they are forbidden, sending what does not fit fails.
    pub(crate) fn set_dont_fragment(socket: &UdpSocket, on: bool) -> io::Result<()> {
        let value = if on { libc::IP_PMTUDISC_DO } else { libc::IP_PMTUDISC_DONT };
        set(socket.as_raw_fd(), libc::IP_MTU_DISCOVER, value)
    }

    /// MTU of the path to the peer of `socket`, in bytes, as far as the system knows it.
    pub(crate) fn path_mtu(socket: &UdpSocket) -> Option<u16> {
        let mut mtu: i32 = 0;
        let mut len = size_of_val(&mtu) as libc::socklen_t;
        // SAFETY: the system writes at most `len` bytes at the address of `mtu`, and the length there to `len`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_MTU,
                (&raw mut mtu).cast(),
                &raw mut len,
            )
        };
        if result == 0 { Some(u16::try_from(mtu).unwrap_or(u16::MAX)) } else { None }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::set;
    use mio::net::UdpSocket;
    use std::io;
    use std::os::fd::AsRawFd;

    /// macOS reports the fatal errors of a connected socket only, and has no option for the others.
    pub(crate) fn report_all_errors(_: &UdpSocket) -> io::Result<()> {
        Ok(())
    }

    /// Nothing is kept.
    pub(crate) fn forget_errors(_: &UdpSocket) {}

    /// Forbids or allows fragments of what `socket` sends; where they are forbidden, sending what does not fit fails.
    pub(crate) fn set_dont_fragment(socket: &UdpSocket, on: bool) -> io::Result<()> {
        set(socket.as_raw_fd(), libc::IP_DONTFRAG, on.into())
    }

    /// macOS does not tell.
    pub(crate) fn path_mtu(_: &UdpSocket) -> Option<u16> {
        None
    }
}
