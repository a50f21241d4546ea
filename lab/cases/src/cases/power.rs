//! How a guest ends, and how it is ended.

use crate::case::{Case, Group, GuestHalf, HOST, HostHalf};
use crate::data::{Aligned, BLOCK};
use crate::guest::disk::GuestDisk;
use crate::guest::{Guest, input};
use crate::host::{Disk, ExitKind, Host, Kernel};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use std::fs;
use std::io::Write as _;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(120);
/// Exit statuses of `outboard` (its `--help`).
const PANICKED: ExitKind = ExitKind::Code(3);
const STOPPED_HARD: ExitKind = ExitKind::Code(4);

pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, host: HostHalf, guest: GuestHalf| Case {
        name,
        about,
        limit_s: 600,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest,
    };
    vec![
        case("poweroff", "power-off ends the process with status 0", poweroff_host, |_| Ok(())),
        case(
            "reboot-twice",
            "two reboots in one process; the disk keeps what was written",
            reboot_host,
            reboot_guest,
        ),
        case(
            "guest-panic",
            "a kernel panic has its own exit status, also before init",
            panic_host,
            panic_guest,
        ),
        case("power-key", "SIGTERM presses the power key; the guest's init sees it", key_host, key_guest),
        case("stop-hard", "a second SIGTERM stops a guest that does not react", hard_host, hard_guest),
        case("console-socket", "the console on a Unix socket, both directions", socket_host, socket_guest),
    ]
}

fn poweroff_host(host: &Host) -> Result<Option<String>> {
    host.start(&host.guest(Kernel::V6_12))?.finish(STEP)?;
    Ok(None)
}

fn reboot_host(host: &Host) -> Result<Option<String>> {
    let image = host.raw_image("counter.raw", 1)?;
    let mut vm = host.start(&host.guest(Kernel::V6_12).cpus(2).disk(Disk::raw(image)))?;
    let pid = vm.pid();
    for boot in 0..3 {
        vm.init().with_context(|| format!("boot {boot}"))?;
        let seen = vm.note("boots", STEP)?;
        ensure!(seen == boot, "boot {boot} read {seen} from its disk");
    }
    ensure!(vm.pid() == pid, "the process has changed");
    vm.finish(STEP)?;
    Ok(None)
}

fn reboot_guest(guest: &mut Guest) -> Result<()> {
    let boots = count_boot(guest)?;
    guest.note("boots", boots);
    if boots == 2 { Ok(()) } else { guest.reboot() }
}

/// The number of boots before this one, which the first disk keeps.
fn count_boot(guest: &mut Guest) -> Result<u8> {
    let disk = GuestDisk::open(guest, "vda", true)?;
    let boots = disk.read_block(0)?.get()[0];
    let mut block = Aligned::new(BLOCK);
    block.get_mut()[0] = boots + 1;
    disk.write_block(0, &block)?;
    disk.flush()?;
    Ok(boots)
}

fn panic_host(host: &Host) -> Result<Option<String>> {
    let wants_status = |name: &str, cpus: u32, words: &str| -> Result<()> {
        let mut vm = host.start(&host.guest(Kernel::V6_12).cpus(cpus).append(words))?;
        let exit = vm.exit(STEP)?;
        ensure!(exit == PANICKED, "{name}: {exit:?} instead of {PANICKED:?}; {}", vm.stderr());
        ensure!(vm.stderr().contains("panic"), "{name}: the message does not say so: {}", vm.stderr());
        Ok(())
    };
    host.part("sysrq", wants_status("sysrq", 1, ""));
    host.part("no-init", wants_status("no-init", 1, "rdinit=/missing"));
    host.part("stays", wants_status("stays", 1, "panic=0"));
    host.part("stays-4-cpus", wants_status("stays-4-cpus", 4, "panic=0"));
    host.part("only-shown", only_shown(host));
    Ok(None)
}

