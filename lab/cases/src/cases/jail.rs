//! What the monitor's process cannot do once its guest runs, asked for from inside each of its threads.

use crate::case::{Case, Group, HOST};
use crate::data::BLOCK;
use crate::guest::disk::GuestDisk;
use crate::guest::{Guest, busybox, net, vsock};
use crate::host::{
    Answer, Disk, ExitKind, Host, Intruder, Kernel, OUT, RunningVm, describe, outboard_path, web_server,
};
use crate::protocol::Vmm;
use anyhow::{Context, Result, ensure};
use nix::libc;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(120);
/// Where the guest finds a program of the host.
const HOST_PORT: u32 = 6000;
/// Bytes of the guest's download.
const DOWNLOAD: u64 = 1 << 20;
/// Exit status of a process that a forbidden call ended (`outboard --help`).
const VIOLATION: ExitKind = ExitKind::Code(5);
/// Asks the guest for nothing but to be there.
const IDLE: &str = "idle";
const TRACEFS: &str = "/sys/kernel/tracing";

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "jail",
        about: "each forbidden thing asked for from inside each thread of the monitor, and refused; its system calls counted",
        limit_s: 600,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    if host.vmm() == Vmm::Qemu {
        return Ok(Some("it is about Outboard's own process".into()));
    }
    let counter = Counter::start()?;
    let mut vm = start(host)?;
    let threads = threads(vm.pid())?;
    host.part("counted", counter.report(&threads).and_then(|text| keep(host, "jail.syscalls.txt", &text)));
    drop(counter);
    host.part("state", state(&vm));
    host.part("forbidden", forbidden(host, vm.pid(), &threads));
    host.part("files", files(vm.pid(), &threads));
    host.part("alive", alive(&mut vm));
    host.part("off", off(host));
    host.part("ends", ends(host, vm));
    Ok(None)
}

/// A machine with one of everything, all of it in use.
fn start(host: &Host) -> Result<RunningVm> {
    let (socket, disk) = (host.scratch("vsock"), host.scratch("disk.qcow2"));
    let listener = UnixListener::bind(format!("{}_{HOST_PORT}", socket.display()))?;
    let port = web_server(Ipv4Addr::LOCALHOST, 0)?.port();
    host.qemu_img(&["create", "-f", "qcow2", &disk.display().to_string(), "64M"])?;
    let vsock = format!("socket={}", socket.display());
    let console = format!("socket:{}", host.scratch("hvc0").display());
    let spec = host.guest(Kernel::V6_12).cpus(2).disk(Disk::qcow2(disk)).net().arg("port", port);
    let spec =
        spec.extra(&["--vsock", &vsock, "--virtio-console", &console, "--device", "simulated:endpoint"]);
    let mut vm = host.start(&spec)?;
    vm.note("works", STEP)?;
    drop(listener);
    Ok(vm)
}

/// Uses all of it, then waits to be used again.
fn guest(guest: &mut Guest) -> Result<()> {
    if guest.arg(IDLE).is_ok() {
        return guest.read_line().map(drop);
    }
    use_all(guest, true)?;
    guest.note("works", true);
    guest.read_line()?;
    use_all(guest, false)?;
    guest.note("still works", true);
    guest.read_line()?;
    Ok(())
}

fn use_all(guest: &mut Guest, first: bool) -> Result<()> {
    let disk = GuestDisk::open(guest, "vda", true)?;
    let mut buffer = crate::data::Aligned::new(BLOCK);
    std::os::unix::fs::FileExt::write_all_at(disk.file(), buffer.get_mut(), BLOCK as u64)?;
    disk.file().sync_all()?;
    std::os::unix::fs::FileExt::read_exact_at(disk.file(), buffer.get_mut(), BLOCK as u64)?;
    let router = "10.0.2.2";
    if first {
        net::up(guest)?;
        guest.need("vmw_vsock_virtio_transport")?;
        vsock::connect_to_host(HOST_PORT)?;
        guest.need("virtio_rng")?;
    }
    busybox(&["ping", "-c", "1", "-W", "20", router])?;
    let port = u16::try_from(guest.number("port")?)?;
    let got = net::fetch(router, port, 1, DOWNLOAD, |_| ())?;
    ensure!(got == DOWNLOAD, "the download ended after {got} bytes");
    Ok(())
}

/// A thread of the monitor with its name.
type Thread = (u32, String);

fn threads(process: u32) -> Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let path = entry?.path();
        let name = fs::read_to_string(path.join("comm"))?.trim().to_owned();
        let number = path.file_name().context("a thread has a number")?.to_string_lossy().parse()?;
        threads.push((number, name));
    }
    threads.sort();
    Ok(threads)
}

