//! The allow-list as people read it.

use super::calls::{self, Call, When, Who};
use crate::ThreadKind;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What x86-64 has beside the calls that every architecture has; Outboard's machines run on arm64.
const ONLY_X86_64: [&str; 5] = ["epoll_wait", "open", "poll", "rename", "unlink"];

/// A line for each system call with the kinds of threads that may make it, and one for each kind with its requests of ioctl(2).
pub(crate) fn table() -> String {
    let who = Who { process: 1, thread: Some(1) };
    let mut kinds: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut requests = String::new();
    for kind in ThreadKind::ALL {
        let mut seen = Vec::new();
        for Call { name, when, .. } in calls::of(kind, who) {
            let name = name.trim_start_matches("SYS_");
            if !seen.contains(&name) && !ONLY_X86_64.contains(&name) {
                seen.push(name);
                kinds.entry(name).or_default().push(kind.name());
            }
            if let When::Among(_, groups) = when {
                let names: Vec<&str> =
                    groups.iter().flat_map(|group| group.iter()).map(|(_, name)| *name).collect();
                let _ = writeln!(requests, "| {kind} | {} |", names.join(", "));
            }
        }
    }
    let mut text = String::from("| system call | threads |\n|---|---|\n");
    for (name, kinds) in kinds {
        let who = if kinds.len() == ThreadKind::ALL.len() { "all".to_owned() } else { kinds.join(", ") };
        let _ = writeln!(text, "| `{name}` | {who} |");
    }
    text + "\n| thread | requests of `ioctl` |\n|---|---|\n" + &requests
}
