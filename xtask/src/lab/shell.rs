//! The guest's console on the user's terminal.

use super::session::Session;
use anyhow::{Context, Result, bail};
use lab_cases::protocol::{Command, Event, Outcome};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::unregister;
use signal_hook::{SigId, flag};
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const CTRL_A: u8 = 1;

/// A terminal in raw mode; restored when dropped.
struct Raw<Fd: AsFd> {
    terminal: Fd,
    /// `None` if it is no terminal.
    before: Option<Termios>,
}

impl<Fd: AsFd> Raw<Fd> {
    fn enter(terminal: Fd) -> Result<Self> {
        if !terminal.as_fd().is_terminal() {
            return Ok(Self { terminal, before: None });
        }
        let before = tcgetattr(&terminal).context("cannot ask the terminal for its mode")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&terminal, SetArg::TCSANOW, &raw).context("cannot set the terminal's mode")?;
        Ok(Self { terminal, before: Some(before) })
    }
}

impl<Fd: AsFd> Drop for Raw<Fd> {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // If it cannot be restored there is no way left to say so.
            let _ = tcsetattr(&self.terminal, SetArg::TCSANOW, before);
        }
    }
}

/// Signals that ask this process to end. While this lives they do not end it by themselves, so that the terminal can be given back.
struct Ending {
    asked: Arc<AtomicBool>,
    handlers: Vec<SigId>,
}

impl Ending {
    fn catch() -> Result<Self> {
        let mut ending = Self { asked: Arc::default(), handlers: Vec::new() };
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            let handler = flag::register(signal, ending.asked.clone()).context("cannot catch signals")?;
            ending.handlers.push(handler);
        }
        Ok(ending)
    }

    fn check(&self) -> Result<()> {
        if self.asked.load(Ordering::Relaxed) {
            bail!("ended by a signal");
        }
        Ok(())
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.handlers.drain(..).for_each(|handler| {
            unregister(handler);
        });
    }
}

/// Passes keys to the guest and its output back until the guest is off or Ctrl-A x is typed.
pub fn run(session: &mut Session) -> Result<Outcome> {
    let ending = Ending::catch()?;
    let stdin = std::io::stdin();
    let _raw = Raw::enter(&stdin)?;
    let mut open = true;
    let mut escape = false;
    loop {
        ending.check()?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::openpty;
    use nix::sys::termios::{InputFlags, LocalFlags};

    #[test]
    fn a_terminal_is_raw_until_the_guard_goes() {
        let pty = openpty(None, None).unwrap();
        let local = || tcgetattr(&pty.slave).unwrap().local_flags;
        let keys = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
        assert!(local().contains(keys), "a terminal begins with line editing, echo and signals");
        let before = (local(), tcgetattr(&pty.slave).unwrap().input_flags);
        assert!(before.1.contains(InputFlags::ICRNL));
        let raw = Raw::enter(&pty.slave).unwrap();
        assert!(!local().intersects(keys));
        assert!(!tcgetattr(&pty.slave).unwrap().input_flags.contains(InputFlags::ICRNL));
        drop(raw);
        assert_eq!((local(), tcgetattr(&pty.slave).unwrap().input_flags), before);
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Raw::enter(&file).unwrap().before.is_none());
    }

    #[test]
    fn a_signal_asks_for_an_end_instead_of_ending() {
        let ending = Ending::catch().unwrap();
        ending.check().unwrap();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGHUP).unwrap();
        ending.check().unwrap_err();
    }
}
