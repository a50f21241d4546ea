//! The emulated host's init: takes commands from `xtask` and runs each case in a process of its own, so that a case
//! that crashes or hangs takes nothing else with it.

use crate::mounts;
use anyhow::{Context, Result, bail};
use lab_cases::guest::{busybox, load_module, wait_for};
use lab_cases::host::{DEBUGFS, Host, MODULES, OUT, SHARE, WORK, millis, send};
use lab_cases::protocol::{Command, Event, OUT_TAG, Outcome, PORT, SHARE_TAG, Vmm};
use nix::mount::MsFlags;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// What the supervisor hears.
enum Input {
    Command(Command),
    /// `xtask` is gone, whatever ended it: nobody needs this machine any more.
    PortClosed,
    Event(String),
    CaseClosed,
}

/// The emulated host's init. Ends by switching off.
pub fn init() -> Result<()> {
    if let Err(error) = serve() {
        // The console is in xtask's log; nobody else can be told.
        println!("lab-agent: {error:#}");
    }
    mounts::power_off()
}

fn serve() -> Result<()> {
    set_up()?;
    let port = wait_for("virtio-serial port", Duration::from_secs(10), find_port)?;
    let port = OpenOptions::new().read(true).write(true).open(&port).context("cannot open the port")?;
    let mut events = port.try_clone()?;
    let (sender, inputs) = channel();
    let commands = sender.clone();
    thread::spawn(move || read_commands(port, &commands));
    // A program that is ended by a fault leaves its registers in the kernel's log. Not every kernel has it.
    let _ = fs::write("/proc/sys/debug/exception-trace", "1");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    let kvm = Path::new("/dev/kvm").exists();
    write_event(&mut events, &Event::Ready { kernel, kvm })?;
    loop {
        match inputs.recv()? {
            Input::Command(Command::Run { case, vmm, limit_s }) => {
                let limit = Duration::from_secs(limit_s);
                let start = Instant::now();
                if let Some(outcome) = supervise(&case, vmm, limit, &sender, &inputs, &mut events)? {
                    write_event(&mut events, &Event::Done { case, outcome, ms: millis(start) })?;
                }
            }
            Input::Command(Command::PowerOff) | Input::PortClosed => return Ok(()),
            // Left over from a case that is over.
            Input::Command(Command::Input(_) | Command::Monitored(_) | Command::Abort)
            | Input::Event(_)
            | Input::CaseClosed => {}
        }
    }
}

fn set_up() -> Result<()> {
    for module in MODULES {
        // What this kernel has built in is in no list.
        load_module(module)?;
    }
    // Large requests: each costs an exit of the emulated machine. The read-only share never changes under us.
    let nine = "trans=virtio,version=9p2000.L,msize=1048576";
    mounts::attach(SHARE_TAG, "9p", SHARE, MsFlags::MS_RDONLY, &format!("{nine},cache=loose"))?;
    mounts::attach(OUT_TAG, "9p", OUT, MsFlags::empty(), nine)?;
    mounts::attach("devpts", "devpts", "/dev/pts", MsFlags::empty(), "ptmxmode=0666")?;
    mounts::attach("debugfs", "debugfs", DEBUGFS, MsFlags::empty(), "")?;
    busybox(&["ip", "link", "set", "lo", "up"])?;
    fs::write("/etc/resolv.conf", "nameserver 127.0.0.1\n").context("cannot name the DNS server")
}

fn find_port() -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT {
            return Some(Path::new("/dev").join(entry.file_name()));
        }
    }
    None
}

fn read_commands(port: File, sender: &Sender<Input>) {
    for line in BufReader::new(port).lines().map_while(Result::ok) {
        match serde_json::from_str(&line) {
            Ok(command) => {
                if sender.send(Input::Command(command)).is_err() {
                    return;
                }
            }
            Err(error) => println!("lab-agent: not a command ({error}): {line}"),
        }
    }
    let _ = sender.send(Input::PortClosed);
}

