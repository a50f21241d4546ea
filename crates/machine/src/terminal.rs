//! The user's terminal in raw mode, and back.

#![allow(unsafe_code)] // UNSAFETY: termios has no wrapper in std.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

/// The settings to go back to, while the terminal is raw. Global, since a panic or a signal must find them too.
static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Keys go to the guest one by one, Ctrl-C and its like too; output processing stays on, so that our own messages look right.
///
/// # Errors
/// The operating system's, when standard input is no terminal.
pub(crate) fn make_raw() -> io::Result<()> {
    let fd = io::stdin().as_raw_fd();
    // SAFETY: termios is plain data; tcgetattr fills it.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `settings` is writable for the call.
    if unsafe { libc::tcgetattr(fd, &mut settings) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let saved = settings;
    settings.c_iflag &= !(libc::IGNBRK
        | libc::BRKINT
        | libc::PARMRK
        | libc::ISTRIP
        | libc::INLCR
        | libc::IGNCR
        | libc::ICRNL
        | libc::IXON);
    settings.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
    settings.c_cc[libc::VMIN] = 1;
    settings.c_cc[libc::VTIME] = 0;
    // Saved first: whoever restores between the two calls does no harm.
    *SAVED.lock().unwrap_or_else(|e| e.into_inner()) = Some(saved);
    // SAFETY: `settings` came from tcgetattr.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, &settings) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives the terminal back as it was; does nothing if it is not raw. Called at every way out of the process.
pub fn restore_terminal() {
    if let Some(saved) = SAVED.lock().unwrap_or_else(|e| e.into_inner()).take() {
        // In the background the terminal would stop who does this, and with it a process that is to end.
        outboard_cli::survive_background();
        // SAFETY: `saved` came from tcgetattr.
        unsafe { libc::tcsetattr(io::stdin().as_raw_fd(), libc::TCSANOW, &saved) };
    }
}