/// The console shows panics that are none: the guest runs on, reboots and powers off with status 0.
fn only_shown(host: &Host) -> Result<()> {
    let disk = Disk::raw(host.raw_image("shown.raw", 1)?);
    let mut vm = host.start(&host.guest(Kernel::V6_12).cpus(2).disk(disk).arg("shown", "1"))?;
    // The first boot reboots, the second powers off.
    for boot in 0..2 {
        vm.init().with_context(|| format!("boot {boot}"))?;
        vm.note("alive", STEP)?;
    }
    vm.finish(STEP)
}

fn panic_guest(guest: &mut Guest) -> Result<()> {
    if guest.arg("shown").is_ok() {
        return show_panics(guest);
    }
    // The kernel's first line is to come behind a program's unfinished one.
    let mut console = fs::File::options().write(true).open("/dev/ttyAMA0")?;
    console.write_all(b"a line without an end: ")?;
    fs::write("/proc/sys/kernel/sysrq", "1")?;
    fs::write("/proc/sysrq-trigger", "c")?;
    bail!("the kernel survived its crash")
}

/// Shows an old log, as `cat` would, and has the kernel itself print a panic's last line (only root can).
fn show_panics(guest: &mut Guest) -> Result<()> {
    let log = "[    8.1] Kernel panic - not syncing: old\n[    8.2] ---[ end Kernel panic - not syncing: old ]---\n";
    let mut console = fs::File::options().write(true).open("/dev/ttyAMA0")?;
    console.write_all(log.as_bytes())?;
    fs::write("/dev/kmsg", "<0>---[ end Kernel panic - not syncing: from root ]---")?;
    // Longer than all judgements of the vCPUs take.
    std::thread::sleep(Duration::from_secs(9));
    guest.note("alive", true);
    fs::write("/dev/kmsg", "<0>Kernel panic - not syncing: from root")?;
    if count_boot(guest)? == 0 { guest.reboot() } else { Ok(()) }
}

fn key_host(host: &Host) -> Result<Option<String>> {
    let mut vm = host.start(&host.guest(Kernel::V6_12))?;
    vm.note("ready", STEP)?;
    vm.signal(Signal::SIGTERM)?;
    vm.note("pressed", Duration::from_secs(25)).context("the power key was not seen")?;
    vm.finish(STEP)?;
    Ok(None)
}

fn key_guest(guest: &mut Guest) -> Result<()> {
    guest.need("gpio_keys")?;
    guest.need("evdev")?;
    let keys = input::find("gpio-keys")?;
    guest.note("ready", true);
    input::wait_for_key(&keys, input::KEY_POWER)?;
    guest.note("pressed", true);
    Ok(())
}

fn hard_host(host: &Host) -> Result<Option<String>> {
    let mut vm = host.start(&host.guest(Kernel::V6_12))?;
    vm.note("ready", STEP)?;
    vm.signal(Signal::SIGTERM)?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(vm.try_exit()?.is_none(), "one SIGTERM ended a guest that had not switched itself off");
    vm.signal(Signal::SIGTERM)?;
    let exit = vm.exit(Duration::from_secs(20))?;
    ensure!(exit == STOPPED_HARD, "{exit:?} instead of {STOPPED_HARD:?}; {}", vm.stderr());
    Ok(None)
}

fn hard_guest(guest: &mut Guest) -> Result<()> {
    guest.note("ready", true);
    std::thread::sleep(Duration::from_secs(300));
    bail!("nobody stopped this guest")
}

fn socket_host(host: &Host) -> Result<Option<String>> {
    let path = host.scratch("console.sock");
    let mut vm = host.start(&host.guest(Kernel::V6_12).console_socket(&path))?;
    vm.note("ready", STEP)?;
    vm.type_text("a line for the guest\n")?;
    let heard = vm.note("heard", STEP)?;
    ensure!(heard == "a line for the guest", "the guest heard {heard}");
    vm.finish(STEP)?;
    ensure!(!path.exists(), "the socket is still there after the end");
    Ok(None)
}

fn socket_guest(guest: &mut Guest) -> Result<()> {
    // The host half may connect after the first lines: what it must see comes after its own line.
    for _ in 0..200 {
        guest.note("ready", true);
        if let Some(line) = guest.line_within(Duration::from_millis(200))? {
            guest.note("heard", line);
            return Ok(());
        }
    }
    bail!("nothing was typed")
}
