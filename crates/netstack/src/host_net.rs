//! What the host's own network looks like.

use nix::ifaddrs::getifaddrs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

/// How old the list of networks may be: a host may join another one at any time.
const MAX_AGE: Duration = Duration::from_secs(2);

/// A network that an interface of the host is on: an address there, and the bits of the netmask.
pub(crate) type Network = (Ipv4Addr, u8);

/// The IPv4 networks that the host's interfaces are on, loopback aside.
pub(crate) fn networks() -> io::Result<Vec<Network>> {
    let mut networks = Vec::new();
    for interface in getifaddrs()? {
        let address = interface.address.as_ref().and_then(|address| address.as_sockaddr_in());
        let netmask = interface.netmask.as_ref().and_then(|netmask| netmask.as_sockaddr_in());
        if let (Some(address), Some(netmask)) = (address, netmask)
            && !address.ip().is_loopback()
        {
            networks.push((address.ip(), netmask.ip().to_bits().leading_ones() as u8));
        }
    }
    Ok(networks)
}

/// The host's networks as they are now, looked up only now and then.
#[derive(Default)]
pub(crate) struct HostNetworks {
    known: Vec<Network>,
    looked: Option<Instant>,
}

impl HostNetworks {
    /// Whether `address` is on a network of the host.
    pub(crate) fn contain(&mut self, address: Ipv4Addr, now: Instant) -> bool {
        if self.looked.is_none_or(|looked| now.duration_since(looked) >= MAX_AGE) {
            self.looked = Some(now);
            match networks() {
                Ok(networks) => self.known = networks,
                Err(error) => outboard_bus::warn_limited!("the host's networks cannot be listed: {error}"),
            }
        }
        let shares = |(own, prefix): &Network| {
            let mask = u32::MAX.checked_shl(32 - u32::from(*prefix)).unwrap_or(0);
            (own.to_bits() ^ address.to_bits()) & mask == 0
        };
        self.known.iter().any(shares)
    }
}

/// Whether the host would talk to itself at `address`: then, and only then, it would also send from there. Asked anew for
/// each flow, so that an address that the host got a moment ago counts; nothing is sent.
///
/// # Errors
/// The operating system's, such as that there is no route.
pub(crate) fn is_own_address(address: Ipv4Addr) -> io::Result<bool> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // Any port but 0 will do: connecting a datagram socket only looks for the route.
    socket.connect(SocketAddrV4::new(address, 9))?;
    Ok(socket.local_addr()?.ip() == IpAddr::V4(address))
}

/// Where a datagram socket of the host is bound that will talk to `peer`: any port of any address of its kind.
pub(crate) fn any_port_for(peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_addresses_are_known() {
        assert!(is_own_address(Ipv4Addr::LOCALHOST).unwrap());
        for (address, prefix) in networks().unwrap() {
            assert!(is_own_address(address).unwrap(), "{address}/{prefix}");
            assert!(HostNetworks::default().contain(address, Instant::now()));
        }
        // Documentation addresses (RFC 5737); a host without routes has no answer.
        assert!(!is_own_address(Ipv4Addr::new(192, 0, 2, 1)).unwrap_or(false));
    }
}
