//! `outboard fit` by itself, for trying policies without building the whole program.

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
