//! Automation of this workspace: `cargo xtask --help`.

#![allow(clippy::print_stdout, clippy::print_stderr)] // A developer's tool: nothing runs on after its output has failed.

mod arm64;
mod bench;
mod debian;
mod guest_module;
mod lab;
mod lint;

mod package;
mod paths;
mod process;
mod stamp;
mod test;
mod workspace;

use anyhow::Result;
use clap::{Parser, Subcommand};
use paths::Paths;
use std::process::{Command, ExitCode};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Automation of Outboard's workspace")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot a Linux guest with Outboard, in an emulated arm64 host
    Lab(lab::Options),
    /// Run every check: lints, tests of the crates, cases in the lab
    Test(test::Options),
    /// Build the guest's kernel module for the lab's kernels
    Module {
        /// And for the newest kernel of Debian unstable, with what this machine has of compilers
        #[arg(long)]
        newest: bool,
    },
    /// Build the guest's kernel module as a Debian package for DKMS
    Package {
        /// Also build the module out of the package, as DKMS does, for the lab's kernels
        #[arg(long)]
        check: bool,
    },
    /// Check format, clippy, layers and other rules, and the targets that are not run here
    Lint,
    /// Measure Outboard beside QEMU
    Bench(bench::Options),
    /// Install what the other tasks need and is missing
    Setup {
        /// Only say what would be installed
        #[arg(long)]
        dry_run: bool,
    },
}

fn main() -> ExitCode {
    match run(&Cli::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task) -> Result<bool> {
    let paths = Paths::new()?;
    match task {
        Task::Lab(options) => lab::run(&paths, options),
        Task::Test(options) => test::run(&paths, options),
        Task::Module { newest } => lab::build_modules(&paths, *newest),
        Task::Package { check } => package::run(&paths, *check),
        Task::Bench(options) => bench::run(&paths, options),
        Task::Lint => {
            let counts = lint::run(&paths);
            println!("{} passed, {} failed, {} skipped", counts.passed, counts.failed, counts.skipped);
            Ok(counts.failed == 0)
        }
        Task::Setup { dry_run } => {
            debian::setup::ensure(&paths, &debian::setup::LAB, *dry_run)?;
            Ok(true)
        }
    }
}

/// The cargo that runs this program, in the clone.
fn cargo(paths: &Paths) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What `cargo run` sets for us would make a cargo below it build everything again.
    command.env_remove("CARGO_MANIFEST_DIR").current_dir(&paths.root);
    command
}
