//! What the monitor prints goes nowhere: the disk is full, the reader has stopped or is gone. The guest works all the same, and each way to stop it works.

use crate::case::{Case, Group, HOST};
use crate::data::{Aligned, BLOCK};
use crate::guest::disk::GuestDisk;
use crate::guest::{Guest, input};
use crate::host::{ExitKind, Host, Kernel, WORK, describe, outboard_path};
use crate::protocol::Vmm;
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{PipeReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A flood of the console takes half a minute on a quiet machine.
const STEP: Duration = Duration::from_secs(240);
/// Most time until a machine is gone that was stopped hard.
const HARD: Duration = Duration::from_secs(20);
/// Exit statuses of `outboard` (its `--help`).
const POWERED_OFF: ExitKind = ExitKind::Code(0);
const STOPPED_HARD: ExitKind = ExitKind::Code(4);
/// What the guest half writes at the start of its disk when it has done its work.
const WORKED: &[u8] = b"the guest has worked";
/// KiB for a console that nobody reads: more than the UART's queue (64 KiB) and the host's (64 KiB) hold.
const FLOOD_KIB: u64 = 160;
const NAME: &str = "outputs";

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "outputs",
        about: "log and console on a full disk, with a stopped reader, with none: guests work and are stopped by each way",
        limit_s: 900,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    if host.vmm() == Vmm::Qemu {
        return Ok(Some("it is about what Outboard prints".into()));
    }
    host.part("disk-full-power-off", disk_full(host));
    host.part("reader-stopped-power-key", reader_stopped(host));
    host.part("reader-gone-stop-hard", reader_gone(host));
    Ok(None)
}

/// Console and log on a file system without a free byte, standard error closed. The guest switches itself off.
fn disk_full(host: &Host) -> Result<()> {
    let folder = Path::new(WORK).join("full");
    fs::create_dir_all(&folder)?;
    mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
    let result = on_full_disk(host, &folder);
    umount2(&folder, MntFlags::MNT_DETACH)?;
    result
}

fn on_full_disk(host: &Host, folder: &Path) -> Result<()> {
    let mut filler = File::create(folder.join("filler"))?;
    while filler.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    let (console, log) = (folder.join("console"), folder.join("log"));
    let log = log.display().to_string();
    let mut machine =
        Machine::new(host, "off", 16, &format!("file:{}", console.display()), &["--log-file", &log])?;
    machine.close_stderr();
    let mut running = machine.start()?;
    running.wait_for_work()?;
    running.expect_end(POWERED_OFF, STEP)?;
    for name in ["console", "log"] {
        let len = fs::metadata(folder.join(name)).with_context(|| name.to_owned())?.len();
        ensure!(len == 0, "{name} has {len} bytes on a disk that was full");
    }
    Ok(())
}

/// Console and log on one pipe that is full and that nobody reads. SIGTERM presses the power key.
fn reader_stopped(host: &Host) -> Result<()> {
    let mut machine = Machine::new(host, "key", FLOOD_KIB, "stdio", &["--name", NAME])?;
    let (_reader, writer) = full_pipe()?;
    machine.command.stdout(writer.try_clone()?).stderr(writer);
    let mut running = machine.start()?;
    running.wait_for_work()?;
    let output = Command::new(outboard_path()).args(["status", NAME, "--json"]).output()?;
    ensure!(output.status.success(), "outboard status: {}", describe(&output));
    let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(status["state"] == "running", "the status is {status}");
    running.signal(Signal::SIGTERM)?;
    running.expect_end(POWERED_OFF, STEP)
}

/// The log's reader is gone, the console's has stopped. The guest does not react to its power key; a second SIGTERM stops it.
fn reader_gone(host: &Host) -> Result<()> {
    let mut machine = Machine::new(host, "never", 16, "stdio", &[])?;
    let (_reader, writer) = full_pipe()?;
    let (gone, log) = std::io::pipe()?;
    drop(gone);
    machine.command.stdout(writer).stderr(log);
    let mut running = machine.start()?;
    running.wait_for_work()?;
    running.signal(Signal::SIGTERM)?;
    sleep(Duration::from_secs(1));
    ensure!(
        running.child.try_wait()?.is_none(),
        "one SIGTERM ended a guest that had not switched itself off"
    );
    running.signal(Signal::SIGTERM)?;
    running.expect_end(STOPPED_HARD, HARD)
}

