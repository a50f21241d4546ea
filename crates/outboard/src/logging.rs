use clap::{Args, ValueEnum};
use std::io::IsTerminal;
use tracing::level_filters::LevelFilter;

/// What is logged, and how. Logs go to standard error.
#[derive(Args)]
pub struct LogArgs {
    /// Least important messages to log.
    #[arg(long, global = true, value_name = "LEVEL", default_value = "warn", help_heading = "Logging")]
    log_level: Level,
    /// Form of the log.
    #[arg(long, global = true, value_name = "FORM", default_value = "text", help_heading = "Logging")]
    log_format: Format,
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

/// Starts logging for the whole process.
pub fn init(args: &LogArgs) {
    let builder = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::from(args.log_level))
        .with_writer(std::io::stderr);
    match args.log_format {
        Format::Text => builder.with_target(false).with_ansi(std::io::stderr().is_terminal()).init(),
        Format::Json => builder.json().init(),
    }
}
