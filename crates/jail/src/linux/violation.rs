//! The end of a process that asked for what it must not: a line that a bug report can be made of, and a status of its own.

use crate::{ThreadKind, VIOLATION_STATUS};
use std::cell::Cell;
use std::sync::OnceLock;

thread_local! {
    /// Constant and without destructor, so that reading it in a signal handler is a plain load.
    static KIND: Cell<Option<ThreadKind>> = const { Cell::new(None) };
}

static LAST_WORDS: OnceLock<fn()> = OnceLock::new();

/// `siginfo_t` of a SIGSYS (asm-generic/siginfo.h), which libc does not describe.
#[repr(C)]
struct Violation {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
    architecture: libc::c_uint,
}

/// Remembers what the calling thread is.
pub(super) fn set_kind(kind: ThreadKind) {
    KIND.set(Some(kind));
}

/// What the calling thread is, if it was confined as that.
pub(super) fn kind() -> Option<ThreadKind> {
    KIND.get()
}

/// Handles SIGSYS from here on; `last_words` is called first.
pub(super) fn install(last_words: Option<fn()>) -> std::io::Result<()> {
    if let Some(last_words) = last_words {
        // A second machine in one process has the same terminal.
        let _ = LAST_WORDS.set(last_words);
    }
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_violation as extern "C" fn(_, _, _) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler only does what is async-signal-safe.
    if unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_violation(_: libc::c_int, info: *mut Violation, _: *mut libc::c_void) {
    if let Some(last_words) = LAST_WORDS.get() {
        last_words();
    }
    // SAFETY: the kernel fills in a siginfo_t for a handler with SA_SIGINFO, and SIGSYS comes from nothing but seccomp.
    let call = unsafe { (*info).call };
    let mut line = Line::default();
    line.push(b"outboard: a thread of kind '");
    line.push(KIND.get().map_or("any", ThreadKind::name).as_bytes());
    line.push(b"' made system call ");
    line.push_number(call.unsigned_abs());
    line.push(b" (");
    line.push(std::env::consts::ARCH.as_bytes());
    line.push(
        b"), which the jail forbids; the process ends. This is a bug in Outboard or an attack on it: \
        please report it with this line. `--jail off` runs without that protection.\n",
    );
    // SAFETY: the bytes are readable; write(2) and _exit(2) are async-signal-safe.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(VIOLATION_STATUS);
    }
}

/// Text on the stack.
struct Line {
    bytes: [u8; 320],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 320], len: 0 }
    }
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn push_number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut first = digits.len();
        while first == digits.len() || number > 0 {
            first -= 1;
            digits[first] = b'0' + (number % 10) as u8;
            number /= 10;
        }
        self.push(&digits[first..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_text_and_numbers_and_no_more_than_it_has_room_for() {
        let mut line = Line::default();
        line.push(b"call ");
        for number in [0, 7, 435, u32::MAX] {
            line.push_number(number);
            line.push(b" ");
        }
        assert_eq!(&line.bytes[..line.len], b"call 0 7 435 4294967295 ");
        line.push(&[b'x'; 1000]);
        assert_eq!(line.len, line.bytes.len());
    }
}
