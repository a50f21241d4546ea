use nix::net::if_::if_nametoindex;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// How often the file's time stamp is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Servers that are taken from the file (resolv.conf(5), MAXNS).
const MAX_SERVERS: usize = 3;
/// How long a server that failed is asked only after the others.
const PENALTY: Duration = Duration::from_secs(30);
const DNS_PORT: u16 = 53;

/// Which resolvers the guest's queries go to: a fixed one, or the host's as its resolv.conf names them now.
pub(crate) struct Resolver {
    servers: Vec<Server>,
    file: Option<File>,
}

struct Server {
    address: SocketAddr,
    /// It failed, and until then comes after those that did not.
    bad_until: Option<Instant>,
}

struct File {
    path: PathBuf,
    checked: Option<Instant>,
    modified: Option<SystemTime>,
}

impl Resolver {
    /// Of the server `fixed`, or those of /etc/resolv.conf. Says in the log if none of those can be used.
    pub(crate) fn new(fixed: Option<SocketAddr>, now: Instant) -> Self {
        match fixed {
            Some(address) => Self { servers: vec![Server { address, bad_until: None }], file: None },
            None => Self::from_file(PathBuf::from("/etc/resolv.conf"), now),
        }
    }

    /// Of these servers, in this order.
    #[cfg(test)]
    pub(crate) fn of(addresses: &[SocketAddr]) -> Self {
        let server = |address: &SocketAddr| Server { address: *address, bad_until: None };
        Self { servers: addresses.iter().map(server).collect(), file: None }
    }

    fn from_file(path: PathBuf, now: Instant) -> Self {
        let file = File { path, checked: None, modified: None };
        let mut resolver = Self { servers: Vec::new(), file: Some(file) };
        resolver.refresh(now);
        resolver
    }

    /// The server to ask next for a query that was sent to those in `tried`; `None` if there is no other.
    pub(crate) fn next(&mut self, tried: &[SocketAddr], now: Instant) -> Option<SocketAddr> {
        self.refresh(now);
        let untried = || self.servers.iter().filter(|server| !tried.contains(&server.address));
        let good = untried().find(|server| server.bad_until.is_none_or(|until| until <= now));
        good.or_else(|| untried().next()).map(|server| server.address)
    }

    /// `address` refused, or left unanswered what another one answered.
    pub(crate) fn failed(&mut self, address: SocketAddr, now: Instant) {
        if let Some(server) = self.servers.iter_mut().find(|server| server.address == address) {
            server.bad_until = Some(now + PENALTY);
        }
    }

    fn refresh(&mut self, now: Instant) {
        let Some(file) = &mut self.file else { return };
        if file.checked.is_some_and(|t| now.duration_since(t) < CHECK_INTERVAL) {
            return;
        }
        let first = file.checked.replace(now).is_none();
        let modified = std::fs::metadata(&file.path).and_then(|m| m.modified()).ok();
        if !first && modified == file.modified {
            return;
        }
        file.modified = modified;
        let (mut addresses, unusable) = parse(&std::fs::read_to_string(&file.path).unwrap_or_default());
        if addresses.is_empty() {
            // What resolv.conf(5) says happens without any nameserver line.
            addresses.push((Ipv4Addr::LOCALHOST, DNS_PORT).into());
            let named = if unusable.is_empty() {
                String::from("names no server")
            } else {
                format!("names no server that can be used ({})", unusable.join(", "))
            };
            tracing::warn!(
                "{} {named}: the guest's DNS queries go to 127.0.0.1; choose a server with --net user,dns=ADDRESS",
                file.path.display()
            );
        }
        self.servers = addresses.into_iter().map(|address| Server { address, bad_until: None }).collect();
    }
}

/// The addresses in the `nameserver` lines of a resolv.conf(5), and the words there that are no address of a server.
fn parse(text: &str) -> (Vec<SocketAddr>, Vec<String>) {
    let (mut addresses, mut unusable) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(word) = words.next() else { continue };
        match parse_server(word) {
            Some(address) if addresses.len() < MAX_SERVERS => addresses.push(address),
            Some(_) => {}
            None => unusable.push(word.to_owned()),
        }
    }
    (addresses, unusable)
}

