use crate::address::Subnet;
use crate::resolver::parse_server;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// What a forward carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads into the guest.
///
/// Written `[tcp:|udp:][HOSTADDR:]HOSTPORT:GUESTPORT`; an IPv6 HOSTADDR stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// TCP unless told otherwise.
    pub protocol: Protocol,
    /// Where the host listens: 127.0.0.1 unless told otherwise. Port 0 takes any free port.
    pub host: SocketAddr,
    /// The guest's port, 1 to 65535.
    pub guest_port: u16,
}

/// An option of `--net` that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// A forward of the wrong shape.
    #[error("forward '{0}' is not [tcp:|udp:][HOSTADDR:]HOSTPORT:GUESTPORT; an example is 127.0.0.1:2222:22")]
    ForwardShape(String),
    /// A port that is no number from 0 (host side only) to 65535.
    #[error("forward '{forward}': '{port}' is not a {side} port; use a number from {least} to 65535")]
    Port {
        /// The whole forward.
        forward: String,
        /// The part at fault.
        port: String,
        /// `host` or `guest`.
        side: &'static str,
        /// The least port that is allowed.
        least: u16,
    },
    /// The listening address is no IP address.
    #[error(
        "forward '{forward}': '{address}' is not an IP address; names are not looked up, IPv6 stands in brackets"
    )]
    Address {
        /// The whole forward.
        forward: String,
        /// The part at fault.
        address: String,
    },
    /// Not a unicast MAC address.
    #[error("mac '{0}' is not a unicast MAC address of six hexadecimal bytes, such as 52:54:00:12:34:56")]
    Mac(String),
    /// Neither on nor off.
    #[error("{key}={value}: use on or off")]
    Switch {
        /// The option.
        key: &'static str,
        /// What was given.
        value: String,
    },
    /// Not a subnet for a card.
    #[error("subnet '{0}' is not a network of 256 addresses such as 10.0.3.0/24")]
    Subnet(String),
    /// Not a resolver's address.
    #[error("dns '{0}' is not ADDRESS or ADDRESS:PORT of a resolver, such as 9.9.9.9")]
    Dns(String),
    /// A kind of network that does not exist.
    #[error("network kind '{0}' is not known; 'user' is the only one")]
    Kind(String),
    /// An option that does not exist.
    #[error(
        "network option '{0}' is not known; known are forward=, mac=, subnet=, host-loopback=, lan= and dns="
    )]
    Unknown(String),
}

impl FromStr for Forward {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let (protocol, rest) = match text.split_once(':') {
            Some(("tcp", rest)) => (Protocol::Tcp, rest),
            Some(("udp", rest)) => (Protocol::Udp, rest),
            _ => (Protocol::Tcp, text),
        };
        let shape = || OptionError::ForwardShape(text.to_owned());
        let (front, guest) = rest.rsplit_once(':').ok_or_else(shape)?;
        let (address, host) = match front.rsplit_once(':') {
            Some((address, host)) => (Some(address), host),
            None => (None, front),
        };
        let port = |port: &str, side, least| {
            port.parse::<u16>().ok().filter(|p| *p >= least).ok_or_else(|| OptionError::Port {
                forward: text.to_owned(),
                port: port.to_owned(),
                side,
                least,
            })
        };
        let address = match address {
            None => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(a) => parse_address(a)
                .ok_or_else(|| OptionError::Address { forward: text.to_owned(), address: a.to_owned() })?,
        };
        let host = SocketAddr::new(address, port(host, "host", 0)?);
        Ok(Self { protocol, host, guest_port: port(guest, "guest", 1)? })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.protocol, self.host, self.guest_port)
    }
}

fn parse_address(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[') {
        Some(v6) => v6.strip_suffix(']')?.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(IpAddr::V4),
    }
}

/// A user-mode network as a user describes it.
///
/// Written `user[,forward=FORWARD]…[,mac=MAC][,subnet=ADDRESS/24][,host-loopback=on|off][,lan=on|off][,dns=ADDRESS[:PORT]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// The guest's MAC address, unicast; [`crate::assign`] chooses one where `None`.
    pub mac: Option<[u8; 6]>,
    /// The network that the card is on; [`crate::assign`] chooses one where `None`.
    pub subnet: Option<Subnet>,
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<Forward>,
    /// The gateway's address leads to services on the host's loopback interface.
    pub host_loopback: bool,
    /// Private networks, the host's own among them, can be reached.
    pub lan: bool,
    /// Resolver to relay DNS to; the host's `/etc/resolv.conf` where `None`.
    pub dns: Option<SocketAddr>,
}

/// The first card's MAC address. 52:54:00 is locally administered; QEMU's users know the whole.
pub(crate) const DEFAULT_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

impl Default for NetOptions {
    fn default() -> Self {
        Self { mac: None, subnet: None, forwards: Vec::new(), host_loopback: false, lan: true, dns: None }
    }
}

impl NetOptions {
    /// The guest's MAC address: the first card's where none was given or assigned.
    pub fn mac(&self) -> [u8; 6] {
        self.mac.unwrap_or(DEFAULT_MAC)
    }

