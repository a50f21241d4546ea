//! Addresses: who has which on the virtual network, and which of the world's a guest may reach.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// The guest's address on the first card's network.
pub const GUEST: Ipv4Addr = Subnet::DEFAULT.guest();
/// The router on the first card's network, and the host as the guest sees it.
pub const GATEWAY: Ipv4Addr = Subnet::DEFAULT.gateway();
/// The DNS relay on the first card's network.
pub const DNS: Ipv4Addr = Subnet::DEFAULT.dns();

pub(crate) const BROADCAST_MAC: [u8; 6] = [0xff; 6];

/// Largest IP packet on the link, in bytes: with packets this large neither side needs segmentation offload. The largest
/// multiple of 16 that leaves room for an Ethernet header within 65535 bytes.
pub const MTU: u16 = 65520;

/// The addresses of a virtual network: 256 of them, of which the router, the DNS relay and the guest have one each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Subnet([u8; 3]);

impl Subnet {
    /// 10.0.2.0/24, which QEMU's user network has, so that its users find what they expect.
    pub const DEFAULT: Self = Self([10, 0, 2]);
    /// Bits of the netmask.
    pub const PREFIX: u8 = 24;

    /// The network `a`.`b`.`c`.0/24.
    pub(crate) const fn new(a: u8, b: u8, c: u8) -> Self {
        Self([a, b, c])
    }

    const fn address(self, host: u8) -> Ipv4Addr {
        let [a, b, c] = self.0;
        Ipv4Addr::new(a, b, c, host)
    }

    /// Its first address, which nobody has.
    pub const fn network(self) -> Ipv4Addr {
        self.address(0)
    }

    /// The router's address: the host as the guest sees it.
    pub const fn gateway(self) -> Ipv4Addr {
        self.address(2)
    }

    /// The DNS relay's address.
    pub const fn dns(self) -> Ipv4Addr {
        self.address(3)
    }

    /// The guest's address.
    pub const fn guest(self) -> Ipv4Addr {
        self.address(15)
    }

    /// The netmask.
    pub const fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::new(255, 255, 255, 0)
    }

    /// Whether `address` is on this network.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.octets()[..3] == self.0
    }

    /// Whether `address`/`prefix` has an address in common with this network.
    pub(crate) fn overlaps(self, address: Ipv4Addr, prefix: u8) -> bool {
        let common = prefix.min(Self::PREFIX);
        let mask = u32::MAX.checked_shl(32 - u32::from(common)).unwrap_or(0);
        (address.to_bits() ^ self.network().to_bits()) & mask == 0
    }

    /// MAC address of router and relay: 52:55 and the router's address.
    pub(crate) const fn router_mac(self) -> [u8; 6] {
        let [a, b, c] = self.0;
        [0x52, 0x55, a, b, c, 2]
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), Self::PREFIX)
    }
}

/// Not a network that a card can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotASubnet;

impl FromStr for Subnet {
    type Err = NotASubnet;

    fn from_str(text: &str) -> Result<Self, NotASubnet> {
        let (address, prefix) = text.split_once('/').ok_or(NotASubnet)?;
        let address: Ipv4Addr = address.parse().map_err(|_| NotASubnet)?;
        let [a, b, c, host] = address.octets();
        let usable = matches!(Class::of(address), Class::Lan | Class::Internet);
        if prefix != "24" || host != 0 || !usable { Err(NotASubnet) } else { Ok(Self([a, b, c])) }
    }
}

/// Kind of an IPv4 address outside the virtual network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// No ordinary unicast address: multicast, reserved, "this network".
    NotUnicast,
    /// The loopback interface of whoever uses it.
    Loopback,
    /// Of one link only, or a cloud's service that tells a machine its secrets.
    LinkLocal,
    /// Of private networks.
    Lan,
    /// All others.
    Internet,
}

/// Metadata services outside 169.254.0.0/16: Alibaba Cloud's, Azure's WireServer.
const METADATA: [Ipv4Addr; 2] = [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16)];

impl Class {
    pub(crate) fn of(address: Ipv4Addr) -> Self {
        match address.octets() {
            [127, ..] => Self::Loopback,
            [0, ..] | [224..=255, ..] => Self::NotUnicast,
            // RFC 3927.
            [169, 254, ..] => Self::LinkLocal,
            _ if METADATA.contains(&address) => Self::LinkLocal,
            // RFC 1918, and RFC 6598 for carriers and overlay networks.
            [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] => Self::Lan,
            _ => Self::Internet,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_has_its_class() {
        for (text, expected) in [
            ("8.8.8.8", Class::Internet),
            ("223.255.255.255", Class::Internet),
            ("100.128.0.1", Class::Internet),
            ("172.32.0.1", Class::Internet),
            ("10.0.3.1", Class::Lan),
            ("172.16.0.1", Class::Lan),
            ("172.31.255.255", Class::Lan),
            ("192.168.1.1", Class::Lan),
            ("100.64.0.1", Class::Lan),
            ("127.0.0.1", Class::Loopback),
            ("127.9.9.9", Class::Loopback),
            ("169.254.169.254", Class::LinkLocal),
            ("169.254.0.1", Class::LinkLocal),
            ("100.100.100.200", Class::LinkLocal),
            ("168.63.129.16", Class::LinkLocal),
            ("0.0.0.0", Class::NotUnicast),
            ("0.1.2.3", Class::NotUnicast),
            ("224.0.0.251", Class::NotUnicast),
            ("240.0.0.1", Class::NotUnicast),
            ("255.255.255.255", Class::NotUnicast),
        ] {
            assert_eq!(Class::of(text.parse().unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn subnets_are_whole_networks_of_256_addresses() {
        let subnet: Subnet = "192.168.77.0/24".parse().unwrap();
        assert_eq!(subnet.to_string(), "192.168.77.0/24");
        assert_eq!(subnet.guest(), Ipv4Addr::new(192, 168, 77, 15));
        assert!(subnet.contains(subnet.gateway()) && !subnet.contains(GATEWAY));
        for text in
            ["", "10.0.2.0", "10.0.2.1/24", "10.0.0.0/16", "127.0.0.0/24", "169.254.1.0/24", "224.0.0.0/24"]
        {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }

    #[test]
    fn overlaps_are_found_from_either_side() {
        let subnet = Subnet::DEFAULT;
        for (address, prefix, expected) in [
            ("10.0.2.99", 32, true),
            ("10.0.2.0", 24, true),
            ("10.0.7.5", 16, true),
            ("1.2.3.4", 0, true),
            ("10.0.3.1", 24, false),
            ("10.1.0.0", 16, false),
        ] {
            assert_eq!(subnet.overlaps(address.parse().unwrap(), prefix), expected, "{address}/{prefix}");
        }
    }
}
