//! `cargo xtask lint`: what can be checked without running anything.

mod layers;
mod text;

use crate::lab::Counts;
use crate::paths::Paths;
use crate::{arm64, process, workspace};
use anyhow::{Context, Result, bail};
use lab_cases::protocol::Outcome;
use std::process::{Command, Stdio};
use std::time::Instant;

const APPLE: &str = "aarch64-apple-darwin";

/// A check. `Ok(Some(reason))` skips it.
type Check = fn(&Paths) -> Result<Option<String>>;

const CHECKS: [(&str, Check); 6] = [
    ("format", format),
    ("clippy", clippy),
    ("layers", layers::check),
    ("text", text::check),
    ("check-macos", check_apple),
    ("check-arm64", check_arm64),
];

/// Runs all checks and prints how each ended.
pub fn run(paths: &Paths) -> Counts {
    let mut counts = Counts::default();
    for (name, check) in CHECKS {
        let start = Instant::now();
        let outcome = match check(paths) {
            Ok(None) => Outcome::Passed,
            Ok(Some(reason)) => Outcome::Skipped(reason),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        counts.add(&outcome);
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Outcome::Passed => println!("  passed   lint/{name} ({seconds:.1} s)"),
            Outcome::Skipped(reason) => println!("  skipped  lint/{name}: {reason}"),
            Outcome::Failed(reason) => println!("  FAILED   lint/{name}: {reason}"),
        }
    }
    counts
}

fn format(paths: &Paths) -> Result<Option<String>> {
    if let Some(reason) = lacks(paths, "fmt", "rustfmt") {
        return Ok(Some(reason));
    }
    process::output(crate::cargo(paths).args(["fmt", "--all", "--check"]), "cargo fmt --check")
        .context("`cargo fmt` repairs this")?;
    Ok(None)
}

fn clippy(paths: &Paths) -> Result<Option<String>> {
    if let Some(reason) = lacks(paths, "clippy", "clippy") {
        return Ok(Some(reason));
    }
    let mut command = crate::cargo(paths);
    command.args(["clippy", "--workspace", "--all-targets", "--quiet", "--"]);
    // A function has at most 100 lines.
    command.args(["-D", "warnings", "-D", "clippy::too_many_lines"]);
    process::run_logged(&mut command, "cargo clippy", &paths.lab.join("clippy.log"))?;
    Ok(None)
}

/// Why there is no `cargo SUBCOMMAND`, after trying to add rustup's component.
fn lacks(paths: &Paths, subcommand: &str, component: &str) -> Option<String> {
    let works = || {
        let mut command = crate::cargo(paths);
        command.args([subcommand, "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if !works() && process::exists("rustup") {
        println!("Adding the Rust component {component} (rustup component add)");
        // If it brings nothing, the check is skipped below.
        let _ = Command::new("rustup").args(["component", "add", component]).stdin(Stdio::null()).output();
    }
    (!works()).then(|| format!("this Rust toolchain has no {component}, and rustup brings none"))
}

fn check_apple(paths: &Paths) -> Result<Option<String>> {
    if !arm64::ensure_target(APPLE)? {
        return Ok(Some(format!("this Rust toolchain has no {APPLE}, and rustup brings none")));
    }
    let mut command = crate::cargo(paths);
    command.args(["check", "--quiet", "--target", APPLE]);
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
        &format!("cargo check --target {APPLE}"),
        &paths.lab.join("macos.log"),
    )?;
    Ok(None)
}

fn check_arm64(paths: &Paths) -> Result<Option<String>> {
    let toolchain = arm64::Toolchain::prepare(paths)?;
    let mut command = toolchain.cargo(paths, "check");
    command.args(["--workspace", "--exclude", "xtask", "--quiet"]);
    process::run_logged(&mut command, "cargo check for arm64 Linux", &paths.lab.join("arm64.log"))?;
    Ok(None)
}
