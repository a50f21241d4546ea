use clap::{Args, ValueEnum};
use outboard_cli::{FileTarget, LogLine, RotatingFile};
use std::io::{self, IsTerminal};
use std::path::Path;
use tracing::level_filters::LevelFilter;

/// What is logged, and how. Logs go to standard error unless told otherwise.
#[derive(Args)]
pub struct LogArgs {
    /// Least important messages to log.
    #[arg(long, global = true, value_name = "LEVEL", default_value = "warn", help_heading = "Logging")]
    log_level: Level,
    /// Form of the log.
    #[arg(long, global = true, value_name = "FORM", default_value = "text", help_heading = "Logging")]
    log_format: Format,
    /// File for the log, in place of standard error. At SIZE (64M) it becomes PATH.1, in place of the one before, and a new one begins.
    #[arg(long, global = true, value_name = "PATH[,limit=SIZE|off]", help_heading = "Logging")]
    log_file: Option<FileTarget>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// One line of text for each message.
    Text,
    /// One JSON object for each message.
    Json,
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Off => Self::OFF,
            Level::Error => Self::ERROR,
            Level::Warn => Self::WARN,
            Level::Info => Self::INFO,
            Level::Debug => Self::DEBUG,
            Level::Trace => Self::TRACE,
        }
    }
}

impl LogArgs {
    /// The file that takes the log, if one does.
    pub fn file(&self) -> Option<&Path> {
        self.log_file.as_ref().map(|target| target.path.as_path())
    }
}

/// Starts logging for the whole process.
///
/// # Errors
/// The log's file cannot be opened.
pub fn init(args: &LogArgs) -> Result<(), String> {
    if let Some(target) = &args.log_file {
        let opened = RotatingFile::open(target).and_then(outboard_cli::log_to);
        opened.map_err(|error| {
            format!("cannot open the log {target}: {error}; check the path given with --log-file")
        })?;
    }
    let is_terminal = args.log_file.is_none() && io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::from(args.log_level))
        // What cannot be written is counted by the writer; nothing is to be printed about it behind its back.
        .log_internal_errors(false)
        .with_writer(|| LogLine);
    match args.log_format {
        Format::Text => builder.with_target(false).with_ansi(is_terminal).init(),
        Format::Json => builder.json().init(),
    }
    Ok(())
}
