//! Starting other programs: what failed, what it said, where the whole of it is.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

/// Lines of a failed program's output that go into the error.
const TAIL: usize = 25;

/// Whether `name` is a program of the search path.
pub fn exists(name: &str) -> bool {
    find(name).is_some()
}

/// Where `name` stands in the search path (with the folders of system administration, which a user's path may lack).
pub fn find(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}

/// Runs `command`, its output into `log`; an error has the end of it.
pub fn run_logged(command: &mut Command, what: &str, log: &Path) -> Result<()> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let status = command.status().with_context(|| not_started(command))?;
    if status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    bail!("{what} failed ({status}):\n{}\nThe whole output: {}", tail(&text, TAIL), log.display())
}

/// Runs `command` and returns its standard output; an error has what it said.
pub fn output(command: &mut Command, what: &str) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| not_started(command))?;
    if !output.status.success() {
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{what} failed ({}):\n{}", output.status, tail(&text, TAIL));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{what} printed something that is not text"))
}

fn not_started(command: &Command) -> String {
    format!("cannot start {}; is it installed?", command.get_program().to_string_lossy())
}

/// The last `count` lines.
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
