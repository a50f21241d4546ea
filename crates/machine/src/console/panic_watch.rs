//! Signs of a panic of the guest's kernel on its consoles.
//!
//! Text alone is no sign: anybody in the guest may show the log of an old panic on its console. Each way in which a Linux
//! kernel panics (kernel/panic.c) is therefore believed only with a second sign that no program of the guest can print:
//!
//! - The kernel stays where it is (`panic=0`): its last line, and after it CPUs that take no interrupts any more but for
//!   the one that panicked ([`super::super::panic_check`]).
//! - The kernel resets the machine (`panic=-1`, `panic=30`): its first line as a record that the kernel itself sent to the
//!   UART ([`outboard_platform::Output::records`]), with no record of an orderly reboot or power-off behind it.
//! - The guest's module `outboard_dma` says so through its DMA device: nothing else is needed.

use std::sync::{Mutex, MutexGuard};

/// Longest line looked at, in bytes; a kernel's message is shorter, and a guest may send lines without end.
const MAX_LINE: usize = 256;
/// First line of a panic.
const BEGIN: &[u8] = b"Kernel panic - not syncing";
/// Last line of a panic, from a kernel that stays where it is.
const END: &[u8] = b"---[ end Kernel panic - not syncing";
/// First words of the last record of an orderly reboot or power-off (Linux kernel/reboot.c).
const ORDERLY: &[u8] = b"reboot: ";
/// Last record before a crash kernel takes over (Linux arch/arm64/kernel/machine_kexec.c); the crash kernel's own power-off
/// takes nothing back.
const HANDS_OVER: &[u8] = b"Starting crashdump kernel";

/// Collects the signs of one boot.
#[derive(Debug, Default)]
pub(crate) struct PanicWatch {
    signs: Mutex<Signs>,
}

#[derive(Debug, Default)]
struct Signs {
    /// The kernel's records are recognised: then text outside of them means nothing.
    has_records: bool,
    /// A record was a panic's first line, and none behind it was about an orderly end.
    began: bool,
    /// Nothing can take it back any more.
    certain: bool,
    /// A suspicion was reported and not heard yet: a guest that repeats it makes no queue of reports.
    reported: bool,
}

impl Signs {
    /// True if `suspect` is to be reported.
    fn report(&mut self, suspect: bool) -> bool {
        suspect && !std::mem::replace(&mut self.reported, true)
    }
}

/// The line that is being received.
#[derive(Debug, Default)]
pub(crate) struct Line(Vec<u8>);

impl PanicWatch {
    /// True if the guest's kernel has panicked since this was last asked; forgets everything for the next boot.
    pub(crate) fn take(&self) -> bool {
        let signs = std::mem::take(&mut *self.lock());
        signs.began || signs.certain
    }

    /// The guest's kernel has panicked: seen by a sign that only it can give.
    pub(crate) fn confirm(&self) {
        self.lock().certain = true;
    }

    /// True once [`PanicWatch::confirm`] or a crash kernel's start has settled it.
    pub(crate) fn is_certain(&self) -> bool {
        self.lock().certain
    }

    /// The last suspicion has been heard; the next one will be reported too.
    pub(crate) fn heard(&self) {
        self.lock().reported = false;
    }

    /// Looks at console output; true if the guest may have panicked and stays where it is, which its CPUs must confirm.
    /// `line` is what came before without an end. A panic's line may begin behind a program's unfinished one.
    pub(crate) fn scan_text(&self, line: &mut Line, output: &[u8]) -> bool {
        let mut suspect = false;
        for &byte in output {
            if byte == b'\n' {
                suspect |= line.0.windows(END.len()).any(|window| window == END);
                line.0.clear();
            } else if line.0.len() < MAX_LINE {
                line.0.push(byte);
            }
        }
        let mut signs = self.lock();
        let suspect = suspect && !signs.has_records;
        signs.report(suspect)
    }

    /// Looks at records that the kernel printed itself; true as for [`PanicWatch::scan_text`].
    pub(crate) fn scan_records(&self, records: &[Vec<u8>]) -> bool {
        if records.is_empty() {
            return false;
        }
        let mut signs = self.lock();
        signs.has_records = true;
        let mut suspect = false;
        for record in records {
            let text = strip_prefix(record);
            if text.starts_with(BEGIN) {
                signs.began = true;
            } else if text.starts_with(ORDERLY) {
                signs.began = false;
            } else if text.starts_with(HANDS_OVER) {
                signs.certain |= signs.began;
            }
            suspect |= text.starts_with(END);
        }
        signs.report(suspect)
    }

