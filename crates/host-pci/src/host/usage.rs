//! What the host itself uses a function for: disks that are mounted, networks that are up.

use super::{Function, Host, Refusal, entries, link_name, text};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Layers of partitions, device mapper and RAID above a disk; more is a loop.
const MOST_LAYERS: usize = 16;

impl Host {
    /// The ways in which the host uses it.
    pub(super) fn uses(&self, function: &Function) -> Vec<Refusal> {
        // Where it is in the tree of devices; what hangs below it is its own.
        let Ok(folder) = std::fs::canonicalize(self.function_path(function.address)) else { return vec![] };
        let address = function.address;
        let disks = self
            .disks_below(&folder)
            .into_iter()
            .filter_map(|(device, how)| how.map(|how| Refusal::Disk { address, device, how }));
        let networks = self.interfaces_below(&folder).into_iter().filter_map(|interface| {
            self.network_use(&interface).map(|how| Refusal::Network { address, interface, how })
        });
        disks.chain(networks).collect()
    }

    /// Disks of the device at `folder`, each with what it is used for.
    fn disks_below(&self, folder: &Path) -> BTreeMap<String, Option<String>> {
        let blocks = self.path("sys/block");
        let own =
            |name: &String| std::fs::canonicalize(blocks.join(name)).is_ok_and(|p| p.starts_with(folder));
        let mut disks: Vec<String> = entries(&blocks).into_iter().filter(own).collect();
        // An NVMe disk with several paths is a device of its own; the paths are below the controllers.
        for controller in entries(&folder.join("nvme")) {
            disks.extend(
                entries(&folder.join("nvme").join(controller)).iter().filter_map(|path| multipath(path)),
            );
        }
        let used = self.used_blocks();
        let how = |disk: String| {
            let found =
                self.layers(&disk).into_iter().find_map(|layer| used.get(&layer).map(|how| (layer, how)));
            let how = found
                .map(|(layer, how)| if layer == disk { how.clone() } else { format!("({layer}) {how}") });
            (disk, how)
        };
        disks.into_iter().map(how).collect()
    }

    /// `block` with its partitions and whatever is built on any of them.
    fn layers(&self, block: &str) -> Vec<String> {
        let mut all: Vec<String> = vec![block.to_owned()];
        let mut from = 0;
        for _ in 0..MOST_LAYERS {
            let next: Vec<String> = all[from..].iter().flat_map(|name| self.above(name)).collect();
            from = all.len();
            for name in next {
                if !all.contains(&name) {
                    all.push(name);
                }
            }
        }
        all
    }

    /// Partitions of a block device and what holds it.
    fn above(&self, block: &str) -> Vec<String> {
        let folder = self.path("sys/class/block").join(block);
        let partition = |name: &String| folder.join(name).join("partition").exists();
        let mut names: Vec<String> = entries(&folder).into_iter().filter(partition).collect();
        names.extend(entries(&folder.join("holders")));
        names
    }

    /// Every block device in use, with what for.
    fn used_blocks(&self) -> BTreeMap<String, String> {
        let by_number: BTreeMap<String, String> = entries(&self.path("sys/class/block"))
            .into_iter()
            .map(|name| (text(&self.path("sys/class/block").join(&name).join("dev")), name))
            .collect();
        let mut used = BTreeMap::new();
        // Fields: ID, parent, major:minor, root, mount point, ... - type, source (proc(5)).
        for line in text(&self.path("proc/self/mountinfo")).lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let [_, _, number, _, place, ..] = fields[..] else { continue };
            let how = format!("is mounted at {}", place.replace("\\040", " "));
            let source = fields.iter().position(|f| *f == "-").and_then(|at| fields.get(at + 2));
            let names = [by_number.get(number).cloned(), source.and_then(|s| self.block_name(s))];
            for name in names.into_iter().flatten() {
                used.entry(name).or_insert_with(|| how.clone());
            }
        }
        for line in text(&self.path("proc/swaps")).lines().skip(1) {
            let name = line.split_whitespace().next().and_then(|s| self.block_name(s));
            used.extend(name.map(|n| (n, "is swap space".into())));
        }
        // A file system over several disks names only one of them in the list of mounts.
        for volume in entries(&self.path("sys/fs/btrfs")) {
            for name in entries(&self.path("sys/fs/btrfs").join(volume).join("devices")) {
                used.entry(name).or_insert_with(|| "is part of a mounted btrfs".into());
            }
        }
        used
    }

    /// The kernel's name for a path below `/dev`.
    fn block_name(&self, path: &str) -> Option<String> {
        let below = path.strip_prefix("/dev/")?;
        let file = self.path("dev").join(below);
        let target = std::fs::canonicalize(&file).unwrap_or_else(|_| PathBuf::from(below));
        Some(target.file_name()?.to_str()?.to_owned())
    }

    fn interfaces_below(&self, folder: &Path) -> Vec<String> {
        let class = self.path("sys/class/net");
        let own =
            |name: &String| std::fs::canonicalize(class.join(name)).is_ok_and(|p| p.starts_with(folder));
        entries(&class).into_iter().filter(own).collect()
    }

    /// What the host's network uses an interface for, itself or through a bridge or bond above it.
    fn network_use(&self, interface: &str) -> Option<String> {
        let routes = text(&self.path("proc/net/route"));
        let routes6 = text(&self.path("proc/net/ipv6_route"));
        let addresses6 = text(&self.path("proc/net/if_inet6"));
        let mut name = interface.to_owned();
        for _ in 0..MOST_LAYERS {
            if let Some(how) = use_of(&name, &routes, &routes6, &addresses6) {
                let through = if name == interface { String::new() } else { format!("(through {name}) ") };
                return Some(through + how);
            }
            name = link_name(&self.path("sys/class/net").join(&name).join("master"))?;
        }
        None
    }
}

/// An interface that the kernel has a route over has an address.
fn use_of(interface: &str, routes: &str, routes6: &str, addresses6: &str) -> Option<&'static str> {
    // Interface, destination, gateway, flags, ..., mask in the eighth place.
    let own: Vec<Vec<&str>> = routes
        .lines()
        .map(|l| l.split_whitespace().collect())
        .filter(|f: &Vec<&str>| f.first() == Some(&interface))
        .collect();
    let default = own.iter().any(|f| f.get(1) == Some(&"00000000") && f.get(7) == Some(&"00000000"));
    // Destination, prefix length, ..., interface last; lo holds the default that refuses.
    let default6 = routes6.lines().any(|l| {
        let fields: Vec<&str> = l.split_whitespace().collect();
        fields.last() == Some(&interface) && fields.get(1) == Some(&"00") && l.starts_with(&"0".repeat(32))
    });
    // Address, index, prefix length, scope, flags, interface; scope 20 is the link alone.
    let global6 = addresses6.lines().any(|l| {
        let fields: Vec<&str> = l.split_whitespace().collect();
        fields.last() == Some(&interface) && fields.get(3) != Some(&"20")
    });
    match () {
        () if default || default6 => Some("carries the default route"),
        () if !own.is_empty() || global6 => Some("is up and has an address"),
        () => None,
    }
}

/// `nvme0c1n2` is path 1 to the disk `nvme0n2`.
fn multipath(path: &str) -> Option<String> {
    let (subsystem, rest) = path.strip_prefix("nvme")?.split_once('c')?;
    let (controller, namespace) = rest.split_once('n')?;
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    [subsystem, controller, namespace].into_iter().all(digits).then(|| format!("nvme{subsystem}n{namespace}"))
}
