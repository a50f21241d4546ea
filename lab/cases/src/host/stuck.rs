//! What the emulated host's kernel knows of a guest that does not go on.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the kernel's debugging files are; the agent mounts them.
pub const DEBUGFS: &str = "/sys/kernel/debug";

/// Writes into `to`: where each thread of process `pid` is, and, twice with a second between, the interrupt controller of its VM and how
/// often its vCPUs have left the guest.
pub(super) fn describe(pid: u32, to: &Path) {
    let mut text = String::new();
    let threads = folder(&PathBuf::from(format!("/proc/{pid}/task")));
    for entry in &threads {
        for name in ["comm", "stat", "wchan", "syscall", "stack"] {
            let _ = writeln!(text, "{}/{name}: {}", entry.display(), read(&entry.join(name)).trim_end());
        }
    }
    for round in 0..2 {
        if round > 0 {
            std::thread::sleep(Duration::from_secs(1));
        }
        let vms = folder(&Path::new(DEBUGFS).join("kvm")).into_iter();
        let is_ours = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            is_made_by(&name, threads.iter().filter_map(|thread| thread.file_name()?.to_str()))
        };
        for vm in vms.filter(is_ours) {
            describe_folder(&vm, &mut text);
        }
    }
    // For people, when a case has failed already.
    let _ = fs::write(to, text);
}

/// Whether the debugging folder called `name` (`ID-DESCRIPTOR`) is of a VM that one of `threads` made: KVM takes the thread's number, not the
/// process's.
fn is_made_by<'a>(name: &str, mut threads: impl Iterator<Item = &'a str>) -> bool {
    name.split_once('-').is_some_and(|(maker, _)| threads.any(|thread| thread == maker))
}

fn describe_folder(at: &Path, text: &mut String) {
    for entry in folder(at) {
        if entry.is_dir() {
            describe_folder(&entry, text);
        } else {
            let content = read(&entry);
            let separator = if content.lines().count() > 1 { "\n" } else { " " };
            let _ = writeln!(text, "{}:{separator}{}", entry.display(), content.trim_end());
        }
    }
}

fn folder(at: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(at).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    entries
}

fn read(at: &Path) -> String {
    fs::read(at).map_or_else(|e| format!("({e})"), |bytes| String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::is_made_by;

    #[test]
    fn a_vm_is_its_threads() {
        assert!(is_made_by("5816-4", ["5815", "5816"].into_iter()));
        assert!(!is_made_by("58-4", ["5815", "5816"].into_iter()));
        assert!(!is_made_by("exits", ["5815"].into_iter()));
    }
}
