//! What users read from Outboard and write on its command line.
//!
//! The one way to print: [`say!`] for messages, [`stdout`] for results, a [`Writer`] for logs and consoles. Whatever becomes of the terminal,
//! pipe or file behind them neither ends the process nor makes it wait.

mod chain;
mod descriptor;
mod file;
mod queue;
mod said;
mod size;
mod stdout;

pub use chain::Chain;
pub use descriptor::survive_background;
pub use file::{Begin, FileTarget, RotatingFile, replace_file};
pub use queue::{Kind, Writer};
pub use said::{LogLine, flush, has_log_file, log_to, say_text, survive_signals};
pub use size::{KIB, MIB, parse_size};
pub use stdout::{Stdout, stdout};
