//! What the host half of a case works with.

mod assigned;
mod intruder;
mod limits;
mod placement;
mod ports;
mod serve;
mod spec;
mod stuck;
mod vm;

pub use assigned::{Assigned, AssignedSlot, Dma, SmmuFault, driver_of, outboard, smmu_faults};
pub use intruder::{Answer, Intruder};
pub use placement::OneCpu;
pub use ports::{PLUGGABLE, Port};
pub use serve::{DNS_ANSWER, DNS_NAME, dns_server, web_server};
pub use spec::{Console, Disk, GuestSpec, INITRD_DEVICES, INITRD_DMA, Kernel, OWN_KERNEL};
pub use stuck::DEBUGFS;
pub use vm::{ExitKind, RunningVm};

use crate::guest::{load_module, wait_for};
use crate::protocol::{Command as Order, Event, Outcome, Vmm};
use anyhow::{Context, Result, bail, ensure};
use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

/// Where the read-only share is mounted in the emulated host.
pub const SHARE: &str = "/lab";
/// Where logs and images that go back are put.
pub const OUT: &str = "/out";
/// Memory-backed scratch of the running case; emptied between cases.
pub const WORK: &str = "/run/case";
/// Modules that the emulated host loads at once: the shared folders, and what hands PCI devices to a guest.
pub const MODULES: [&str; 6] =
    ["virtio_pci", "virtio_console", "9p", "9pnet_virtio", "vfio_iommu_type1", "vfio_pci"];
/// Modules that host halves may ask for: the network between host and guest, the host's own drivers of what guests get.
pub const CASE_MODULES: [&str; 3] = ["virtio_net", "nvme", "ahci"];

/// Most time until the emulated host's kernel has found a new device, or let go of one: it waits 5 s after the button was pressed.
const PLUG: Duration = Duration::from_secs(60);

/// The emulated host, as a case sees it.
pub struct Host {
    case: &'static str,
    vmm: Vmm,
    boots: Cell<u32>,
    stream_console: Cell<bool>,
}

impl Host {
    /// For one run of `case`.
    pub fn new(case: &'static str, vmm: Vmm) -> Self {
        Self { case, vmm, boots: Cell::new(0), stream_console: Cell::new(false) }
    }

