//! Rules about the text of tracked files.

use crate::paths::Paths;
use crate::process;
use anyhow::{Result, bail};
use std::fs;
use std::process::Command;

/// Most lines of a source file.
const MOST_LINES: usize = 600;

pub(super) fn check(paths: &Paths) -> Result<Option<String>> {
    let mut command = Command::new("git");
    command.current_dir(&paths.root).args(["ls-files", "-z"]);
    let names = process::output(&mut command, "git ls-files")?;
    let mut faults = Vec::new();
    for name in names.split_terminator('\0') {
        // Text only; a file that has just been removed is no fault.
        if let Ok(text) = fs::read_to_string(paths.root.join(name)) {
            faults.extend(faults_of(name, &text));
        }
    }
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(None)
}

/// Hosts of registries and mirrors: which one is used is the machine's business. In pieces, or this file would break
/// its own rule.
fn registries() -> Vec<String> {
    let hosts: [&[&str]; 6] = [
        &["index", "crates", "io"],
        &["static", "crates", "io"],
        &["deb", "debian", "org"],
        &["static", "rust-lang", "org"],
        &["pypi", "org"],
        &["registry", "npmjs", "org"],
    ];
    hosts.iter().map(|parts| parts.join(".")).collect()
}

fn faults_of(name: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let source = name.ends_with(".rs");
    if source && text.lines().count() > MOST_LINES {
        faults.push(format!("{name} has {} lines, more than {MOST_LINES}: split it", text.lines().count()));
    }
    let unfinished = ["todo", "unimplemented"].map(|word| format!("{word}!("));
    let hosts = registries();
    for (number, line) in text.lines().enumerate() {
        let at = || format!("{name}:{}", number + 1);
        if source && unfinished.iter().any(|word| line.contains(word)) {
            faults.push(format!("{} leaves something to do", at()));
        }
        if let Some(host) = hosts.iter().find(|host| line.contains(host.as_str())) {
            faults.push(format!("{} names the host {host}; take it from the machine's configuration", at()));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_found_with_their_line() {
        let host = registries().remove(2);
        assert_eq!(faults_of("a.md", &format!("x\nhttp://{host}/debian\n")).len(), 1);
        assert!(faults_of("a.md", &format!("x\n{host}"))[0].starts_with("a.md:2 "));
        let unfinished = format!("fn f() {{ {}!() }}", "todo");
        assert_eq!(faults_of("a.rs", &unfinished).len(), 1);
        assert_eq!(faults_of("a.md", &unfinished).len(), 0, "documents may name the macro");
        assert_eq!(faults_of("a.rs", &"\n".repeat(MOST_LINES)).len(), 0);
        assert_eq!(faults_of("a.rs", &"\n".repeat(MOST_LINES + 1)).len(), 1);
    }
}
