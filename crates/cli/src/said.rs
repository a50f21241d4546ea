//! The process's own messages: to standard error, and the log to there or to a file.

use crate::descriptor::{duplicate, survive_file_size_limit, write_all};
use crate::queue::{Kind, Writer};
use crate::{RotatingFile, file};
use std::io::{self, Write};
use std::sync::OnceLock;
use std::time::Duration;

/// Bytes of messages that may wait for standard error or a log file.
const LIMIT: usize = 1 << 20;

static STDERR: OnceLock<Option<Writer>> = OnceLock::new();
static LOG: OnceLock<Writer> = OnceLock::new();

fn stderr() -> Option<&'static Writer> {
    let start = || {
        let file = duplicate(&io::stderr()).ok()?;
        Writer::to_descriptor("messages of the log", Kind::Messages, LIMIT, file).ok()
    };
    STDERR.get_or_init(start).as_ref()
}

/// Prints a message for the user to standard error, with a newline after it: `say!("outboard: {error}")`. Never waits, never fails; before the process
/// ends, [`flush`] gives it time to get out.
#[macro_export]
macro_rules! say {
    ($($arg:tt)+) => { $crate::say_text(format!($($arg)+)) };
}

/// Body of [`say!`].
pub fn say_text(mut text: String) {
    text.push('\n');
    match stderr() {
        Some(writer) => writer.push(text.as_bytes()),
        // No thread or no descriptor could be had: better a message that may wait than none.
        None => {
            if let Ok(file) = duplicate(&io::stderr()) {
                let _ = write_all(&file, text.as_bytes());
            }
        }
    }
}

/// From here on the log goes to `file` in place of standard error.
///
/// # Errors
/// The operating system's, when it has no more threads.
pub fn log_to(file: RotatingFile) -> io::Result<()> {
    let mut file = file;
    file.begin(file::Begin::Append)?;
    let writer = Writer::to_file("messages of the log", Kind::Messages, LIMIT, file)?;
    // A second one would only come from a second call, and there is none.
    let _ = LOG.set(writer);
    Ok(())
}

/// The log goes to a file of its own.
pub fn has_log_file() -> bool {
    LOG.get().is_some()
}

/// Takes a whole message of the log in each call.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogLine;

impl Write for LogLine {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        if let Some(writer) = LOG.get().or_else(stderr) {
            writer.push(message);
        }
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until all messages are out; for one that does not get out at most for `limit`.
pub fn flush(limit: Duration) {
    for writer in [LOG.get(), STDERR.get().and_then(Option::as_ref)].into_iter().flatten() {
        writer.flush(limit);
    }
}

/// Signals that the host sends because of what is written no longer end the process.
pub fn survive_signals() {
    survive_file_size_limit();
}
