//! A guest that runs: its process, its console, what its guest half says.

use super::{Console, Dma, GuestSpec, limits, send, stuck};
use crate::protocol::{Event, GuestLine, parse_guest_line};
use anyhow::{Context, Result, anyhow, bail};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Most time from the start of a process to the guest's init. On two emulated CPUs that are shared with a compiler
/// this can be several times the usual 8 s.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Most bytes of a console line: what comes after is a new line. A guest can print without ever ending a line.
const LINE_LIMIT: usize = 64 * 1024;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// Both ends of a terminal. As long as the slave is open here too, its settings outlive the monitor.
struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
    before: Termios,
}

impl Terminal {
    fn open() -> Result<Self> {
        let OpenptyResult { master, slave } = openpty(None, None).context("cannot open a terminal")?;
        let before = tcgetattr(&slave)?;
        // Copies, because those are closed in the processes that are started.
        Ok(Self { master: master.try_clone()?, slave: slave.try_clone()?, before })
    }

    fn slave(&self) -> Result<Stdio> {
        Ok(self.slave.try_clone()?.into())
    }
}

struct Line {
    at: Instant,
    text: String,
}

/// A guest that runs. Dropping it kills the process.
pub struct RunningVm {
    child: Child,
    input: Box<dyn Write + Send>,
    lines: Receiver<Line>,
    started: Instant,
    seen: Vec<GuestLine>,
    tail: Vec<String>,
    stderr: std::path::PathBuf,
    terminal: Option<Terminal>,
    /// The process says at its end what became of mappings that the guest asked for.
    asks: bool,
}

impl RunningVm {
    pub(super) fn start(spec: &GuestSpec, logs: &Path, stem: &str, stream: bool) -> Result<Self> {
        std::fs::create_dir_all(logs)?;
        let stderr = logs.join(format!("{stem}.vmm.log"));
        let transcript = File::create(logs.join(format!("{stem}.console.log")))?;
        let mut command = spec.command();
        // Also for a guest that gets its devices later.
        if !spec.devices.is_empty() || spec.dma != Dma::Identity {
            limits::set_entries(spec.dma)?;
        }
        writeln!(File::create(&stderr)?, "$ {command:?}")?;
        let errors = File::options().append(true).open(&stderr)?;
        let terminal = (spec.console == Console::Terminal).then(Terminal::open).transpose()?;
        match &terminal {
            Some(terminal) => command.stdin(terminal.slave()?).stdout(terminal.slave()?),
            None => command.stdin(Stdio::piped()).stdout(Stdio::piped()),
        };
        command.stderr(errors);
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
        let (output, input): (Box<dyn Read + Send>, Box<dyn Write + Send>) = match &spec.console {
            Console::Stdio => (
                Box::new(child.stdout.take().expect("stdout is piped")),
                Box::new(child.stdin.take().expect("stdin is piped")),
            ),
            Console::Terminal => {
                let master = &terminal.as_ref().expect("it was opened above").master;
                (Box::new(File::from(master.try_clone()?)), Box::new(File::from(master.try_clone()?)))
            }
            Console::Socket(path) => {
                let socket = connect(path, &mut child)?;
                (Box::new(socket.try_clone()?), Box::new(socket))
            }
        };
        let (sender, lines) = channel();
        thread::Builder::new().name("console".into()).spawn(move || {
            read_console(output, transcript, stream, |line| sender.send(line).is_ok());
        })?;
        Ok(Self {
            child,
            input,
            lines,
            started,
            seen: Vec::new(),
            tail: Vec::new(),
            stderr,
            terminal,
            asks: spec.dma != Dma::Identity,
        })
    }

    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The settings of the monitor's terminal: before it was started, and now.
    pub fn terminal(&self) -> Result<(Termios, Termios)> {
        let terminal = self.terminal.as_ref().context("the monitor has no terminal")?;
        Ok((terminal.before.clone(), tcgetattr(&terminal.slave)?))
    }

