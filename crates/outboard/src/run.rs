use crate::{EXIT_USAGE, chain, print, say_failure};
use clap::Args;
use outboard_cli::{MIB, parse_size};
use outboard_control::Name;
use outboard_hypervisor::{Capabilities, ThreadPriority, VcpuOptions};
use outboard_machine::{
    ConsoleTarget, DeviceSpec, DiskSpec, EXIT_KILLED, Error, MachineSpec, Outcome, VsockSpec,
};
use outboard_netstack::NetOptions;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Exit status after a panic of the guest's kernel.
const EXIT_GUEST_PANIC: u8 = 3;

#[derive(Args)]
pub struct RunArgs {
    /// Kernel: an arm64 `Image`, plain or gzip-compressed, or an EFI zboot image.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Kernel command line.
    #[arg(long, value_name = "TEXT", default_value = "console=ttyAMA0", allow_hyphen_values = true)]
    append: String,

    /// Number of vCPUs, 1 to 32.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,

    /// Guest memory: a number with K, M, G or T (powers of 1024); without a letter, MiB.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory_size)]
    memory: u64,

    /// Serial console of the guest (ttyAMA0): stdio, none, file:PATH[,limit=SIZE|off] or socket:PATH.
    ///
    /// At SIZE (64M) a file becomes PATH.1, in place of the one before, and a new one begins. With stdio, Ctrl-A x leaves, Ctrl-A h helps, and Ctrl-C goes to the guest.
    #[arg(long, value_name = "WHERE")]
    console: Option<ConsoleTarget>,

    /// Virtio console of the guest (hvc0), with the same choices; the device is there unless it is none.
    #[arg(long, value_name = "WHERE", default_value = "none")]
    virtio_console: ConsoleTarget,

    /// Disk image, raw or qcow2 by its name; may be given several times.
    #[arg(long = "disk", value_name = "PATH[:ro][,format=raw|qcow2]")]
    disks: Vec<DiskSpec>,

    /// User-mode network, such as user,forward=127.0.0.1:2222:22; may be given several times.
    ///
    /// user[,forward=[tcp:|udp:][HOSTADDR:]HOSTPORT:GUESTPORT]…[,mac=MAC][,host-loopback=on|off][,dns=ADDRESS].
    /// The guest gets 10.0.2.15 by DHCP; 10.0.2.2 leads to the host's own services. Forwards listen on 127.0.0.1
    /// unless told otherwise.
    #[arg(long = "net", value_name = "user,…")]
    nets: Vec<NetOptions>,

    /// Sockets between host and guest: the host connects to PATH and sends `CONNECT PORT`, the guest's connections to
    /// port N of the host go to PATH_N.
    #[arg(long, value_name = "[cid=N,]socket=PATH")]
    vsock: Option<VsockSpec>,

    /// Device of the host to give to the guest: a slot with all its functions (01:00) or one function (01:00.0); may be
    /// given several times. `outboard devices` lists what there is.
    ///
    /// With dma=mac the device reaches only the memory that the guest asks for, within a Mac's limits or smaller ones: the guest needs the
    /// outboard_dma module. dma=identity, where the host can do it, maps all of the guest's memory.
    ///
    /// For development, simulated:NAME in place of an address is a device made of software: endpoint, rtx5090 (what a GeForce RTX 5090 looks
    /// like from outside), large-bar.
    #[arg(
        long = "device",
        value_name = "BUS:DEVICE[.FUNCTION][,dma=identity|mac][,limit-bytes=SIZE][,limit-entries=N][,published=a|b|off]"
    )]
    devices: Vec<DeviceSpec>,

    /// Name for `outboard status` and `outboard device`; without it the first free one of vm1, vm2, … is taken.
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,

    /// Root ports with nothing behind them, for devices that `outboard device add` brings while the guest runs.
    #[arg(long, value_name = "N", default_value_t = 0)]
    spare_ports: u8,

    /// Do not use the terminal: without --console, the guest's console goes nowhere.
    #[arg(long)]
    headless: bool,

    /// End with status 0 when the guest reboots, instead of rebooting it.
    #[arg(long)]
    no_reboot: bool,

    /// Give the vCPUs the total-store-order memory model, for x86 emulation (Apple silicon only).
    #[arg(long)]
    tso: bool,

    /// Run the vCPU threads ahead of ordinary threads of the host.
    #[arg(long)]
    high_priority: bool,

    /// Check everything and print what would be built, but run nothing.
    #[arg(long)]
    dry_run: bool,
}

