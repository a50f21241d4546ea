//! What is said over the two wires of the lab, one JSON value a line.
//!
//! Between `xtask` and the emulated host (a virtio-serial port): [`Command`] in, [`Event`] out. Between a guest and the
//! emulated host (the guest's console): [`GuestLine`] behind the mark [`MARK`], among whatever the kernel prints.

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port that carries commands and events.
pub const PORT: &str = "outboard.lab";
/// 9p tag of the folder with programs and kernels, read-only.
pub const SHARE_TAG: &str = "share";
/// 9p tag of the folder for logs and images that go back.
pub const OUT_TAG: &str = "out";
/// Starts a line of the guest that is meant for the host half of a case.
pub const MARK: &str = "@lab ";

/// Which virtual machine monitor runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmm {
    /// The one built here.
    #[default]
    Outboard,
    /// The distribution's QEMU, to compare with.
    Qemu,
}

/// From `xtask` to the emulated host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Run one case to its [`Event::Done`].
    Run {
        /// A name of the table of cases.
        case: String,
        /// Who runs the guest.
        vmm: Vmm,
        /// Seconds after which the case has failed.
        limit_s: u64,
    },
    /// Text for the guest's console (the `shell` case reads it).
    Input(String),
    /// What the emulator's monitor said to [`Event::Monitor`].
    Monitored(String),
    /// Give up the case that is running.
    Abort,
    /// Switch the emulated host off.
    PowerOff,
}

/// How a case, or a part of one, ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "result", content = "reason")]
pub enum Outcome {
    /// All that it checks is so.
    Passed,
    /// It cannot be checked here, and why.
    Skipped(String),
    /// What went wrong.
    Failed(String),
}

/// From the emulated host to `xtask`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The emulated host takes commands.
    Ready {
        /// Its kernel's release.
        kernel: String,
        /// Whether it has `/dev/kvm`.
        kvm: bool,
    },
    /// A phase of the running case ended.
    Phase {
        /// What was done.
        name: String,
        /// How long it took, in milliseconds.
        ms: u64,
    },
    /// A fact for the report: key and value.
    Fact(String, serde_json::Value),
    /// Bytes of the guest's console, as text.
    Console(String),
    /// A sentence for whoever watches.
    Log(String),
    /// A command for the monitor of the emulator that the emulated host runs in, as a person would type it: answered with
    /// [`Command::Monitored`]. So cases plug and unplug what is hardware to the emulated host.
    Monitor(String),
    /// Part of the running case, counted by itself.
    Part {
        /// Its name below the case's.
        name: String,
        /// How it ended.
        outcome: Outcome,
    },
    /// One measurement of the running benchmark.
    Sample {
        /// What was measured.
        metric: String,
        /// On which monitor.
        vmm: Vmm,
        /// In the metric's unit.
        value: f64,
    },
    /// The case is over.
    Done {
        /// Its name.
        case: String,
        /// How it ended.
        outcome: Outcome,
        /// How long it took, in milliseconds.
        ms: u64,
    },
}

/// From the guest half of a case to its host half.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestLine {
    /// The guest's init has begun; the first thing it does.
    Init {
        /// Milliseconds since its kernel started to count.
        uptime_ms: u64,
    },
    /// A fact that the host half waits for.
    Note(String, serde_json::Value),
    /// The guest half is over: nothing, or what went wrong.
    Done(Option<String>),
}

/// Reads a line of the guest's console: `None` where it is not meant for the host half (or is damaged by a kernel
/// message in its middle: then the waiting side runs into its time limit and says so).
pub fn parse_guest_line(line: &str) -> Option<GuestLine> {
    let (_, json) = line.split_once(MARK)?;
    serde_json::from_str(json.trim_end()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_lines_are_found_behind_other_output() {
        let line = format!("[    1.2] noise {MARK}{{\"note\":[\"cpus\",4]}}\r");
        assert_eq!(parse_guest_line(&line), Some(GuestLine::Note("cpus".into(), 4.into())));
        assert_eq!(parse_guest_line("plain kernel output"), None);
        assert_eq!(parse_guest_line(&format!("{MARK}{{\"note\":[\"cp[ 3.1] usb\"")), None);
    }

    #[test]
    fn outcomes_keep_their_reason() {
        let json = serde_json::to_value(Outcome::Skipped("no such device".into())).expect("serializes");
        assert_eq!(json, serde_json::json!({"result": "skipped", "reason": "no such device"}));
    }
}
