//! What the networks of one machine share out among themselves: addresses, subnets, ports of the host.

use crate::address::Subnet;
use crate::host_net::{self, Network};
use crate::options::{DEFAULT_MAC, Forward, NetOptions};
use std::collections::HashSet;
use std::net::IpAddr;

/// Why the networks of a machine do not go together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// Two forwards would listen on one port.
    #[error(
        "forward {first} and forward {second} listen on the same port of the host: leave one out, or give it another host port"
    )]
    ForwardTwice {
        /// The one that comes first.
        first: Forward,
        /// The other.
        second: Forward,
    },
    /// Two cards have one address.
    #[error("mac={} is given to two networks: a guest cannot tell them apart, leave one out", mac_text(.0))]
    MacTwice([u8; 6]),
    /// Two cards are on one network.
    #[error("subnet={0} is given to two networks: a guest cannot tell them apart, leave one out")]
    SubnetTwice(Subnet),
    /// The host is on every network that could be taken.
    #[error(
        "every private network is one of the host's: choose with subnet= which of them the guest cannot reach"
    )]
    NoSubnet,
}

fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Gives each of a machine's networks a MAC address and a subnet where its user has not, and checks that they go together.
///
/// A subnet that is chosen here is none that the host is on.
///
/// # Errors
/// [`AssignError`].
pub fn assign(nets: &mut [NetOptions]) -> Result<(), AssignError> {
    let host = host_net::networks().unwrap_or_else(|error| {
        tracing::warn!("the host's networks cannot be listed ({error}): a guest's subnet may be one of them");
        Vec::new()
    });
    assign_beside(nets, &host)
}

fn assign_beside(nets: &mut [NetOptions], host: &[Network]) -> Result<(), AssignError> {
    check_forwards(nets)?;
    assign_macs(nets)?;
    assign_subnets(nets, host)
}

fn check_forwards(nets: &[NetOptions]) -> Result<(), AssignError> {
    let all: Vec<&Forward> = nets.iter().flat_map(|net| &net.forwards).collect();
    for (index, second) in all.iter().enumerate() {
        if let Some(first) = all[..index].iter().find(|first| collide(first, second)) {
            return Err(AssignError::ForwardTwice { first: (*first).clone(), second: (*second).clone() });
        }
    }
    Ok(())
}

/// Whether both want the same port. Port 0 takes any free one; an unspecified address takes the port on all addresses, and
/// the one of IPv6 those of IPv4 too.
fn collide(a: &Forward, b: &Forward) -> bool {
    if a.protocol != b.protocol || a.host.port() != b.host.port() || a.host.port() == 0 {
        return false;
    }
    let takes = |taker: IpAddr, other: IpAddr| match taker {
        IpAddr::V4(any) => any.is_unspecified() && other.is_ipv4(),
        IpAddr::V6(any) => any.is_unspecified(),
    };
    let (a, b) = (a.host.ip(), b.host.ip());
    a == b || takes(a, b) || takes(b, a)
}

fn assign_macs(nets: &mut [NetOptions]) -> Result<(), AssignError> {
    let mut taken = HashSet::new();
    for mac in nets.iter().filter_map(|net| net.mac) {
        if !taken.insert(mac) {
            return Err(AssignError::MacTwice(mac));
        }
    }
    let mut next = DEFAULT_MAC;
    for net in nets.iter_mut().filter(|net| net.mac.is_none()) {
        while !taken.insert(next) {
            next[5] = next[5].wrapping_add(1);
        }
        net.mac = Some(next);
    }
    Ok(())
}

fn assign_subnets(nets: &mut [NetOptions], host: &[Network]) -> Result<(), AssignError> {
    let mut taken = HashSet::new();
    for subnet in nets.iter().filter_map(|net| net.subnet) {
        if !taken.insert(subnet) {
            return Err(AssignError::SubnetTwice(subnet));
        }
        if is_hosts(subnet, host) {
            tracing::warn!(
                "subnet={subnet} is a network of the host, whose other machines the guest cannot reach"
            );
        }
    }
    for net in nets.iter_mut().filter(|net| net.subnet.is_none()) {
        let free = candidates().find(|subnet| !taken.contains(subnet) && !is_hosts(*subnet, host));
        let subnet = free.ok_or(AssignError::NoSubnet)?;
        taken.insert(subnet);
        net.subnet = Some(subnet);
    }
    Ok(())
}

fn is_hosts(subnet: Subnet, host: &[Network]) -> bool {
    host.iter().any(|(address, prefix)| subnet.overlaps(*address, *prefix))
}

