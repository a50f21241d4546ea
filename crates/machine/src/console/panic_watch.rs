use std::sync::atomic::{AtomicBool, Ordering};

/// Longest line looked at; a kernel's message is shorter, and a guest may send lines without end.
const MAX_LINE: usize = 256;
/// First line of a panic, and the last one, which a kernel that stays where it is prints (Linux kernel/panic.c).
const BEGIN: &[u8] = b"Kernel panic - not syncing";
const END: &[u8] = b"---[ end Kernel panic - not syncing";

/// Recognises a Linux kernel's panic on its console.
///
/// Debian's arm64 kernels are built without pvpanic, and a panic before modules are loaded could not use it anyway. A guest
/// that prints such a line itself only deceives its own user about its own end.
#[derive(Debug, Default)]
pub(crate) struct PanicWatch {
    seen: AtomicBool,
}

/// The line that is being received.
#[derive(Debug, Default)]
pub(crate) struct Line(Vec<u8>);

impl PanicWatch {
    /// Whether a panic's first line has been seen since this was last asked.
    pub(crate) fn take(&self) -> bool {
        self.seen.swap(false, Ordering::AcqRel)
    }

    fn seen(&self) -> bool {
        self.seen.load(Ordering::Acquire)
    }

    /// Looks at console output; `true` once the panic's last line has come, after which the guest does nothing more.
    pub(crate) fn scan(&self, line: &mut Line, output: &[u8]) -> bool {
        let mut ended = false;
        for &byte in output {
            if byte == b'\n' {
                let text = strip_prefix(&line.0);
                if text.starts_with(BEGIN) {
                    self.seen.store(true, Ordering::Release);
                }
                ended |= self.seen() && text.starts_with(END);
                line.0.clear();
            } else if line.0.len() < MAX_LINE {
                line.0.push(byte);
            }
        }
        ended
    }
}

/// Without the time stamp (`[   12.345678] `, with or without a CPU or thread: `[   12.345678][    T1] `).
fn strip_prefix(line: &[u8]) -> &[u8] {
    let mut rest = line;
    while let [b'[', tail @ ..] = rest
        && let Some(end) = tail.iter().position(|b| *b == b']')
    {
        rest = &tail[end + 1..];
    }
    rest.trim_ascii_start()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(pieces: &[&str]) -> (bool, bool) {
        let (watch, mut line) = (PanicWatch::default(), Line::default());
        let ended = pieces.iter().any(|piece| watch.scan(&mut line, piece.as_bytes()));
        (watch.take(), ended)
    }

    #[test]
    fn a_panic_is_seen_in_whatever_pieces_it_comes() {
        let text = "[    1.2] VFS: hm\r\n[    1.234567] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n";
        assert_eq!(watch(&[text]), (true, false));
        let pieces: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(watch(&pieces.iter().map(String::as_str).collect::<Vec<_>>()), (true, false));
        assert_eq!(watch(&["[ 1.0][    T1] Kernel panic - not syncing: sysrq\n"]), (true, false));
    }

    #[test]
    fn the_last_line_ends_it() {
        let end =
            "[ 2.0] Kernel panic - not syncing: x\n[ 2.1] ---[ end Kernel panic - not syncing: x ]---\n";
        assert_eq!(watch(&[end]), (true, true));
    }

    #[test]
    fn other_mentions_do_not_count() {
        assert_eq!(watch(&["echo 'Kernel panic - not syncing'\n", "Kernel panic\n"]), (false, false));
        let long = "x".repeat(100_000) + "Kernel panic - not syncing\n";
        assert_eq!(watch(&[&long]), (false, false));
    }
}
