//! `outboard record`: what drivers ask of the kernel's DMA API while a command runs, as text that `outboard fit` reads.
//!
//! The kernel's `dma:*` trace events (`include/trace/events/dma.h`, Linux 6.12 and newer) are read raw from a tracing instance
//! of our own: nothing of the machine's other tracing is touched, and removing the instance switches everything off.

mod error;
mod event;
mod format;
mod recording;
mod ring;
mod run;
mod tracefs;

pub use error::Error;
pub use run::run;

use std::ffi::OsString;
use std::path::PathBuf;

/// Record every DMA mapping while a command runs, for `outboard fit`.
///
/// Works on any Linux machine from kernel 6.12 on, as root. Mappings that exist before the recording begins are not seen: to have a
/// driver's own, let COMMAND load it. Run the command as yourself with `sudo outboard record -- sudo -u "$USER" COMMAND`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Exit status: the command's own (128 and the signal's number if a signal ended it); \
    125 if recording failed or events were lost, 126 if the command cannot be run, 127 if there is none.")]
pub struct Args {
    /// Where the trace goes.
    #[arg(short, long, value_name = "FILE", default_value = "outboard.trace")]
    pub output: PathBuf,
    /// Only this PCI device, such as 01:00.0; otherwise all, and `outboard fit --device` chooses one.
    #[arg(long, value_name = "BDF", value_parser = device)]
    pub device: Option<String>,
    /// Buffer in the kernel, MiB for each CPU [default: 256 MiB shared by all CPUs, 4 to 32 each].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub buffer: Option<u32>,
    /// The command and its arguments.
    #[arg(required = true, last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// `[DOMAIN:]BUS:DEVICE.FUNCTION` in the kernel's spelling. Nothing else may get into the kernel's filter.
fn device(text: &str) -> Result<String, String> {
    let wrong = || format!("{text:?} is no PCI address; it looks like 01:00.0 or 0000:01:00.0");
    let lower = text.to_ascii_lowercase();
    let whole = if lower.matches(':').count() == 1 { format!("0000:{lower}") } else { lower };
    let (rest, function) = whole.rsplit_once('.').ok_or_else(wrong)?;
    let parts: Vec<&str> = rest.split(':').collect();
    let [domain, bus, slot] = parts[..] else { return Err(wrong()) };
    let hex = |part: &str, digits: std::ops::RangeInclusive<usize>| {
        digits.contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit())
    };
    let function_fits = matches!(function.as_bytes(), [b'0'..=b'7']);
    if hex(domain, 4..=8) && hex(bus, 2..=2) && hex(slot, 2..=2) && function_fits {
        Ok(whole)
    } else {
        Err(wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_spelt_as_the_kernel_does() {
        assert_eq!(device("01:00.0").as_deref(), Ok("0000:01:00.0"));
        assert_eq!(device("0000:0A:1F.7").as_deref(), Ok("0000:0a:1f.7"));
        assert_eq!(device("10000:e1:00.0").as_deref(), Ok("10000:e1:00.0"));
        for wrong in
            ["", "01:00", "1:0.0", "01:00.8", "01:00.0\" || 1", "0000:01:00.0.0", "x:01:00.0", "eth0"]
        {
            assert!(device(wrong).is_err(), "{wrong}");
        }
    }
}