    /// The card's network: the first card's where none was given or assigned.
    pub fn subnet(&self) -> Subnet {
        self.subnet.unwrap_or(Subnet::DEFAULT)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), OptionError> {
        match key {
            "forward" => self.forwards.push(value.parse()?),
            "mac" => self.mac = Some(parse_mac(value).ok_or_else(|| OptionError::Mac(value.to_owned()))?),
            "subnet" => {
                self.subnet = Some(value.parse().map_err(|_| OptionError::Subnet(value.to_owned()))?);
            }
            "host-loopback" => self.host_loopback = parse_switch("host-loopback", value)?,
            "lan" => self.lan = parse_switch("lan", value)?,
            "dns" => self.dns = Some(parse_dns(value).ok_or_else(|| OptionError::Dns(value.to_owned()))?),
            _ => return Err(OptionError::Unknown(format!("{key}={value}"))),
        }
        Ok(())
    }
}

impl FromStr for NetOptions {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let mut parts = text.split(',');
        let kind = parts.next().unwrap_or_default();
        if kind != "user" {
            return Err(OptionError::Kind(kind.to_owned()));
        }
        let mut options = Self::default();
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| OptionError::Unknown(part.to_owned()))?;
            options.set(key, value)?;
        }
        Ok(options)
    }
}

fn parse_switch(key: &'static str, value: &str) -> Result<bool, OptionError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(OptionError::Switch { key, value: value.to_owned() }),
    }
}

/// An address, with port 53 where there is none.
fn parse_dns(text: &str) -> Option<SocketAddr> {
    parse_server(text).or_else(|| text.parse().ok())
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // Bit 0 of the first byte marks group addresses (IEEE 802); all zero is nobody.
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(text: &str) -> Forward {
        text.parse().unwrap()
    }

    #[test]
    fn forwards_in_every_form() {
        for (text, protocol, host, guest_port) in [
            ("2222:22", Protocol::Tcp, "127.0.0.1:2222", 22),
            ("tcp:2222:22", Protocol::Tcp, "127.0.0.1:2222", 22),
            ("udp:5353:53", Protocol::Udp, "127.0.0.1:5353", 53),
            ("0.0.0.0:80:8080", Protocol::Tcp, "0.0.0.0:80", 8080),
            ("udp:192.168.0.1:0:53", Protocol::Udp, "192.168.0.1:0", 53),
            ("[::1]:80:8080", Protocol::Tcp, "[::1]:80", 8080),
        ] {
            assert_eq!(
                forward(text),
                Forward { protocol, host: host.parse().unwrap(), guest_port },
                "{text}"
            );
        }
    }

    #[test]
    fn forwards_print_as_they_parse() {
        for text in ["tcp:127.0.0.1:2222:22", "udp:[::1]:5353:53"] {
            assert_eq!(forward(text).to_string(), text);
        }
    }

    #[test]
    fn bad_forwards_say_what_is_wrong() {
        for (text, expected) in [
            ("", "is not [tcp:|udp:]"),
            ("22", "is not [tcp:|udp:]"),
            ("tcp:22", "is not [tcp:|udp:]"),
            ("70000:22", "'70000' is not a host port"),
            ("22:0", "'0' is not a guest port; use a number from 1"),
            ("22:", "'' is not a guest port"),
            ("localhost:22:22", "'localhost' is not an IP address"),
            ("::1:22:22", "'::1' is not an IP address"),
            ("[::1:22:22", "'[::1' is not an IP address"),
            ("sctp:1:2", "'sctp' is not an IP address"),
        ] {
            let error = text.parse::<Forward>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn whole_option_strings() {
        let options: NetOptions =
            "user,forward=127.0.0.1:2222:22,forward=udp:5353:53,mac=02:00:00:00:00:aF,subnet=10.9.8.0/24,host-loopback=on,lan=off,dns=[::1]:5300"
                .parse()
                .unwrap();
        assert_eq!(options.forwards, [forward("2222:22"), forward("udp:5353:53")]);
        assert_eq!(options.mac, Some([2, 0, 0, 0, 0, 0xaf]));
        assert_eq!(options.subnet().to_string(), "10.9.8.0/24");
        assert!(options.host_loopback && !options.lan);
        assert_eq!(options.dns, Some("[::1]:5300".parse().unwrap()));
        let default = "user".parse::<NetOptions>().unwrap();
        assert!(default == NetOptions::default() && !default.host_loopback && default.lan);
        let dns = "user,dns=9.9.9.9".parse::<NetOptions>().unwrap().dns;
        assert_eq!(dns, Some("9.9.9.9:53".parse().unwrap()));
    }

    #[test]
    fn bad_option_strings() {
        for (text, expected) in [
            ("tap", "kind 'tap' is not known"),
            ("user,", "option '' is not known"),
            ("user,bridge=br0", "option 'bridge=br0' is not known"),
            ("user,mac=01:00:00:00:00:00", "not a unicast MAC"),
            ("user,mac=52:54:00:12:34", "not a unicast MAC"),
            ("user,mac=52:54:00:12:34:+6", "not a unicast MAC"),
            ("user,host-loopback=maybe", "use on or off"),
            ("user,lan=", "lan=: use on or off"),
            ("user,subnet=10.0.2.15/24", "not a network of 256 addresses"),
            ("user,subnet=127.0.0.0/24", "not a network of 256 addresses"),
            ("user,lan", "option 'lan' is not known"),
            ("user,dns=example", "not ADDRESS"),
        ] {
            let error = text.parse::<NetOptions>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
