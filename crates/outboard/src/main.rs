//! The `outboard` program: parse, call, print.

mod control;
mod devices;
mod logging;
mod run;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Runs Linux virtual machines with real PCI devices.
#[derive(Parser)]
#[command(name = "outboard", version, about, arg_required_else_help = true, after_help = EXIT_STATUS)]
struct Cli {
    #[command(flatten)]
    log: logging::LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a virtual machine in the foreground until it powers off.
    Run(Box<run::RunArgs>),
    /// Show the host's PCI devices, and make them ready for a guest.
    Devices(devices::DevicesArgs),
    /// Show the virtual machines of this user that are running, and what became of their devices.
    Status(control::StatusArgs),
    /// Remove a device of the host from a running guest, or add one.
    Device(control::DeviceArgs),
    /// Replay DMA traces: would they fit a Mac's limits, and with which policy?
    Fit(outboard_fit::Args),
    /// Record what drivers map for DMA while a command runs, for `outboard fit`. Linux 6.12 or newer, as root.
    Record(outboard_record::Args),
}

const EXIT_STATUS: &str = "Exit status:
  0  the guest powered itself off
  1  Outboard could not start or run the machine
  2  the command line was wrong
  3  the guest's kernel panicked
  4  the machine was stopped hard: Ctrl-A x, a second SIGTERM, or no answer to the power key
  5  Outboard asked its kernel for something that the jail forbids: a bug, or an attack on it";

fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::init(&cli.log);
    restore_terminal_on_panic();
    let status = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Devices(args) => devices::devices(&args),
        Command::Status(args) => control::status(&args),
        Command::Device(args) => control::device(&args),
        Command::Fit(args) => fit(&args),
        Command::Record(args) => record(&args),
    };
    outboard_machine::restore_terminal();
    status
}

/// Status 0 if every trace fits with Outboard's own policy, 1 if one does not or cannot be read.
fn fit(args: &outboard_fit::Args) -> ExitCode {
    match outboard_fit::run(args, &mut std::io::stdout().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("outboard: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The command's own status; 125 to 127 where it is ours.
fn record(args: &outboard_record::Args) -> ExitCode {
    match outboard_record::run(args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("outboard: {error}");
            ExitCode::from(error.status())
        }
    }
}

/// A panic of ours is a bug; it must not leave the user's terminal unusable too.
fn restore_terminal_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        outboard_machine::restore_terminal();
        print(info);
    }));
}
