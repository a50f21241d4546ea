//! The `outboard` program: parse, call, print.

mod control;
mod devices;
mod logging;
mod run;

use clap::{Parser, Subcommand};
use std::error::Error;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

/// Exit status for a command line that is wrong, as clap has it.
const EXIT_USAGE: u8 = 2;
/// How long the last messages may take to get out.
const LAST_WORDS: Duration = Duration::from_secs(1);

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
  4  the machine was stopped hard: Ctrl-A x, a second SIGTERM, or no answer to the power key";

fn main() -> ExitCode {
    outboard_cli::survive_signals();
    let status = match Cli::try_parse() {
        Ok(cli) => start(cli),
        Err(error) => explain(&error),
    };
    outboard_machine::restore_terminal();
    outboard_cli::flush(LAST_WORDS);
    status
}

/// Help, the version, or what is wrong with the command line.
fn explain(error: &clap::Error) -> ExitCode {
    let text = error.render();
    let is_terminal =
        if error.use_stderr() { std::io::stderr().is_terminal() } else { std::io::stdout().is_terminal() };
    let text = if is_terminal { text.ansi().to_string() } else { text.to_string() };
    if !error.use_stderr() {
        return print(&text, true);
    }
    outboard_cli::say!("{}", text.trim_end());
    ExitCode::from(EXIT_USAGE)
}

fn start(cli: Cli) -> ExitCode {
    // Before a log is written over a disk.
    let log = cli.log.file();
    if let (Command::Run(args), Some(log)) = (&cli.command, log)
        && let Err(error) = args.check_log(log)
    {
        return run::failed(&error);
    }
    if let Err(message) = logging::init(&cli.log) {
        return failed(&message);
    }
    report_panics();
    match cli.command {
        Command::Run(args) => run::run(&args, log),
        Command::Devices(args) => devices::devices(&args),
        Command::Status(args) => control::status(&args),
        Command::Device(args) => control::device(&args),
        Command::Fit(args) => fit(&args),
        Command::Record(args) => record(&args),
    }
}

/// Says what went wrong. The log says it too where it has a file of its own.
fn failed(message: &dyn std::fmt::Display) -> ExitCode {
    say_failure(message);
    ExitCode::FAILURE
}

fn say_failure(message: &dyn std::fmt::Display) {
    if outboard_cli::has_log_file() {
        tracing::error!("{message}");
    }
    outboard_cli::say!("outboard: {message}");
}

/// Prints results. Failure if they cannot be written, or `is_whole` says that they are not all.
fn print(text: &str, is_whole: bool) -> ExitCode {
    match outboard_cli::stdout().write_all(text.as_bytes()) {
        Ok(()) if is_whole => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(error) => failed(&format_args!("cannot write the results: {error}")),
    }
}

/// An error with all its causes.
fn chain(error: &dyn Error) -> String {
    outboard_cli::Chain(error).to_string()
}

/// Status 0 if every trace fits with Outboard's own policy, 1 if one does not or cannot be read.
fn fit(args: &outboard_fit::Args) -> ExitCode {
    match outboard_fit::run(args, &mut outboard_cli::stdout()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => failed(&chain(&error)),
    }
}

/// The command's own status; 125 to 127 where it is ours.
fn record(args: &outboard_record::Args) -> ExitCode {
    match outboard_record::run(args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say_failure(&chain(&error));
            ExitCode::from(error.status())
        }
    }
}

/// A panic of ours is a bug. It must not leave the user's terminal unusable too, nor hang where nobody reads the message.
fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        outboard_machine::restore_terminal();
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("without a name").to_owned();
        // Empty unless RUST_BACKTRACE asks for it.
        let backtrace = std::backtrace::Backtrace::capture();
        say_failure(&format_args!(
            "thread {name}: {info}\n{backtrace}\nThis is a bug in Outboard, please report it with its log."
        ));
        outboard_cli::flush(LAST_WORDS);
    }));
}
