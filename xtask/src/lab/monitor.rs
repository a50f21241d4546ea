//! The emulator's monitor (QEMU's QMP), for cases that plug and pull hardware of the emulated host.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// In the lab's folder. The emulator is started there, since the path of a socket may have 108 bytes only.
const SOCKET: &str = "monitor.sock";
/// Most time for an answer: commands do not wait for guests.
const LIMIT: Duration = Duration::from_secs(60);

/// A connection to the monitor.
pub struct Monitor {
    stream: BufReader<UnixStream>,
}

/// Gives the emulator a monitor, whose socket is made in `lab`.
pub fn add(lab: &Path, command: &mut Command) -> Result<()> {
    match std::fs::remove_file(lab.join(SOCKET)) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).context("cannot remove the last run's monitor socket");
        }
        _ => {}
    }
    command.current_dir(lab);
    command.arg("-qmp").arg(format!("unix:{SOCKET},server=on,wait=off"));
    Ok(())
}

impl Monitor {
    /// Connects to the monitor of an emulator that is up.
    pub fn connect(lab: &Path) -> Result<Self> {
        let folder = File::open(lab)?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd());
        let stream = UnixStream::connect(path).context("cannot connect to the emulator's monitor")?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut monitor = Self { stream: BufReader::new(stream) };
        monitor.line().context("the emulator's monitor does not greet")?;
        monitor.execute(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(monitor)
    }

    /// Does what `line` says, as a person would type it; what the monitor said.
    pub fn command(&mut self, line: &str) -> Result<String> {
        let arguments = json!({ "command-line": line });
        let said = self.execute(&json!({ "execute": "human-monitor-command", "arguments": arguments }))?;
        Ok(said.as_str().unwrap_or_default().trim().to_owned())
    }

    fn execute(&mut self, command: &Value) -> Result<Value> {
        let mut text = command.to_string();
        text.push('\n');
        self.stream.get_mut().write_all(text.as_bytes()).context("the emulator's monitor is gone")?;
        loop {
            let mut answer = self.line()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("the emulator's monitor refuses {command}: {error}");
            }
            // Anything else is an event, which nobody here waits for.
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.stream.read_line(&mut line).context("the emulator's monitor does not answer")?;
        serde_json::from_str(&line).with_context(|| format!("the emulator's monitor said '{}'", line.trim()))
    }
}