    /// Just before the process was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Writes to the guest's console.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        self.input.write_all(text.as_bytes())?;
        self.input.flush().context("cannot write to the guest's console")
    }

    /// Sends a signal to the monitor.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).expect("a pid fits");
        kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot send {signal}"))
    }

    /// Waits for the first line of the guest's init. Returns the time from the start of the process to that line, and
    /// the guest's own idea of its uptime.
    pub fn init(&mut self) -> Result<(Duration, Duration)> {
        if let Some(index) = self.seen.iter().position(|line| matches!(line, GuestLine::Init { .. })) {
            self.seen.remove(index);
            bail!("the guest's init ran before the host half waited for it");
        }
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let (at, line) = self.next_guest_line(deadline, "the first line of the guest's init")?;
            if let GuestLine::Init { uptime_ms } = line {
                return Ok((at - self.started, Duration::from_millis(uptime_ms)));
            }
            self.seen.push(line);
        }
    }

    /// Waits for the note `key` of the guest half.
    pub fn note(&mut self, key: &str, limit: Duration) -> Result<serde_json::Value> {
        let wanted = |line: &GuestLine| matches!(line, GuestLine::Note(k, _) if k == key);
        if let Some(index) = self.seen.iter().position(wanted)
            && let GuestLine::Note(_, value) = self.seen.remove(index)
        {
            return Ok(value);
        }
        let deadline = Instant::now() + limit;
        loop {
            match self.next_guest_line(deadline, &format!("the guest's note '{key}'"))?.1 {
                GuestLine::Note(k, value) if k == key => return Ok(value),
                GuestLine::Done(None) => bail!("the guest half ended without its note '{key}'"),
                other => self.seen.push(other),
            }
        }
    }

    /// All notes `key` that have come so far, without waiting.
    pub fn notes_so_far(&mut self, key: &str) -> Vec<serde_json::Value> {
        while let Ok(line) = self.lines.try_recv() {
            self.keep_tail(&line.text);
            self.seen.extend(parse_guest_line(&line.text));
        }
        let is = |line: &GuestLine| matches!(line, GuestLine::Note(k, _) if k == key);
        let (found, rest) = std::mem::take(&mut self.seen).into_iter().partition(is);
        self.seen = rest;
        let value = |line| if let GuestLine::Note(_, value) = line { Some(value) } else { None };
        Vec::into_iter(found).filter_map(value).collect()
    }

    /// Takes in what the console still held when the process ended.
    pub fn drain(&mut self) {
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(5)) {
            self.keep_tail(&line.text);
            self.seen.extend(parse_guest_line(&line.text));
        }
    }

    /// Waits for a console line that contains `text`, from the kernel or anyone.
    pub fn console_line(&mut self, text: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let line = self.next_line(deadline, &format!("the console line '{text}'"))?.text;
            if line.contains(text) {
                return Ok(line);
            }
        }
    }

    /// Waits until the guest half is over and the process has ended with status 0.
    pub fn finish(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut over = false;
        for line in &self.seen {
            match line {
                GuestLine::Done(None) => over = true,
                GuestLine::Done(Some(error)) => bail!("in the guest: {error}"),
                GuestLine::Init { .. } | GuestLine::Note(..) => {}
            }
        }
        while !over {
            match self.next_guest_line(deadline, "the end of the guest half")?.1 {
                GuestLine::Done(_) => over = true,
                other => self.seen.push(other),
            }
        }
        match self.exit(deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(10)))? {
            ExitKind::Code(0) => self.check_dma(),
            other => {
                bail!("after the guest switched itself off, the monitor ended with {other:?}, not status 0")
            }
        }
    }

    /// Fails if the monitor did what would have panicked a Mac.
    pub fn check_mac(&self) -> Result<()> {
        match self.stderr().lines().find(|line| line.contains("would have panicked a Mac (number")) {
            Some(line) => bail!("the monitor made a mistake: {line}"),
            None => Ok(()),
        }
    }

    /// What the process that has ended says of the mappings that its guest asked for: none is left, and no mistake was made that would have
    /// panicked a Mac.
    pub fn check_dma(&self) -> Result<()> {
        self.check_mac()?;
        let said = self.stderr();
        let lines: Vec<&str> = said.lines().filter(|line| line.contains("DMA of ")).collect();
        if self.asks && lines.is_empty() {
            bail!("the monitor does not say what became of the mappings: {said}");
        }
        match lines.iter().find(|line| !line.contains(" 0 left, 0 mistakes ")) {
            None => Ok(()),
            Some(line) => bail!("{line}"),
        }
    }

    /// How the process ended, if it has.
    pub fn try_exit(&mut self) -> Result<Option<ExitKind>> {
        while let Ok(line) = self.lines.try_recv() {
            self.keep_tail(&line.text);
            self.seen.extend(parse_guest_line(&line.text));
        }
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        let kind = status.code().map(ExitKind::Code);
        Ok(Some(kind.unwrap_or_else(|| ExitKind::Signal(status.signal().unwrap_or(0)))))
    }

    /// Waits for the end of the process.
    pub fn exit(&mut self, limit: Duration) -> Result<ExitKind> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(kind) = self.try_exit()? {
                return Ok(kind);
            }
            if Instant::now() >= deadline {
                bail!("the monitor still runs after {limit:?}; {}", self.ends());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the process as a crash would, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// What the monitor said on standard error.
    pub fn stderr(&self) -> String {
        let text = std::fs::read(&self.stderr).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().skip(1).collect::<Vec<_>>().join("\n")
    }

    fn next_guest_line(&mut self, deadline: Instant, what: &str) -> Result<(Instant, GuestLine)> {
        loop {
            let line = self.next_line(deadline, what)?;
            match parse_guest_line(&line.text) {
                Some(GuestLine::Done(Some(error))) => bail!("in the guest: {error}"),
                Some(parsed) => return Ok((line.at, parsed)),
                None => {}
            }
        }
    }

    fn next_line(&mut self, deadline: Instant, what: &str) -> Result<Line> {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                self.keep_tail(&line.text);
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => Err(anyhow!("no sign of {what} in time; {}", self.ends())),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.exit(Duration::from_secs(5));
                Err(anyhow!("the guest's console closed before {what} ({status:?}); {}", self.ends()))
            }
        }
    }

    fn keep_tail(&mut self, line: &str) {
        const KEEP: usize = 12;
        if self.tail.len() == KEEP {
            self.tail.remove(0);
        }
        self.tail.push(line.trim_end().to_owned());
    }

    /// For an error message. Also keeps what the host's kernel knows, beside the other logs.
    fn ends(&self) -> String {
        stuck::describe(self.pid(), &self.stderr.with_extension("").with_extension("stuck.log"));
        let said = self.stderr();
        let said = if said.is_empty() { "nothing" } else { &said };
        format!("end of its console: {:?}; the monitor said: {said}", self.tail)
    }
}

impl Drop for RunningVm {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(path: &Path, child: &mut Child) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < deadline && child.try_wait()?.is_none() => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => {
                return Err(error).with_context(|| format!("no console at {}", path.display()));
            }
        }
    }
}

fn read_console(
    mut output: impl Read,
    mut transcript: File,
    stream: bool,
    mut deliver: impl FnMut(Line) -> bool,
) {
    let mut pending = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let count = match output.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        let at = Instant::now();
        // The transcript is for people; a full disk must not stop the case.
        let _ = transcript.write_all(&chunk[..count]);
        if stream {
            send(&Event::Console(String::from_utf8_lossy(&chunk[..count]).into_owned()));
        }
        pending.extend_from_slice(&chunk[..count]);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if !deliver(Line { at, text: String::from_utf8_lossy(&line).into_owned() }) {
                return;
            }
        }
        if pending.len() > LINE_LIMIT {
            let text = String::from_utf8_lossy(&std::mem::take(&mut pending)).into_owned();
            if !deliver(Line { at, text }) {
                return;
            }
        }
    }
    if !pending.is_empty() {
        deliver(Line { at: Instant::now(), text: String::from_utf8_lossy(&pending).into_owned() });
    }
}