/// Runs a case's process. `None` if the process has said itself how it ended.
fn supervise(
    case: &str,
    vmm: Vmm,
    limit: Duration,
    sender: &Sender<Input>,
    inputs: &Receiver<Input>,
    events: &mut File,
) -> Result<Option<Outcome>> {
    let mut child = spawn_case(case, vmm)?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let stdout = child.stdout.take().expect("stdout is piped");
    let lines = sender.clone();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if lines.send(Input::Event(line)).is_err() {
                return;
            }
        }
        let _ = lines.send(Input::CaseClosed);
    });
    let deadline = Instant::now() + limit;
    let mut done = None;
    let forced = loop {
        match inputs.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            // Said only once all is cleaned up: the next command may follow at once.
            Ok(Input::Event(line)) if line.starts_with("{\"done\"") => done = Some(line),
            Ok(Input::Event(line)) => writeln!(events, "{line}").context("cannot write to the port")?,
            Ok(Input::CaseClosed) => break None,
            Ok(Input::Command(Command::Abort)) => break Some("stopped on request".to_owned()),
            Ok(Input::Command(command @ (Command::Input(_) | Command::Monitored(_)))) => {
                forward(&mut stdin, &command)
            }
            Ok(Input::Command(command)) => println!("lab-agent: a case runs, ignored: {command:?}"),
            Err(RecvTimeoutError::Timeout) => break Some(format!("not over after {} s", limit.as_secs())),
            Ok(Input::PortClosed) | Err(RecvTimeoutError::Disconnected) => bail!("the port closed"),
        }
    };
    let status = clean_up(child, sender, inputs)?;
    if let Some(line) = done {
        writeln!(events, "{line}").context("cannot write to the port")?;
        return Ok(None);
    }
    let without_result = || format!("the host half ended with {status} without a result");
    Ok(Some(Outcome::Failed(forced.unwrap_or_else(without_result))))
}

fn spawn_case(case: &str, vmm: Vmm) -> Result<Child> {
    fs::create_dir_all(WORK)?;
    let vmm = serde_json::to_value(vmm)?;
    let stderr = File::create(Path::new(OUT).join("logs").join(format!("{case}.host.log")))?;
    std::process::Command::new("/init")
        .args(["case", case, vmm.as_str().unwrap_or_default()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .current_dir(WORK)
        .process_group(0)
        .spawn()
        .context("cannot start the case's process")
}

fn forward(stdin: &mut ChildStdin, command: &Command) {
    let line = serde_json::to_string(command).expect("commands serialize");
    // A case that does not listen has closed its input.
    let _ = writeln!(stdin, "{line}");
}

/// Kills what the case left behind and empties its scratch.
fn clean_up(
    mut child: Child,
    sender: &Sender<Input>,
    inputs: &Receiver<Input>,
) -> Result<std::process::ExitStatus> {
    let group = Pid::from_raw(i32::try_from(child.id())?);
    // No such group if every process of it has ended; that is the usual case.
    let _ = killpg(group, Signal::SIGKILL);
    let status = child.wait()?;
    while let Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) =
        waitpid(None, Some(WaitPidFlag::WNOHANG))
    {}
    // The rest of what the case said means nothing any more, but a command that came meanwhile is the next one.
    let kept: Vec<_> =
        inputs.try_iter().filter(|i| matches!(i, Input::Command(_) | Input::PortClosed)).collect();
    kept.into_iter().try_for_each(|input| sender.send(input))?;
    fs::remove_dir_all(WORK).context("cannot empty the scratch")?;
    Ok(status)
}

fn write_event(port: &mut File, event: &Event) -> Result<()> {
    let mut line = serde_json::to_string(event)?;
    line.push('\n');
    port.write_all(line.as_bytes()).context("cannot write to the port")
}

/// A case's host half, in its own process: says how it ended on standard output.
pub fn run_case(name: &str, vmm: &str) -> Result<()> {
    let case = lab_cases::find(name).with_context(|| format!("no case is called '{name}'"))?;
    let vmm = serde_json::from_value(vmm.into()).context("no such monitor")?;
    let host = Host::new(case.name, vmm);
    let start = Instant::now();
    let outcome = match (case.host)(&host) {
        Ok(None) => Outcome::Passed,
        Ok(Some(reason)) => Outcome::Skipped(reason),
        Err(error) => Outcome::Failed(format!("{error:#}")),
    };
    send(&Event::Done { case: name.into(), outcome, ms: millis(start) });
    Ok(())
}