/// What the kernel says of each thread, and the monitor of itself.
fn state(vm: &RunningVm) -> Result<()> {
    for (thread, name) in threads(vm.pid())? {
        let status = fs::read_to_string(format!("/proc/{thread}/status"))?;
        let value = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.map(|text| text.trim().to_owned()).unwrap_or_default()
        };
        ensure!(value("NoNewPrivs") == "1", "{name} may get new privileges");
        // 2 is a filter. The process has two; all but what starts threads, and waits from before, have one more.
        let (mode, filters) = (value("Seccomp"), value("Seccomp_filters").parse::<u32>()?);
        let enough = filters == 3 || (filters == 2 && is_early(&name));
        ensure!(mode == "2" && enough, "{name} has seccomp {mode}, {filters} filters");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", vm.pid()))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
    ensure!(core.split_whitespace().nth(4) == Some("0"), "core files: {core}");
    let environment = fs::read(format!("/proc/{}/environ", vm.pid()))?;
    ensure!(environment.iter().all(|byte| *byte == 0), "{}", String::from_utf8_lossy(&environment));
    ensure_not_dumped(&fs::read_to_string(format!("/proc/{}/smaps", vm.pid()))?)?;
    let said = status()?;
    ensure!(said.contains("jail on (seccomp, Landlock ABI"), "status says {said}");
    Ok(())
}

/// The guest's memory is the one mapping of its size; `dd` among its flags (proc(5)) keeps it out of core files.
fn ensure_not_dumped(smaps: &str) -> Result<()> {
    let mut lines = smaps.lines();
    let is_ram = |line: &str| line.strip_prefix("Size:").is_some_and(|size| size.trim() == "524288 kB");
    lines.find(|line| is_ram(line)).context("no mapping is as large as the guest's memory")?;
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).context("a mapping has flags")?;
    ensure!(flags.split_whitespace().any(|flag| flag == "dd"), "guest memory has {flags}");
    Ok(())
}