/// A pipe that takes no byte more. Who writes to it waits, as for a reader that was stopped.
fn full_pipe() -> Result<(PipeReader, OwnedFd)> {
    let (reader, writer) = std::io::pipe()?;
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    while (&writer).write(&[b'x'; 4096]).is_ok() {}
    while (&writer).write(b"x").is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok((reader, writer.into()))
}

/// A monitor to be, with outputs of its own.
struct Machine {
    command: Command,
    image: std::path::PathBuf,
}

impl Machine {
    fn new(host: &Host, end: &str, flood_kib: u64, console: &str, extra: &[&str]) -> Result<Self> {
        let image = host.raw_image(&format!("{end}.raw"), 1)?;
        let spec = host
            .guest(Kernel::V6_12)
            .disk(crate::host::Disk::raw(&image))
            .arg("end", end)
            .arg("flood", flood_kib)
            .extra(&["--log-level", "debug"])
            .extra(extra);
        let usual = spec.command();
        let mut command = Command::new(usual.get_program());
        command.args(usual.get_args().map(|word| if word == "stdio" { console.as_ref() } else { word }));
        command.stdin(Stdio::null());
        Ok(Self { command, image })
    }

    /// Starts it by a shell that closes its standard error.
    fn close_stderr(&mut self) {
        let mut shell = Command::new("/bin/busybox");
        shell.args(["sh", "-c", "exec \"$0\" \"$@\" 2>&-"]).arg(self.command.get_program());
        shell.args(self.command.get_args()).stdin(Stdio::null()).stdout(Stdio::null());
        self.command = shell;
    }

    fn start(mut self) -> Result<Running> {
        let child = self.command.spawn().context("cannot start the monitor")?;
        // Only the monitor has the ends of pipes from here on.
        Ok(Running { child, image: self.image })
    }
}

/// A monitor that runs. Dropping it kills it.
struct Running {
    child: Child,
    image: std::path::PathBuf,
}

impl Running {
    /// The guest's own word would come by its console; its disk is another way.
    fn wait_for_work(&mut self) -> Result<()> {
        let (deadline, mut start) = (Instant::now() + STEP, vec![0; WORKED.len()]);
        loop {
            // Before the look at the disk, which then has all that the guest wrote.
            let ended = self.child.try_wait()?;
            File::open(&self.image)?.read_exact_at(&mut start, 0)?;
            if start == WORKED {
                return Ok(());
            }
            if let Some(status) = ended {
                bail!("the guest has not done its work, and the monitor has ended: {status}");
            }
            ensure!(Instant::now() < deadline, "the guest has not done its work");
            sleep(Duration::from_millis(50));
        }
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    fn expect_end(&mut self, wanted: ExitKind, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None => ensure!(Instant::now() < deadline, "the monitor has not ended after {limit:?}"),
            }
            sleep(Duration::from_millis(20));
        };
        let exit = match status.signal() {
            Some(signal) => ExitKind::Signal(signal),
            None => ExitKind::Code(status.code().unwrap_or_default()),
        };
        ensure!(exit == wanted, "{exit:?} instead of {wanted:?}");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn guest(guest: &mut Guest) -> Result<()> {
    let end = guest.arg("end")?.to_owned();
    let disk = GuestDisk::open(guest, "vda", true)?;
    guest.need("gpio_keys")?;
    guest.need("evdev")?;
    let keys = input::find("gpio-keys")?;
    // By the kernel, which waits for its console with interrupts off: whatever reads it, it must take this.
    // The kernel takes the word with a newline only (kernel/printk/printk.c, devkmsg_sysctl_set_loglvl).
    fs::write("/proc/sys/kernel/printk_devkmsg", "on\n").context("printk_devkmsg")?;
    let mut messages = File::options().write(true).open("/dev/kmsg")?;
    let line = format!("<1>{}\n", "x".repeat(500));
    for _ in 0..2 * guest.number("flood")? {
        messages.write_all(line.as_bytes())?;
    }
    let mut block = Aligned::new(BLOCK);
    block.get_mut()[..WORKED.len()].copy_from_slice(WORKED);
    disk.write_block(0, &block)?;
    disk.flush()?;
    match end.as_str() {
        "off" => Ok(()),
        "key" => input::wait_for_key(&keys, input::KEY_POWER),
        _ => {
            sleep(Duration::from_secs(300));
            bail!("nobody stopped this guest")
        }
    }
}
