//! `cargo xtask lint`: what can be checked without running anything.

mod evidence;
mod layers;
mod text;

use crate::lab::Counts;
use crate::paths::Paths;
use crate::process::Advise;
use crate::rustup::{self, Part};
use crate::{arm64, process, progress, workspace};
use anyhow::{Result, bail};
use lab_cases::protocol::Outcome;

/// A check. `Ok(Some(reason))` skips it.
type Check = fn(&Paths) -> Result<Option<String>>;

const CHECKS: [(&str, Check); 7] = [
    ("format", format),
    ("clippy", clippy),
    ("layers", layers::check),
    ("text", text::check),
    ("evidence", evidence::check),
    ("check-macos", check_apple),
    ("check-arm64", check_arm64),
];

/// Runs all checks and prints how each ended.
pub fn run(paths: &Paths) -> Counts {
    let mut counts = Counts::default();
    for (name, check) in CHECKS {
        progress::begin(&format!("lint/{name}"));
        let outcome = match check(paths) {
            Ok(None) => Outcome::Passed,
            Ok(Some(reason)) => Outcome::Skipped(reason),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        counts.add(&outcome);
        let seconds = progress::end().map_or(0.0, |(_, took)| took.as_secs_f64());
        match outcome {
            Outcome::Passed => println!("  passed   lint/{name} ({seconds:.1} s)"),
            Outcome::Skipped(reason) => println!("  skipped  lint/{name}: {reason}"),
            Outcome::Failed(reason) => println!("  FAILED   lint/{name}: {reason}"),
        }
    }
    counts
}

fn format(paths: &Paths) -> Result<Option<String>> {
    if let Some(reason) = lacks(paths, &rustup::FORMAT)? {
        return Ok(Some(reason));
    }
    process::output(crate::cargo(paths).args(["fmt", "--all", "--check"]), "cargo fmt --check")
        .advise(|| "`cargo fmt` repairs this")?;
    Ok(None)
}

fn clippy(paths: &Paths) -> Result<Option<String>> {
    if let Some(reason) = lacks(paths, &rustup::CLIPPY)? {
        return Ok(Some(reason));
    }
    let mut command = crate::cargo(paths);
    command.args(["clippy", "--workspace", "--all-targets", "--"]);
    // A function has at most 100 lines.
    command.args(["-D", "warnings", "-D", "clippy::too_many_lines"]);
    process::run_logged(&mut command, "cargo clippy", &paths.lab.join("clippy.log"))?;
    Ok(None)
}

/// Why a check cannot be made, if rustup does not bring what it needs.
fn lacks(paths: &Paths, part: &Part) -> Result<Option<String>> {
    let reason = format!("this Rust toolchain has no {part}, and rustup brings none");
    Ok((!part.ensure(paths)?).then_some(reason))
}

fn check_apple(paths: &Paths) -> Result<Option<String>> {
    if let Some(reason) = lacks(paths, &rustup::APPLE)? {
        return Ok(Some(reason));
    }
    let mut command = crate::cargo(paths);
    command.args(["check", "--target", rustup::APPLE.name()]);
    let mut some = false;
    for package in workspace::packages(paths)? {
        if !package.linux_only() {
            command.args(["--package", &package.name]);
            some = true;
        }
    }
    if !some {
        bail!("no crate is left to check");
    }
    process::run_logged(
        &mut command,
        &format!("cargo check --target {}", rustup::APPLE.name()),
        &paths.lab.join("macos.log"),
    )?;
    Ok(None)
}

fn check_arm64(paths: &Paths) -> Result<Option<String>> {
    let toolchain = arm64::Toolchain::prepare(paths)?;
    let mut command = toolchain.cargo(paths, "check");
    command.args(["--workspace", "--exclude", "xtask"]);
    process::run_logged(&mut command, "cargo check for arm64 Linux", &paths.lab.join("arm64.log"))?;
    Ok(None)
}
