//! What the host's own network looks like.

#[cfg(target_os = "linux")]
use std::fs::File;
use std::io;
#[cfg(target_os = "linux")]
use std::io::{Read, Seek, SeekFrom};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket};
#[cfg(target_os = "linux")]
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// How old the list of networks may be: a host may join another one at any time.
const MAX_AGE: Duration = Duration::from_secs(2);

/// A network that an interface of the host is on: an address in it, and the bits of the netmask.
pub(crate) type Network = (Ipv4Addr, u8);

/// A file of the kernel's that is opened once, when the process may still open files, and read again and again. System calls
/// for the same (netlink) would let a thread of a process that runs as root change the host's network, too.
#[cfg(target_os = "linux")]
struct KernelFile {
    path: &'static str,
    file: OnceLock<io::Result<Mutex<File>>>,
}

#[cfg(target_os = "linux")]
impl KernelFile {
    const fn new(path: &'static str) -> Self {
        Self { path, file: OnceLock::new() }
    }

    /// The text as it is now.
    fn read(&self) -> io::Result<String> {
        let opened = self.file.get_or_init(|| File::open(self.path).map(Mutex::new));
        let file = opened
            .as_ref()
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.path)))?;
        let mut file = file.lock().unwrap_or_else(|e| e.into_inner());
        let mut text = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// The kernel's IPv4 routes (Linux net/ipv4/fib_trie.c, `fib_route_seq_show`).
#[cfg(target_os = "linux")]
static ROUTES: KernelFile = KernelFile::new("/proc/self/net/route");
/// The IPv6 addresses of the host's interfaces, with the interfaces' numbers and names (Linux net/ipv6/addrconf.c,
/// `if6_seq_show`).
#[cfg(target_os = "linux")]
static ADDRESSES_V6: KernelFile = KernelFile::new("/proc/self/net/if_inet6");

/// Opens what is read later, when the process may open nothing any more. What cannot be opened is said when it is needed.
pub(crate) fn prepare() {
    #[cfg(target_os = "linux")]
    for file in [&ROUTES, &ADDRESSES_V6] {
        let _ = file.read();
    }
}

/// The IPv4 networks that the host's interfaces are on, loopback aside.
#[cfg(target_os = "linux")]
pub(crate) fn networks() -> io::Result<Vec<Network>> {
    Ok(ROUTES.read()?.lines().filter_map(connected_network).collect())
}

/// The network of a line of [`ROUTES`] that leads to neighbours and not to a gateway. Addresses are hexadecimal words as they
/// are in memory.
#[cfg(target_os = "linux")]
fn connected_network(line: &str) -> Option<Network> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_interface, destination, gateway, _, _, _, _, mask, ..] = fields[..] else { return None };
    let word = |text| u32::from_str_radix(text, 16).ok().map(|word| u32::from_be_bytes(word.to_ne_bytes()));
    let (destination, gateway, mask) = (word(destination)?, word(gateway)?, word(mask)?);
    let is_neighbourhood = gateway == 0 && mask != 0;
    is_neighbourhood.then(|| (Ipv4Addr::from_bits(destination), mask.leading_ones() as u8))
}

/// The IPv4 networks that the host's interfaces are on, loopback aside.
#[cfg(not(target_os = "linux"))]
pub(crate) fn networks() -> io::Result<Vec<Network>> {
    let mut networks = Vec::new();
    for interface in nix::ifaddrs::getifaddrs()? {
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

/// The number of the interface called `name`, if it has an IPv6 address.
#[cfg(target_os = "linux")]
pub(crate) fn interface_number(name: &str) -> Option<u32> {
    ADDRESSES_V6.read().ok()?.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_address, number, _prefix, _scope, _flags, interface] = fields[..] else { return None };
        if interface == name { u32::from_str_radix(number, 16).ok() } else { None }
    })
}

/// The number of the interface called `name`.
#[cfg(not(target_os = "linux"))]
pub(crate) fn interface_number(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

/// The host's networks as they are now, looked up only now and then.
#[derive(Default)]
pub(crate) struct HostNetworks {
    /// `None` while they cannot be listed.
    known: Option<Vec<Network>>,
    looked: Option<Instant>,
}

impl HostNetworks {
    /// True if `address` is on a network of the host, or if nobody can say what networks that has.
    pub(crate) fn contain(&mut self, address: Ipv4Addr, now: Instant) -> bool {
        if self.looked.is_none_or(|looked| now.duration_since(looked) >= MAX_AGE) {
            self.looked = Some(now);
            self.known = match networks() {
                Ok(networks) => Some(networks),
                Err(error) => {
                    outboard_bus::warn_limited!(
                        "the host's networks cannot be listed, so with lan=off the guest reaches nothing: {error}"
                    );
                    None
                }
            };
        }
        let shares = |(own, prefix): &Network| {
            let mask = u32::MAX.checked_shl(32 - u32::from(*prefix)).unwrap_or(0);
            (own.to_bits() ^ address.to_bits()) & mask == 0
        };
        self.known.as_ref().is_none_or(|known| known.iter().any(shares))
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
            assert!(HostNetworks::default().contain(address, Instant::now()), "{address}/{prefix}");
        }
        // Documentation addresses (RFC 5737); a host without routes has no answer.
        assert!(!is_own_address(Ipv4Addr::new(192, 0, 2, 1)).unwrap_or(false));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn routes_of_the_kernel_are_read() {
        let lines = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth0\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let found: Vec<Network> = lines.lines().filter_map(connected_network).collect();
        // The words above are those of a little-endian host.
        let expected = if cfg!(target_endian = "little") {
            vec![(Ipv4Addr::new(192, 168, 2, 0), 24)]
        } else {
            found.clone()
        };
        assert_eq!(found, expected);
        assert_eq!(interface_number("no-such-interface"), None);
    }
}
