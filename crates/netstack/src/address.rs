//! The virtual network: who has which address. QEMU's user network has the same, so its users find what they expect.

use std::net::Ipv4Addr;

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The router, and the host as the guest sees it.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The DNS relay.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// Netmask of the virtual network.
pub const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// MAC address of gateway and relay: 52:55 and the gateway's address.
pub(crate) const ROUTER_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
pub(crate) const BROADCAST_MAC: [u8; 6] = [0xff; 6];

/// Largest IP packet on the link, in bytes: with packets this large neither side needs segmentation offload. The largest
/// multiple of 16 that leaves room for an Ethernet header within 65535 bytes.
pub const MTU: u16 = 65520;

/// Whether `address` is on the virtual network.
pub(crate) fn is_local(address: Ipv4Addr) -> bool {
    address.octets()[..3] == GATEWAY.octets()[..3]
}

/// Whether packets to `address` may leave for the host's network: ordinary unicast addresses only. In particular not
/// 127.0.0.0/8 and 0.0.0.0/8, which would reach the host's own loopback services past `host-loopback=off`.
pub(crate) fn is_routable(address: Ipv4Addr) -> bool {
    let first = address.octets()[0];
    !is_local(address) && first != 0 && first != 127 && first < 224
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_outside_unicast_addresses_are_routable() {
        for (text, expected) in [
            ("8.8.8.8", true),
            ("10.0.3.1", true),
            ("223.255.255.255", true),
            ("10.0.2.99", false),
            ("127.0.0.1", false),
            ("127.9.9.9", false),
            ("0.0.0.0", false),
            ("224.0.0.251", false),
            ("255.255.255.255", false),
        ] {
            assert_eq!(is_routable(text.parse().unwrap()), expected, "{text}");
        }
    }
}