    /// The case's name.
    pub fn case(&self) -> &'static str {
        self.case
    }

    /// Who runs the guests of this case.
    pub fn vmm(&self) -> Vmm {
        self.vmm
    }

    /// From now on the guests' consoles are also sent to `xtask`.
    pub fn stream_console(&self) {
        self.stream_console.set(true);
    }

    /// Sends an event to `xtask`.
    pub fn send(&self, event: &Event) {
        send(event);
    }

    /// Says something to whoever watches.
    pub fn log(&self, text: impl Into<String>) {
        send(&Event::Log(text.into()));
    }

    /// Ends a phase that began at `start`.
    pub fn phase(&self, name: &str, start: Instant) {
        send(&Event::Phase { name: name.into(), ms: millis(start) });
    }

    /// Adds a fact to the report.
    pub fn fact(&self, key: &str, value: impl Into<serde_json::Value>) {
        send(&Event::Fact(key.into(), value.into()));
    }

    /// Reports a part that is counted by itself.
    pub fn part(&self, name: impl Into<String>, result: Result<()>) {
        let outcome = match result {
            Ok(()) => Outcome::Passed,
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        send(&Event::Part { name: name.into(), outcome });
    }

    /// A guest with this case's guest half, to be described further.
    pub fn guest(&self, kernel: Kernel) -> GuestSpec {
        GuestSpec::new(self.case, self.vmm, kernel)
    }

    /// Starts a guest. Its console and its monitor's messages go to the logs.
    pub fn start(&self, spec: &GuestSpec) -> Result<RunningVm> {
        let boot = self.boots.get() + 1;
        self.boots.set(boot);
        let logs = Path::new(OUT).join("logs");
        let stem = format!("{}-{boot}", self.case);
        RunningVm::start(spec, &logs, &stem, self.stream_console.get())
    }

    /// Writes what this host's kernel knows of process `pid`, which has a VM and does not go on, to the log `CASE-NAME.stuck.log`.
    pub fn describe_stuck(&self, pid: u32, name: &str) {
        let log = Path::new(OUT).join("logs").join(format!("{}-{name}.stuck.log", self.case));
        stuck::describe(pid, &log);
    }

    /// Has the emulator that this host runs in do what `command` says, as a person would type it at its monitor: hardware comes and goes. Returns
    /// what it said, mostly nothing. For cases that read nothing else from their standard input.
    pub fn monitor(&self, command: &str) -> Result<String> {
        send(&Event::Monitor(command.to_owned()));
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).context("cannot read the monitor's answer")?;
        match serde_json::from_str(&line) {
            Ok(Order::Monitored(said)) => Ok(said),
            _ => bail!("the monitor's answer to '{command}' is '{}'", line.trim()),
        }
    }

    /// Plugs an NVMe disk into [`Port::Pluggable`] and waits until this host's kernel has found it.
    pub fn plug_nvme(&self) -> Result<()> {
        if Port::Pluggable.functions().is_ok() {
            // A case that failed has left it.
            return Ok(());
        }
        Port::Pluggable.isolate()?;
        let (.., device) = PLUGGABLE;
        // One that was there is really gone only once this host's kernel has turned the slot off.
        let deadline = Instant::now() + PLUG;
        loop {
            let said = self.monitor(&format!("device_add {device}"))?;
            if said.is_empty() {
                break;
            }
            ensure!(Instant::now() < deadline, "device_add {device}: {said}");
            thread::sleep(Duration::from_millis(200));
        }
        wait_for("the plugged disk", PLUG, || Port::Pluggable.functions().ok()).map(drop)
    }

    /// Asks this host to let go of that disk, as the button beside a slot does, and waits until it is out.
    pub fn unplug_nvme(&self) -> Result<()> {
        let said = self.monitor(&format!("device_del {}", PLUGGABLE.1))?;
        ensure!(said.is_empty(), "device_del: {said}");
        wait_for("the end of the plugged disk", PLUG, || Port::Pluggable.functions().is_err().then_some(()))
    }

    /// Loads a module of [`CASE_MODULES`]; it stays for the cases that follow.
    pub fn need(&self, module: &str) -> Result<()> {
        if !load_module(module)? {
            bail!("the emulated host has no module {module}");
        }
        Ok(())
    }

    /// A path in the case's scratch.
    pub fn scratch(&self, name: &str) -> PathBuf {
        Path::new(WORK).join(name)
    }

    /// A disk image of `mib` MiB of zeros (sparse) in the scratch.
    pub fn raw_image(&self, name: &str, mib: u64) -> Result<PathBuf> {
        let path = self.scratch(name);
        let file = fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        file.set_len(mib << 20)?;
        Ok(path)
    }

    /// Runs the distribution's `qemu-img` with `args` and returns what it printed.
    pub fn qemu_img(&self, args: &[&str]) -> Result<String> {
        let mut command = peer_program("qemu-img");
        command.args(args);
        let output = command.output().context("cannot start qemu-img from the peer's root")?;
        if !output.status.success() {
            bail!("qemu-img {}: {}", args.join(" "), describe(&output));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Has `qemu-img` check a qcow2 image: an error if it is corrupt, otherwise whether clusters leaked (space that nothing
    /// refers to: what a crash between an allocation and its use leaves; no harm to data).
    pub fn check_qcow2(&self, image: &Path) -> Result<bool> {
        let output =
            peer_program("qemu-img").arg("check").arg(image).output().context("cannot start qemu-img")?;
        // qemu-img(1): 0 no error, 2 corruption, 3 only leaks.
        match output.status.code() {
            Some(0) => Ok(false),
            Some(3) => Ok(true),
            _ => bail!("qemu-img check {}: {}", image.display(), describe(&output)),
        }
    }
}

/// The monitor built here, in the share.
pub fn outboard_path() -> PathBuf {
    Path::new(SHARE).join("bin/outboard")
}

/// A program of the peer's root tree, started by that tree's own dynamic loader.
pub fn peer_program(name: &str) -> Command {
    let root = Path::new(SHARE).join("peer");
    let mut command = Command::new(root.join("ld-linux-aarch64.so.1"));
    command.arg("--library-path").arg(root.join("lib")).arg(root.join("bin").join(name));
    command
}

/// Sends an event to `xtask`, by way of the agent that started this process.
pub fn send(event: &Event) {
    let mut line = serde_json::to_string(event).expect("events serialize");
    line.push('\n');
    // One write, so that events of several threads do not mix. If nobody listens any more, nobody misses it.
    let _ = std::io::stdout().lock().write_all(line.as_bytes());
}

/// Milliseconds since `start`.
pub fn millis(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// An exit and the end of what was printed, for an error message.
pub fn describe(output: &Output) -> String {
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}: {}", output.status, text.trim())
}
