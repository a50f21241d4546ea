//! What the person who waits sees: the step that runs, for how long, and what it said last. On a terminal that is one moving line; elsewhere a
//! line in every 20 seconds in which nothing else was printed.

use indicatif::{ProgressBar, ProgressStyle};
use std::fs;
use std::io::{IsTerminal, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, Once};
use std::thread;
use std::time::{Duration, Instant};

/// Longest silence without a terminal.
const SILENCE: Duration = Duration::from_secs(20);
/// How often the line is brought up to date.
const TICK: Duration = Duration::from_millis(500);
/// Bytes at the end of a log in which its last line is looked for.
const LOG_END: u64 = 4096;
/// Most characters of that line.
const MOST_SAID: usize = 100;

/// The step that runs.
struct Step {
    name: String,
    start: Instant,
    /// When something was printed last.
    spoke: Instant,
    /// Where the program that works for this step writes.
    log: Option<PathBuf>,
    bar: Option<ProgressBar>,
    /// Somebody else has the terminal.
    hidden: bool,
}

static STEP: Mutex<Option<Step>> = Mutex::new(None);
static TICKER: Once = Once::new();

/// A step begins; one that still runs is over without a word.
pub fn begin(name: &str) {
    start(name, std::io::stdout().is_terminal() && std::io::stderr().is_terminal());
}

/// A step begins whose programs print themselves, so that there is no moving line.
pub fn begin_beside_output(name: &str) {
    start(name, false);
}

fn start(name: &str, moving: bool) {
    end();
    let now = Instant::now();
    let bar = moving.then(new_bar);
    *step() = Some(Step { name: name.to_owned(), start: now, spoke: now, log: None, bar, hidden: false });
    TICKER.call_once(|| {
        // Without this thread nothing is shown while a step runs; the step itself does not need it.
        let _ = thread::Builder::new().name("progress".into()).spawn(|| {
            loop {
                tick();
                thread::sleep(TICK);
            }
        });
    });
}

/// The step is over: its name and how long it took.
pub fn end() -> Option<(String, Duration)> {
    let step = step().take()?;
    if let Some(bar) = step.bar {
        bar.finish_and_clear();
    }
    Some((step.name, step.start.elapsed()))
}

/// Prints a line.
pub fn say(text: &str) {
    let mut step = step();
    match &mut *step {
        Some(Step { bar: Some(bar), .. }) => bar.suspend(|| println!("{text}")),
        Some(step) => {
            println!("{text}");
            step.spoke = Instant::now();
        }
        None => println!("{text}"),
    }
}

/// Gives the terminal to `work`, which may ask the user something there.
pub fn hide<T>(work: impl FnOnce() -> T) -> T {
    let moving = match &mut *step() {
        Some(step) => {
            step.hidden = true;
            let bar = step.bar.take();
            if let Some(bar) = &bar {
                bar.finish_and_clear();
            }
            bar.is_some()
        }
        None => false,
    };
    let result = work();
    if let Some(step) = &mut *step() {
        step.hidden = false;
        step.spoke = Instant::now();
        step.bar = moving.then(new_bar);
    }
    result
}

/// Runs `work`, whose program writes to `log`: the log's last line is shown meanwhile.
pub fn follow<T>(log: &Path, work: impl FnOnce() -> T) -> T {
    let set = |log: Option<PathBuf>| {
        if let Some(step) = &mut *step() {
            step.log = log;
        }
    };
    set(Some(log.to_owned()));
    let result = work();
    set(None);
    result
}

fn step() -> MutexGuard<'static, Option<Step>> {
    STEP.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("  {spinner} {wide_msg}").expect("a valid template"));
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn tick() {
    let mut step = step();
    let Some(step) = &mut *step else { return };
    if step.hidden {
        return;
    }
    let text =
        describe(&step.name, step.start.elapsed(), &step.log.as_deref().map(last_line).unwrap_or_default());
    if let Some(bar) = &step.bar {
        bar.set_message(text);
    } else if is_due(step.spoke.elapsed()) {
        println!("    {text}");
        step.spoke = Instant::now();
    }
}

fn is_due(silence: Duration) -> bool {
    // The next look is a tick away.
    silence + TICK >= SILENCE
}

/// `NAME, 40 s (what was said last)`
fn describe(name: &str, took: Duration, said: &str) -> String {
    let said = if said.is_empty() { String::new() } else { format!(" ({said})") };
    format!("{name}, {} s{said}", took.as_secs())
}

/// The last line of a file that is not empty, without what moves a terminal's cursor.
fn last_line(log: &Path) -> String {
    let end = || -> std::io::Result<Vec<u8>> {
        let mut file = fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_END)))?;
        let mut bytes = Vec::new();
        file.take(LOG_END).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&end().unwrap_or_default()).into_owned();
    let mut lines = text.split(['\n', '\r']).map(str::trim);
    let last = lines.rfind(|line| !line.is_empty()).unwrap_or_default();
    last.chars().filter(|c| !c.is_control()).take(MOST_SAID).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_half_minute_is_silent() {
        assert!(SILENCE + TICK < Duration::from_secs(30));
        assert!(!is_due(Duration::from_secs(1)));
        assert!(is_due(SILENCE));
        assert_eq!(describe("build", Duration::from_secs(41), ""), "build, 41 s");
        assert_eq!(describe("build", Duration::from_secs(41), "Compiling x"), "build, 41 s (Compiling x)");
    }

    #[test]
    fn the_last_line_is_what_a_terminal_would_show() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        assert_eq!(last_line(&log), "", "a log that is not there yet");
        fs::write(&log, "a\n10%\r20%\x1b[K\r\n\n").expect("written");
        assert_eq!(last_line(&log), "20%[K");
        fs::write(&log, format!("{}\nend", "é".repeat(9000))).expect("written");
        assert_eq!(last_line(&log), "end", "a long line before it may be cut in a character");
    }
}