/// A server's address, at port 53. A link-local one needs its scope: the name or number of an interface after a percent sign
/// (RFC 4007, section 11), such as `fe80::1%eth0`.
pub(crate) fn parse_server(text: &str) -> Option<SocketAddr> {
    let Some((address, scope)) = text.split_once('%') else {
        let address: IpAddr = text.parse().ok()?;
        let needs_scope = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        return (!needs_scope).then_some(SocketAddr::new(address, DNS_PORT));
    };
    let scope = match scope.parse() {
        Ok(number) => number,
        Err(_) => if_nametoindex(scope).ok()?,
    };
    Some(SocketAddrV6::new(address.parse().ok()?, DNS_PORT, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name of the loopback interface, which every host has.
    const LOOPBACK: &str = if cfg!(target_os = "linux") { "lo" } else { "lo0" };

    fn server(text: &str) -> SocketAddr {
        SocketAddr::new(text.parse().unwrap(), DNS_PORT)
    }

    fn resolver(text: &str) -> (Resolver, tempfile::NamedTempFile, Instant) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let now = Instant::now();
        (Resolver::from_file(file.path().to_owned(), now), file, now)
    }

    #[test]
    fn reads_nameserver_lines_only() {
        let text = "# nameserver 1.1.1.1\nsearch x\nnameserver 10.1.2.3 # mine\n nameserver ::1\nnameserver\nnameserver x\n";
        assert_eq!(parse(text), (vec![server("10.1.2.3"), server("::1")], vec!["x".to_owned()]));
        let many = "nameserver 1.1.1.1\nnameserver 2.2.2.2\nnameserver 3.3.3.3\nnameserver 4.4.4.4\n";
        assert_eq!(parse(many).0.len(), MAX_SERVERS);
    }

    #[test]
    fn link_local_servers_have_their_scope() {
        let index = if_nametoindex(LOOPBACK).unwrap();
        let expected = SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, index));
        assert_eq!(parse_server(&format!("fe80::1%{LOOPBACK}")), Some(expected));
        assert_eq!(parse_server(&format!("fe80::1%{index}")), Some(expected));
        for text in ["fe80::1", "fe80::1%nosuchinterface", "fe80::1%", "10.0.0.1%lo", "x"] {
            assert_eq!(parse_server(text), None, "{text}");
        }
        let (mut resolver, _file, now) = resolver(&format!("nameserver fe80::1%{LOOPBACK}\n"));
        assert_eq!(resolver.next(&[], now), Some(expected));
    }

    #[test]
    fn each_server_is_asked_in_turn_and_a_failed_one_last() {
        let (mut resolver, _file, now) = resolver("nameserver 10.0.0.1\nnameserver 10.0.0.2\n");
        let (one, two) = (server("10.0.0.1"), server("10.0.0.2"));
        assert_eq!(resolver.next(&[], now), Some(one));
        assert_eq!(resolver.next(&[one], now), Some(two));
        assert_eq!(resolver.next(&[one, two], now), None);
        resolver.failed(one, now);
        assert_eq!(resolver.next(&[], now), Some(two));
        assert_eq!(resolver.next(&[two], now), Some(one));
        assert_eq!(resolver.next(&[], now + PENALTY), Some(one), "not for ever");
    }

    #[test]
    fn follows_the_file() {
        let (mut resolver, file, now) = resolver("nameserver 10.0.0.1\n");
        assert_eq!(resolver.next(&[], now), Some(server("10.0.0.1")));
        std::fs::write(file.path(), "nameserver 10.9.9.9\n").unwrap();
        let later = SystemTime::now() + Duration::from_secs(10);
        std::fs::File::options().write(true).open(file.path()).unwrap().set_modified(later).unwrap();
        assert_eq!(resolver.next(&[], now + CHECK_INTERVAL), Some(server("10.9.9.9")));
    }

    #[test]
    fn without_a_usable_server_the_host_itself_is_asked() {
        let now = Instant::now();
        let mut missing = Resolver::from_file("/nonexistent/resolv.conf".into(), now);
        assert_eq!(missing.next(&[], now), Some(server("127.0.0.1")));
        let (mut unusable, _file, now) = resolver("nameserver fe80::1%nosuchinterface\n");
        assert_eq!(unusable.next(&[], now), Some(server("127.0.0.1")));
    }
}
