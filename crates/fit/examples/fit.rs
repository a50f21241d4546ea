//! `outboard fit` by itself, for trying policies without building the whole program.

#![allow(clippy::print_stdout, clippy::print_stderr)] // A developer's tool: nothing runs on after its output has failed.

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: outboard_fit::Args,
}

fn main() -> ExitCode {
    match outboard_fit::run(&Cli::parse().args, &mut std::io::stdout()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("fit: {error}");
            ExitCode::FAILURE
        }
    }
}
