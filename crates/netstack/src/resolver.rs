use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// How often the file's time stamp is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Which resolver the guest's queries go to: a fixed one, or the host's as its resolv.conf names it now.
pub(crate) struct Resolver {
    source: Source,
}

enum Source {
    Fixed(SocketAddr),
    File(File),
}

struct File {
    path: PathBuf,
    checked: Option<Instant>,
    modified: Option<SystemTime>,
    servers: Vec<IpAddr>,
    /// The one in use; moves on when it does not answer.
    current: usize,
}

impl Resolver {
    pub(crate) fn new(fixed: Option<SocketAddr>) -> Self {
        match fixed {
            Some(address) => Self { source: Source::Fixed(address) },
            None => Self::from_file(PathBuf::from("/etc/resolv.conf")),
        }
    }

    fn from_file(path: PathBuf) -> Self {
        let servers = Vec::new();
        Self { source: Source::File(File { path, checked: None, modified: None, servers, current: 0 }) }
    }

    /// The resolver for a new query or connection.
    pub(crate) fn address(&mut self, now: Instant) -> SocketAddr {
        match &mut self.source {
            Source::Fixed(address) => *address,
            Source::File(file) => {
                file.refresh(now);
                SocketAddr::new(file.servers[file.current], 53)
            }
        }
    }

    /// `address` did not answer: the next query goes to another one, if there is one.
    pub(crate) fn failed(&mut self, address: SocketAddr) {
        if let Source::File(file) = &mut self.source
            && file.servers.get(file.current) == Some(&address.ip())
        {
            file.current = (file.current + 1) % file.servers.len();
        }
    }
}

impl File {
    /// Leaves at least one server in the list.
    fn refresh(&mut self, now: Instant) {
        if self.checked.is_some_and(|t| now.duration_since(t) < CHECK_INTERVAL) {
            return;
        }
        self.checked = Some(now);
        let modified = std::fs::metadata(&self.path).and_then(|m| m.modified()).ok();
        if !self.servers.is_empty() && modified == self.modified {
            return;
        }
        self.modified = modified;
        self.current = 0;
        self.servers =
            parse(&String::from_utf8_lossy(&outboard_jail::read_file(&self.path).unwrap_or_default()));
        if self.servers.is_empty() {
            // What resolv.conf(5) says happens without any nameserver line.
            self.servers.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
    }
}

/// The `nameserver` lines of a resolv.conf(5). Scoped addresses (`fe80::1%en0`) are left out: they need an interface.
fn parse(text: &str) -> Vec<IpAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok())?
    };
    text.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_nameserver_lines_only() {
        let text = "# nameserver 1.1.1.1\nsearch x\nnameserver 10.1.2.3 # mine\n nameserver ::1\nnameserver fe80::1%en0\nnameserver\n";
        assert_eq!(parse(text), ["10.1.2.3".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]);
    }

    #[test]
    fn follows_the_file_and_moves_on_from_a_dead_server() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "nameserver 10.0.0.1\nnameserver 10.0.0.2\n").unwrap();
        let mut resolver = Resolver::from_file(file.path().to_owned());
        let now = Instant::now();
        let first = resolver.address(now);
        assert_eq!(first, "10.0.0.1:53".parse().unwrap());
        resolver.failed(first);
        resolver.failed(first);
        assert_eq!(
            resolver.address(now),
            "10.0.0.2:53".parse().unwrap(),
            "a second report of the same server is old news"
        );

        std::fs::write(file.path(), "nameserver 10.9.9.9\n").unwrap();
        let later = SystemTime::now() + Duration::from_secs(10);
        std::fs::File::options().write(true).open(file.path()).unwrap().set_modified(later).unwrap();
        assert_eq!(resolver.address(now + CHECK_INTERVAL), "10.9.9.9:53".parse().unwrap());
    }

    #[test]
    fn without_a_file_the_host_itself_is_asked() {
        let mut resolver = Resolver::from_file("/nonexistent/resolv.conf".into());
        assert_eq!(resolver.address(Instant::now()), "127.0.0.1:53".parse().unwrap());
    }
}
