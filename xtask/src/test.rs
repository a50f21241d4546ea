//! `cargo xtask test`: everything that can fail, counted.

use crate::lab::{self, Counts};
use crate::lint;
use crate::package;
use crate::paths::Paths;
use crate::progress;
use anyhow::{Context, Result};
use clap::Args;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Instant;

/// Options of `cargo xtask test`.
#[derive(Args)]
pub struct Options {
    /// Leave out the cases in the lab
    #[arg(long)]
    no_lab: bool,
}

/// Runs lints, tests and cases. Whether nothing failed.
pub fn run(paths: &Paths, options: &Options) -> Result<bool> {
    let start = Instant::now();
    println!("Lints");
    let mut counts = lint::run(paths);
    println!("Tests of the crates");
    counts += crate_tests(paths)?;
    if options.no_lab {
        println!("Cases in the lab: left out, as asked");
    } else {
        println!("Cases in the lab");
        counts += lab::run_all_cases(paths);
        // Here, because it needs the kernels' headers as the lab does.
        println!("The package of the guest's module, built as DKMS does");
        counts += package_test(paths);
    }
    println!("Everything took {:.0} s", start.elapsed().as_secs_f64());
    println!("{} passed, {} failed, {} skipped", counts.passed, counts.failed, counts.skipped);
    Ok(counts.failed == 0)
}

/// One test: the package can be made, and the module built out of it.
fn package_test(paths: &Paths) -> Counts {
    let mut counts = Counts::default();
    let result = package::run(paths, true);
    // What failed has left it.
    progress::end();
    match result {
        Ok(_) => counts.passed += 1,
        Err(error) => {
            println!("  FAILED   package: {error:#}");
            counts.failed += 1;
        }
    }
    counts
}

/// Unit, integration and documentation tests of all crates.
fn crate_tests(paths: &Paths) -> Result<Counts> {
    let mut command = crate::cargo(paths);
    command.args(["test", "--workspace", "--no-fail-fast"]).stdin(Stdio::null()).stdout(Stdio::piped());
    // cargo prints what it builds; of the tests only some lines are passed on.
    progress::begin_beside_output("tests of the crates");
    let mut child = command.spawn().context("cannot start cargo test")?;
    let stdout = child.stdout.take().expect("stdout is piped");
    let mut counts = Counts::default();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("reading what cargo test prints")?;
        match parse_result(&line) {
            Some(one) => counts += one,
            // The single tests that passed are many; the others are all shown.
            None if line.ends_with(" ... ok") || line.trim().is_empty() => {}
            None => progress::say(&format!("  {line}")),
        }
    }
    let status = child.wait()?;
    progress::end();
    if !status.success() && counts.failed == 0 {
        println!("  FAILED   cargo test ended with {status} without a failed test: something does not build");
        counts.failed += 1;
    }
    println!("  {} passed, {} failed, {} ignored", counts.passed, counts.failed, counts.skipped);
    Ok(counts)
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …`
fn parse_result(line: &str) -> Option<Counts> {
    let (_, rest) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |word: &str| {
        let part = rest.split(';').find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok());
        part.unwrap_or(0)
    };
    Some(Counts { passed: number("passed"), failed: number("failed"), skipped: number("ignored") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_summary_is_understood() {
        let line = "test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 3 filtered out; finished in 0.01s";
        assert_eq!(parse_result(line), Some(Counts { passed: 12, failed: 1, skipped: 2 }));
        assert_eq!(parse_result("test result_parser ... ok"), None);
    }
}