fn memory_size(text: &str) -> Result<u64, String> {
    parse_size(text, MIB)
}

impl RunArgs {
    fn spec(&self, log: Option<&Path>) -> MachineSpec {
        let default_console = if self.headless { ConsoleTarget::None } else { ConsoleTarget::Stdio };
        let priority = if self.high_priority { ThreadPriority::High } else { ThreadPriority::Normal };
        MachineSpec {
            name: self.name.clone(),
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            command_line: self.append.clone(),
            cpus: self.cpus,
            memory: self.memory,
            console: self.console.clone().unwrap_or(default_console),
            virtio_console: self.virtio_console.clone(),
            disks: self.disks.clone(),
            nets: self.nets.clone(),
            vsock: self.vsock.clone(),
            devices: self.devices.clone(),
            spare_ports: self.spare_ports.into(),
            log: log.map(Path::to_owned),
            no_reboot: self.no_reboot,
            vcpu: VcpuOptions { tso: self.tso, priority },
        }
    }

    /// Refuses a log that goes into a file which the machine uses.
    ///
    /// # Errors
    /// [`Error::SameFile`].
    pub fn check_log(&self, log: &Path) -> Result<(), Error> {
        self.spec(Some(log)).check_paths()
    }
}

/// Runs the machine; the process's exit status.
pub fn run(args: &RunArgs, log: Option<&Path>) -> ExitCode {
    let spec = args.spec(log);
    if args.dry_run {
        return match dry_run(&spec) {
            Ok(plan) => print(&plan, true),
            Err(error) => failed(&error),
        };
    }
    match run_here(&spec) {
        Ok(Outcome::PowerOff) => ExitCode::SUCCESS,
        Ok(Outcome::GuestPanic) => {
            say_failure(&"the guest's kernel panicked; its console says why");
            ExitCode::from(EXIT_GUEST_PANIC)
        }
        Ok(Outcome::Killed) => ExitCode::from(EXIT_KILLED as u8),
        Err(error) => failed(&error),
    }
}

/// Says why there is no machine; the exit status for that.
pub fn failed(error: &Error) -> ExitCode {
    outboard_machine::restore_terminal();
    say_failure(&chain(error));
    if error.is_usage() { ExitCode::from(EXIT_USAGE) } else { ExitCode::FAILURE }
}

/// Open files that a machine may need: a network's 1,024 connections, sockets of the guest, disks, events.
const OPEN_FILES: u64 = 10_240;

fn raise_limits() {
    // macOS starts processes with 256. Where it cannot be raised, connections beyond the limit are refused, no more.
    if let Err(error) = rlimit::increase_nofile_limit(OPEN_FILES) {
        tracing::debug!("the limit on open files stays as it is: {error}");
    }
}

fn run_here(spec: &MachineSpec) -> Result<Outcome, Error> {
    raise_limits();
    outboard_machine::run(spec, &*outboard_hypervisor::native()?)
}

/// Checks; what would be built. A host without a hypervisor checks against what the hosts that have one offer.
fn dry_run(spec: &MachineSpec) -> Result<String, Error> {
    let capabilities = match outboard_hypervisor::native() {
        Ok(hypervisor) => hypervisor.capabilities()?,
        Err(_) => TYPICAL,
    };
    raise_limits();
    outboard_machine::check(spec, &capabilities)
}

/// An Apple M4's, and KVM's on most arm64 machines.
const TYPICAL: Capabilities = Capabilities {
    max_vcpus: 64,
    max_ipa_bits: 40,
    tso: false,
    kernel_events: false,
    enforces_device_no_execute: false,
};
