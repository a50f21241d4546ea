//! The guest's console on the user's terminal.

use super::session::Session;
use anyhow::{Context, Result};
use lab_cases::protocol::{Command, Event, Outcome};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::Duration;

const CTRL_A: u8 = 1;

/// A terminal in raw mode; restored when dropped.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Result<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(&stdin).context("cannot ask the terminal for its mode")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("cannot set the terminal's mode")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // If it cannot be restored there is no way left to say so.
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// Passes keys to the guest and its output back until the guest is off or Ctrl-A x is typed.
pub fn run(session: &mut Session) -> Result<Outcome> {
    let _raw = Raw::enter()?;
    let stdin = std::io::stdin();
    let mut open = true;
    let mut escape = false;
    loop {
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        if open && poll(&mut fds, PollTimeout::ZERO).unwrap_or(0) > 0 {
            let mut bytes = [0; 256];
            // Past std's buffer: what it held back, poll would not see.
            let count = nix::unistd::read(&stdin, &mut bytes).unwrap_or(0);
            open = count > 0;
            if send_keys(session, &bytes[..count], &mut escape)? {
                return Ok(Outcome::Passed);
            }
        }
        match session.poll(Duration::from_millis(15))? {
            Some(Event::Console(text)) => {
                std::io::stdout().write_all(text.as_bytes())?;
                std::io::stdout().flush()?;
            }
            Some(Event::Done { outcome, .. }) => return Ok(outcome),
            Some(Event::Log(text)) => print!("[lab] {text}\r\n"),
            _ => {}
        }
    }
}

/// Sends `bytes` to the guest; whether Ctrl-A x was among them. Ctrl-A twice sends one.
fn send_keys(session: &mut Session, bytes: &[u8], escape: &mut bool) -> Result<bool> {
    let mut keys = Vec::new();
    for byte in bytes {
        match (*escape, *byte) {
            (true, b'x') => {
                session.send(&Command::Abort)?;
                return Ok(true);
            }
            (false, CTRL_A) => *escape = true,
            (_, other) => {
                *escape = false;
                keys.push(other);
            }
        }
    }
    if !keys.is_empty() {
        session.send(&Command::Input(String::from_utf8_lossy(&keys).into_owned()))?;
    }
    Ok(false)
}