    fn lock(&self) -> MutexGuard<'_, Signs> {
        self.signs.lock().unwrap_or_else(|e| e.into_inner())
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

    const PANIC: &str = "[ 2.0] Kernel panic - not syncing: x\r\n";
    const LAST: &str = "[ 2.1] ---[ end Kernel panic - not syncing: x ]---\r\n";

    /// What the text in these pieces leads to: a suspicion, and a panic at the machine's end.
    fn text(watch: &PanicWatch, pieces: &[&str]) -> (bool, bool) {
        let mut line = Line::default();
        let suspect = pieces.iter().any(|piece| watch.scan_text(&mut line, piece.as_bytes()));
        (suspect, watch.take())
    }

    fn records(watch: &PanicWatch, records: &[&str]) -> bool {
        watch.scan_records(&records.iter().map(|r| r.as_bytes().to_vec()).collect::<Vec<_>>())
    }

    /// Somebody in the guest looks at the log of an old crash on the serial console. The guest is alive: it must not be stopped.
    #[test]
    fn an_old_log_shown_on_the_console_is_no_panic() {
        let old = "root@guest:~# cat old-crash.txt\r\n\
            [  812.000001] Kernel panic - not syncing: Fatal exception\r\n\
            [  812.000002] SMP: stopping secondary CPUs\r\n\
            [  812.000003] ---[ end Kernel panic - not syncing: Fatal exception ]---\r\n\
            root@guest:~# uptime\r\n up 3 days\r\n";
        let watch = PanicWatch::default();
        records(&watch, &["[    0.000000] Booting Linux on physical CPU 0x0\r\n"]);
        assert_eq!(text(&watch, &[old]), (false, false));
        // Where no records are recognised the CPUs are asked; the text alone ends nothing.
        assert_eq!(text(&PanicWatch::default(), &[old]), (true, false));
    }

    #[test]
    fn a_last_line_is_seen_in_whatever_pieces_it_comes_and_behind_whatever_text() {
        let line = format!("guest login: {LAST}");
        assert!(text(&PanicWatch::default(), &[&line]).0);
        let pieces: Vec<String> = line.chars().map(String::from).collect();
        assert!(text(&PanicWatch::default(), &pieces.iter().map(String::as_str).collect::<Vec<_>>()).0);
        let long = "x".repeat(100_000) + LAST;
        assert!(!text(&PanicWatch::default(), &[&long]).0, "a line of bounded length is looked at");
    }

    #[test]
    fn records_of_a_panic_count() {
        let watch = PanicWatch::default();
        assert!(!records(&watch, &["[ 1.9] usb 1-1: Product: Kernel panic - not syncing\r\n"]));
        assert!(!watch.take(), "a device's name within a record");
        assert!(!records(&watch, &[PANIC]));
        assert!(watch.take());
        assert!(!watch.take(), "the next boot begins anew");
        assert!(records(&watch, &["[ 2.0][    T1] Kernel panic - not syncing: x\r\n", LAST]));
        assert!(watch.take());
    }

    #[test]
    fn an_orderly_end_takes_the_suspicion_back() {
        let watch = PanicWatch::default();
        records(&watch, &[PANIC, "[ 9.0] reboot: Restarting system\r\n"]);
        assert!(!watch.take());
        // Unless a crash kernel ran in between.
        records(&watch, &[PANIC, "[ 2.2] Starting crashdump kernel...\r\n", "[ 9.0] reboot: Power down\r\n"]);
        assert!(watch.take());
    }

    #[test]
    fn a_suspicion_is_reported_once_until_it_is_heard() {
        let watch = PanicWatch::default();
        assert!(records(&watch, &[LAST]));
        assert!(!records(&watch, &[LAST]));
        watch.heard();
        assert!(records(&watch, &[LAST]));
    }

    #[test]
    fn the_modules_word_is_enough() {
        let watch = PanicWatch::default();
        watch.confirm();
        records(&watch, &["[ 9.0] reboot: Restarting system\r\n"]);
        assert!(watch.take());
    }
}
