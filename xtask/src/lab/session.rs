//! The emulated host: a QEMU process, its command channel, its console.

use super::images::HostImages;
use super::monitor::{self, Monitor};
use super::{devices, devicetree};
use crate::paths::Paths;
use crate::process;
use anyhow::{Context, Result, bail};
use lab_cases::protocol::{Command as ToHost, Event, OUT_TAG, PORT, SHARE_TAG};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Most time until the emulated host takes commands: 7 s on an idle machine.
const START_LIMIT: Duration = Duration::from_secs(180);
const MACHINE: &str = "virt,gic-version=3,virtualization=on,iommu=smmuv3";
/// Memory of the emulated host in MiB: a guest of 2 GiB, disk images in memory, and room; half of a machine with 8 GB.
const MEMORY_MIB: u32 = 4096;

/// The emulated host. Dropping it ends it.
pub struct Session {
    child: Child,
    commands: ChildStdin,
    /// Connected when it is first used.
    monitor: Option<Monitor>,
    lab: PathBuf,
    events: Receiver<Event>,
    console: PathBuf,
    /// Release of its kernel.
    pub kernel: String,
}

impl Session {
    /// Starts it and waits until it takes commands.
    pub fn start(paths: &Paths, images: &HostImages) -> Result<Self> {
        let console = paths.logs().join(format!("host-{}-console.log", images.name));
        let mut command = emulator(paths, images, &console)?;
        let errors = File::create(console.with_extension("emulator.log"))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().context("cannot start qemu-system-aarch64")?;
        let commands = child.stdin.take().expect("stdin is piped");
        let stdout = child.stdout.take().expect("stdout is piped");
        let (sender, events) = channel();
        thread::Builder::new().name("events".into()).spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(event) => {
                        if sender.send(event).is_err() {
                            return;
                        }
                    }
                    Err(error) => eprintln!("not an event of the emulated host ({error}): {line}"),
                }
            }
        })?;
        let mut session = Self {
            child,
            commands,
            monitor: None,
            lab: paths.lab.clone(),
            events,
            console,
            kernel: String::new(),
        };
        match session.next(START_LIMIT).context("the emulated host does not come up")? {
            Event::Ready { kernel, kvm: true } => session.kernel = kernel,
            Event::Ready { kvm: false, .. } => bail!("the emulated host has no /dev/kvm"),
            other => bail!("the emulated host began with {other:?}"),
        }
        Ok(session)
    }

    /// Sends a command.
    pub fn send(&mut self, command: &ToHost) -> Result<()> {
        let mut line = serde_json::to_string(command)?;
        line.push('\n');
        self.commands.write_all(line.as_bytes()).context("the emulated host is gone")?;
        self.commands.flush().context("the emulated host is gone")
    }

    /// Has the emulator's monitor do what `line` says; what it said.
    pub fn monitor(&mut self, line: &str) -> Result<String> {
        let monitor = match &mut self.monitor {
            Some(monitor) => monitor,
            empty => empty.insert(Monitor::connect(&self.lab)?),
        };
        monitor.command(line)
    }

    /// The next event.
    pub fn next(&mut self, limit: Duration) -> Result<Event> {
        match self.events.recv_timeout(limit) {
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) => {
                bail!("no answer in {} s\n{}", limit.as_secs(), self.console_tail())
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the emulated host ended by itself\n{}", self.console_tail())
            }
        }
    }

    /// The next event, if one comes within `limit`. `None` if not.
    pub fn poll(&mut self, limit: Duration) -> Result<Option<Event>> {
        match self.events.recv_timeout(limit) {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the emulated host ended by itself\n{}", self.console_tail())
            }
        }
    }

    /// Switches it off and waits for its end.
    pub fn power_off(mut self) -> Result<()> {
        self.send(&ToHost::PowerOff)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("the emulated host does not switch off\n{}", self.console_tail())
    }

    /// The end of the emulated host's console and of the emulator's own messages.
    pub fn console_tail(&self) -> String {
        let read = |path: &PathBuf| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        let emulator = read(&self.console.with_extension("emulator.log"));
        let mut text =
            format!("--- end of the emulated host's console\n{}", process::tail(&read(&self.console), 20));
        if !emulator.is_empty() {
            text.push_str(&format!("\n--- the emulator said\n{}", process::tail(&emulator, 10)));
        }
        text
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It has usually ended; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The emulator with all that its device tree depends on, but for the machine itself.
fn board() -> Command {
    let mut command = Command::new("qemu-system-aarch64");
    // pmu=off: in Debian's 6.12, KVM's use of the emulated counters ended in a kernel oops (perf_ctx_sched_task_cb).
    // pauth-impdef: with the architected algorithm, pointer authentication makes emulation several times slower.
    command.args(["-cpu", "max,pauth-impdef=on,pmu=off"]);
    command.args(["-accel", "tcg,thread=multi,tb-size=512", "-smp", "2", "-m"]).arg(MEMORY_MIB.to_string());
    command.args(["-nodefaults", "-display", "none"]);
    command
}

fn emulator(paths: &Paths, images: &HostImages, console: &Path) -> Result<Command> {
    let share = |folder: PathBuf, tag: &str, more: &str| -> Result<String> {
        let path =
            folder.to_str().context("the clone's path is not valid UTF-8; move it")?.replace(',', ",,");
        Ok(format!("local,path={path},mount_tag={tag},security_model=none{more}"))
    };
    let dtb = devicetree::prepare(paths, board(), MACHINE)?;
    let mut command = board();
    command.args(["-M", MACHINE]).arg("-dtb").arg(dtb);
    command.arg("-no-reboot");
    command.arg("-serial").arg(format!("file:{}", console.display()));
    command.args(["-chardev", "stdio,id=lab,signal=off", "-device", "virtio-serial-pci"]);
    command.arg("-device").arg(format!("virtserialport,chardev=lab,name={PORT}"));
    command.arg("-virtfs").arg(share(paths.share(), SHARE_TAG, ",readonly=on")?);
    command.arg("-virtfs").arg(share(paths.out(), OUT_TAG, "")?);
    devices::add(paths, &mut command)?;
    monitor::add(&paths.lab, &mut command)?;
    command.arg("-kernel").arg(&images.kernel).arg("-initrd").arg(&images.initrd);
    command.args(["-append", "console=ttyAMA0 panic=-1 quiet lab.role=host"]);
    Ok(command)
}
