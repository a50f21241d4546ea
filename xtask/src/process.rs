//! Starting other programs: what failed, what it said, where the whole of it is.

use crate::progress;
use anyhow::{Context, Result, anyhow, bail};
use std::fmt::Display;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

/// Lines of a failed program's output that go into the error.
const MOST_LINES: usize = 25;

/// For errors: what to do comes behind the cause, on a line of its own.
pub trait Advise<T> {
    /// Adds `advice`.
    fn advise<D: Display>(self, advice: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<anyhow::Error>> Advise<T> for std::result::Result<T, E> {
    fn advise<D: Display>(self, advice: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| {
            let error: anyhow::Error = error.into();
            anyhow!("{error:#}\n{}", advice())
        })
    }
}

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

/// Has `command` speak English in plain characters: what it says is read by this program.
pub fn in_c_locale(command: &mut Command) -> &mut Command {
    command.env("LC_ALL", "C").env_remove("LANGUAGE")
}

/// Runs `command`, its output into `log`; an error has what matters of it.
pub fn run_logged(command: &mut Command, what: &str, log: &Path) -> Result<()> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let status = progress::follow(log, || command.status()).with_context(|| not_started(command))?;
    if status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    bail!("{what} failed ({status}):\n{}\nThe whole output: {}", essence(&text), log.display())
}

/// Runs `command` and returns its standard output; an error has what it said.
pub fn output(command: &mut Command, what: &str) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| not_started(command))?;
    if !output.status.success() {
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{what} failed ({}):\n{}", output.status, essence(&text));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{what} printed something that is not text"))
}

fn not_started(command: &Command) -> String {
    format!("cannot start {}", command.get_program().to_string_lossy())
}

/// `text` as one word of a shell's command.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The last `count` lines.
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// What matters of a failed program's output: from its first error on, since what follows is mostly its consequence; the end, where no line looks
/// like an error.
pub fn essence(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    match lines.iter().position(|line| is_error(line)) {
        Some(first) => lines[first..].iter().take(MOST_LINES).copied().collect::<Vec<_>>().join("\n"),
        None => tail(text, MOST_LINES),
    }
}

/// As cargo, compilers, make, apt and dpkg begin such lines.
fn is_error(line: &str) -> bool {
    let line = line.trim_start();
    ["error:", "error[", "E: ", "Err:", "dpkg: error", "dpkg-deb: error"]
        .iter()
        .any(|start| line.starts_with(start))
        || [": error:", ": fatal error:", ": *** ", "cannot stat", ": undefined reference"]
            .iter()
            .any(|part| line.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_comes_first() {
        let make = "  CC [M]  main.o\nmain.c:3:1: error: unknown type name 'in'\n  note\nmake[1]: *** [main.o] Error 1\nmake: *** Error 2\n";
        assert!(essence(make).starts_with("main.c:3:1: error"), "{}", essence(make));
        let cargo =
            "   Compiling a\nwarning: odd\nerror[E0061]: no\n  --> a.rs\nerror: could not compile `a`\n";
        assert!(essence(cargo).starts_with("error[E0061]"));
        let apt = "Hit:1 x\nErr:2 y\n  404\nReading\nE: Failed to fetch\n";
        assert!(essence(apt).starts_with("Err:2 y"));
        let long: String = (0..100).map(|n| format!("line {n}\n")).collect();
        assert_eq!(essence(&long).lines().count(), MOST_LINES);
        assert!(essence(&long).ends_with("line 99"));
        let later = format!("error: it\n{long}");
        assert!(essence(&later).starts_with("error: it") && essence(&later).lines().count() == MOST_LINES);
    }

    #[test]
    fn a_quoted_word_is_one_word() {
        for word in ["plain", "two words", "it's", "$HOME `x` \"y\" \\", "''"] {
            let script = format!("printf %s {}", quoted(word));
            assert_eq!(output(Command::new("sh").arg("-c").arg(script), "sh").expect("it runs"), word);
        }
    }

    #[test]
    fn advice_comes_behind_the_cause() {
        let failed: Result<()> = Err(anyhow!("disk full")).context("cannot write x");
        let text = format!("{:#}", failed.advise(|| "make room").expect_err("it failed"));
        assert_eq!(text, "cannot write x: disk full\nmake room");
    }
}