fn status() -> Result<String> {
    let output = Command::new(outboard_path()).arg("status").output().context("cannot start outboard")?;
    ensure!(output.status.success(), "outboard status: {}", describe(&output));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Threads that have the filter of the whole process and none of their own: those that wait since before the process was confined, and confine
/// themselves when they are first woken up, and the one that starts others.
fn is_early(name: &str) -> bool {
    ["spawner", "signals", "control", "simulated-pci"].contains(&name)
}

/// Calls that no thread may make. Were one made, it would fail or do no harm.
fn never(other: i64) -> Vec<(&'static str, i64, Vec<i64>)> {
    let thread_in_space = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_NEWUSER;
    let code = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    let private = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    vec![
        ("execve", libc::SYS_execve, vec![0, 0, 0]),
        ("execveat", libc::SYS_execveat, vec![-1, 0, 0, 0, 0]),
        ("fork", libc::SYS_clone, vec![libc::SIGCHLD.into()]),
        ("a thread in a new user namespace", libc::SYS_clone, vec![thread_in_space.into()]),
        ("ptrace", libc::SYS_ptrace, vec![libc::PTRACE_PEEKDATA.into(), other]),
        ("process_vm_readv", libc::SYS_process_vm_readv, vec![other]),
        ("process_vm_writev", libc::SYS_process_vm_writev, vec![other]),
        ("pidfd_open", libc::SYS_pidfd_open, vec![other, 0]),
        ("mount", libc::SYS_mount, vec![0, 0, 0, 0, 0]),
        ("umount", libc::SYS_umount2, vec![0, 0]),
        ("pivot_root", libc::SYS_pivot_root, vec![0, 0]),
        ("chroot", libc::SYS_chroot, vec![0]),
        ("unshare", libc::SYS_unshare, vec![libc::CLONE_NEWUSER.into()]),
        ("setns", libc::SYS_setns, vec![-1, 0]),
        ("kill of another process", libc::SYS_kill, vec![other, 0]),
        ("tgkill of another process", libc::SYS_tgkill, vec![other, other, 0]),
        ("tkill of another process", libc::SYS_tkill, vec![other, 0]),
        ("io_uring", libc::SYS_io_uring_setup, vec![1, 0]),
        ("bpf", libc::SYS_bpf, vec![0, 0, 0]),
        ("perf", libc::SYS_perf_event_open, vec![0, 0, -1, -1, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, vec![0]),
        ("keyctl", libc::SYS_keyctl, vec![0, 0]),
        ("add_key", libc::SYS_add_key, vec![0, 0, 0, 0, 0]),
        ("request_key", libc::SYS_request_key, vec![0, 0, 0, 0]),
        ("memfd_create", libc::SYS_memfd_create, vec![0, 0]),
        ("executable memory", libc::SYS_mmap, vec![0, 4096, code, private, -1, 0]),
        ("memory made executable", libc::SYS_mprotect, vec![0, 0, code]),
        ("init_module", libc::SYS_init_module, vec![0, 0, 0]),
        ("finit_module", libc::SYS_finit_module, vec![-1, 0, 0]),
        ("kexec", libc::SYS_kexec_load, vec![0, 0, 0, 0]),
        ("reboot", libc::SYS_reboot, vec![0, 0, 0, 0]),
        ("setuid", libc::SYS_setuid, vec![-1]),
        ("capset", libc::SYS_capset, vec![0, 0]),
        ("a raised limit", libc::SYS_prlimit64, vec![0, libc::RLIMIT_NOFILE.into(), 1 << 32, 0]),
        ("prctl", libc::SYS_prctl, vec![libc::PR_SET_DUMPABLE.into(), 1]),
        ("personality", libc::SYS_personality, vec![0xffff_ffff]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, vec![-1, 0, 0]),
        ("mknod", libc::SYS_mknodat, vec![-1, 0, 0, 0]),
        ("symlink", libc::SYS_symlinkat, vec![0, -1, 0]),
        ("link", libc::SYS_linkat, vec![-1, 0, -1, 0, 0]),
        ("chmod", libc::SYS_fchmodat, vec![-1, 0, 0]),
        ("listen", libc::SYS_listen, vec![-1, 1]),
        ("a netlink socket", libc::SYS_socket, vec![libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0]),
        ("a packet socket", libc::SYS_socket, vec![libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0]),
        ("a vsock socket", libc::SYS_socket, vec![libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0]),
        ("a raw socket", libc::SYS_socket, vec![libc::AF_INET.into(), libc::SOCK_RAW.into(), 1]),
        ("typing for the user", libc::SYS_ioctl, vec![-1, 0x5412, 0]),
    ]
}

/// Asks for each of them in each thread that has a filter of its own.
fn forbidden(host: &Host, process: u32, threads: &[Thread]) -> Result<()> {
    let mut asked = 0;
    for (thread, name) in threads {
        let mut intruder = Intruder::enter(process, *thread).with_context(|| name.clone())?;
        for (what, number, arguments) in never(1) {
            // What the whole process may do, if with other arguments or by some of its threads only.
            if is_early(name) && [libc::SYS_tkill, libc::SYS_ioctl].contains(&number) {
                continue;
            }
            let answer = intruder.call(number, &arguments).with_context(|| format!("{what} in {name}"))?;
            ensure!(answer == Answer::Forbidden(number), "{what} in {name}: {answer:?}");
            asked += 1;
        }
        if is_early(name) {
            continue;
        }
        let net = intruder.call(libc::SYS_socket, &[libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0])?;
        let allowed = matches!(net, Answer::Returned(fd) if fd >= 0);
        ensure!(allowed == name.starts_with("net"), "a TCP socket in {name}: {net:?}");
        if let Answer::Returned(fd) = net {
            ensure!(intruder.call(libc::SYS_close, &[fd])? == Answer::Returned(0), "closing it");
        }
    }
    host.log(format!("{asked} forbidden calls refused in {} threads", threads.len()));
    Ok(())
}

/// Asks for files that are nobody's business, in every thread: where the filter lets files be opened, Landlock does not.
fn files(process: u32, threads: &[Thread]) -> Result<()> {
    let own = outboard_path();
    let places =
        [own.as_path(), Path::new("/proc/1/environ"), Path::new("/proc/kcore"), Path::new("/dev/vfio/vfio")];
    for (thread, name) in threads {
        let mut intruder = Intruder::enter(process, *thread).with_context(|| name.clone())?;
        for place in places {
            let mut path = place.as_os_str().as_encoded_bytes().to_vec();
            path.push(0);
            let at = intruder.put(0, &path)?;
            let mut arguments = vec![libc::AT_FDCWD.into(), at, libc::O_RDONLY.into(), 0];
            let answer = intruder.call(libc::SYS_openat, &arguments)?;
            if let Answer::Returned(fd) = answer {
                if fd >= 0 {
                    intruder.call(libc::SYS_close, &[fd])?;
                }
                let vfio = place.starts_with("/dev/vfio");
                ensure!(
                    vfio || fd == -i64::from(libc::EACCES),
                    "{} read in {name}: {answer:?}",
                    place.display()
                );
            }
            arguments[2] = (libc::O_WRONLY | libc::O_CREAT).into();
            let mut new = Path::new(OUT).join("jail-was-here").into_os_string().into_encoded_bytes();
            new.push(0);
            arguments[1] = intruder.put(1, &new)?;
            let answer = intruder.call(libc::SYS_openat, &arguments)?;
            let refused = answer == Answer::Forbidden(libc::SYS_openat)
                || answer == Answer::Returned(-i64::from(libc::EACCES));
            ensure!(refused, "a file made in {name}: {answer:?}");
        }
    }
    Ok(())
}

/// All that was only asked for: the machine works as before.
fn alive(vm: &mut RunningVm) -> Result<()> {
    vm.type_text("again\n")?;
    vm.note("still works", STEP).map(drop)
}

/// A forbidden call that nobody takes back ends the process, which says what it was.
fn ends(host: &Host, mut vm: RunningVm) -> Result<()> {
    let threads = threads(vm.pid())?;
    let (thread, _) =
        threads.iter().find(|(_, name)| name.starts_with("net")).context("no network thread")?;
    let number = libc::SYS_ptrace;
    Intruder::enter(vm.pid(), *thread)?.call_and_leave(number, &[0, 0, 0, 0])?;
    let exit = vm.exit(Duration::from_secs(30))?;
    let said = vm.stderr();
    ensure!(exit == VIOLATION, "{exit:?} and not {VIOLATION:?}: {said}");
    let line = format!("a thread of kind 'net' made system call {number} (aarch64)");
    ensure!(said.contains(&line), "it said: {said}");
    // What keeps files for it goes with it.
    crate::guest::wait_for("the end of the process that keeps files", Duration::from_secs(20), || {
        let left = fs::read_dir("/proc").ok()?.flatten().filter(|entry| {
            fs::read_link(entry.path().join("exe")).is_ok_and(|program| program == outboard_path())
        });
        (left.count() == 0).then_some(())
    })?;
    host.log(said.lines().last().unwrap_or_default());
    Ok(())
}

/// `--jail off` is what it says.
fn off(host: &Host) -> Result<()> {
    let mut vm =
        host.start(&host.guest(Kernel::V6_12).arg(IDLE, 1).extra(&["--jail", "off", "--name", "off"]))?;
    vm.init()?;
    let state = fs::read_to_string(format!("/proc/{}/status", vm.pid()))?;
    ensure!(state.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "0"])), "{state}");
    ensure!(status()?.contains("jail off"), "status does not say so: {}", status()?);
    vm.kill()
}