/// Subnets to choose from, first choice first: 10.0.2.0/24 and those behind it, then some of the other private ranges.
fn candidates() -> impl Iterator<Item = Subnet> {
    let ten = (2..=254).map(|c| Subnet::new(10, 0, c));
    let rest = (100..=254).flat_map(|c| [Subnet::new(172, 31, c), Subnet::new(192, 168, c)]);
    ten.chain(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<NetOptions> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// The MAC addresses' last bytes and the subnets that networks described so get on a host with these networks.
    fn assigned(texts: &[&str], host: &[(&str, u8)]) -> Result<Vec<(u8, String)>, AssignError> {
        let host: Vec<Network> = host.iter().map(|(a, p)| (a.parse().unwrap(), *p)).collect();
        let mut nets = nets(texts);
        assign_beside(&mut nets, &host)?;
        Ok(nets.iter().map(|net| (net.mac()[5], net.subnet().to_string())).collect())
    }

    #[test]
    fn each_card_has_an_address_and_a_subnet_of_its_own() {
        let expected = [(0x56, "10.0.2.0/24".to_owned()), (0x57, "10.0.3.0/24".to_owned())];
        assert_eq!(assigned(&["user", "user"], &[]).unwrap(), expected);
        let third =
            assigned(&["user", "user,mac=52:54:00:12:34:56,subnet=10.0.2.0/24", "user"], &[]).unwrap();
        assert_eq!(third.iter().map(|net| net.0).collect::<Vec<_>>(), [0x57, 0x56, 0x58]);
        assert_eq!(
            third.iter().map(|net| &net.1[..]).collect::<Vec<_>>(),
            ["10.0.3.0/24", "10.0.2.0/24", "10.0.4.0/24"]
        );
    }

    #[test]
    fn a_network_of_the_host_is_not_chosen_but_may_be_given() {
        let subnet = |host: &[(&str, u8)]| assigned(&["user"], host).unwrap()[0].1.clone();
        assert_eq!(subnet(&[("192.168.1.7", 24)]), "10.0.2.0/24");
        assert_eq!(subnet(&[("10.0.2.15", 24)]), "10.0.3.0/24");
        assert_eq!(subnet(&[("10.0.2.15", 24), ("10.0.3.1", 32)]), "10.0.4.0/24");
        assert_eq!(subnet(&[("10.7.7.7", 8)]), "172.31.100.0/24");
        assert_eq!(subnet(&[("10.7.7.7", 8), ("172.17.0.1", 12)]), "192.168.100.0/24");
        assert_eq!(assigned(&["user"], &[("10.0.0.1", 0)]), Err(AssignError::NoSubnet));
        assert_eq!(assigned(&["user,subnet=10.0.2.0/24"], &[("10.0.2.15", 24)]).unwrap()[0].1, "10.0.2.0/24");
    }

    #[test]
    fn what_two_cards_cannot_share_is_refused_with_a_message() {
        for (texts, expected) in [
            (
                &["user,mac=02:00:00:00:00:01", "user,mac=02:00:00:00:00:01"][..],
                "mac=02:00:00:00:00:01 is given",
            ),
            (&["user,subnet=10.9.9.0/24", "user,subnet=10.9.9.0/24"], "subnet=10.9.9.0/24 is given"),
            (
                &["user,forward=2222:22,forward=2222:80"],
                "forward tcp:127.0.0.1:2222:80 listen on the same port",
            ),
            (&["user,forward=2222:22", "user,forward=2222:22"], "listen on the same port"),
            (&["user,forward=0.0.0.0:80:80,forward=192.168.1.1:80:81"], "listen on the same port"),
            (&["user,forward=192.168.1.1:80:81,forward=[::]:80:81"], "listen on the same port"),
            (&["user,forward=udp:53:53,forward=udp:53:54"], "listen on the same port"),
        ] {
            let error = assigned(texts, &[]).unwrap_err().to_string();
            assert!(error.contains(expected), "{texts:?}: {error}");
        }
        for text in [
            "user,forward=2222:22,forward=2223:22",
            "user,forward=2222:22,forward=udp:2222:22",
            "user,forward=0:22,forward=0:80",
            "user,forward=127.0.0.1:80:80,forward=192.168.1.1:80:80",
            "user,forward=0.0.0.0:80:80,forward=[::1]:80:80",
        ] {
            assert!(assigned(&[text], &[]).is_ok(), "{text}");
        }
    }
}