/// Counts system calls by thread, by an event of the host's kernel.
struct Counter;

impl Counter {
    const TRIGGER: &str = "hist:keys=common_pid,id.syscall:size=16384";

    fn start() -> Result<Self> {
        busybox(&["mount", "-t", "tracefs", "nodev", TRACEFS])?;
        fs::write(Self::file("trigger"), Self::TRIGGER).context("no histogram of system calls")?;
        Ok(Self)
    }

    fn file(name: &str) -> std::path::PathBuf {
        Path::new(TRACEFS).join("events/raw_syscalls/sys_enter").join(name)
    }

    /// A table: kind of thread by its name less numbers, call, how often.
    fn report(&self, threads: &[Thread]) -> Result<String> {
        let text = fs::read_to_string(Self::file("hist"))?;
        let mut counts: BTreeMap<(String, String), u64> = BTreeMap::new();
        // { common_pid: 123, id: sys_read [ 63] } hitcount: 42
        for line in text.lines().filter(|line| line.starts_with("{ common_pid:")) {
            let fields: Vec<&str> =
                line.split([':', ',', '{', '}', '[', ']']).map(str::trim).filter(|f| !f.is_empty()).collect();
            let [_, process, _, call, _, _, count] = fields[..] else { continue };
            let Some((_, name)) = threads.iter().find(|(thread, _)| process == thread.to_string()) else {
                continue;
            };
            let name = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == ' ');
            *counts.entry((name.to_owned(), call.to_owned())).or_default() += count.parse::<u64>()?;
        }
        ensure!(counts.len() > 20, "too few system calls were counted: {text}");
        let mut table = String::new();
        for ((name, call), count) in counts {
            let _ = writeln!(table, "{name:<16} {call:<24} {count:>8}");
        }
        Ok(table)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        // For the cases that follow; this one has its numbers.
        let _ = fs::write(Self::file("trigger"), format!("!{}", Self::TRIGGER));
        let _ = busybox(&["umount", TRACEFS]);
    }
}

fn keep(host: &Host, name: &str, text: &str) -> Result<()> {
    host.log(format!("{} lines of counted system calls are in {name}", text.lines().count()));
    Ok(fs::write(Path::new(OUT).join("logs").join(name), text)?)
}
