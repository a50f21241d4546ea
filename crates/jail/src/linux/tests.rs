//! Each in a process of its own: there is no way out of a jail. A test starts its own program again as the test [`child`], which does what the
//! environment says.

use crate::{Access, Mode, Policy, ThreadKind, enter, read_file, remove_file, spawn};
use std::fs;
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::channel;

const SCENE: &str = "OUTBOARD_JAIL_TEST";
const FOLDER: &str = "OUTBOARD_JAIL_FOLDER";
const FINE: i32 = 42;

/// Starts a process that plays `scene` in `folder`.
fn play(scene: &str, folder: &Path) -> Output {
    Command::new(std::env::current_exe().expect("this program has a path"))
        .args(["--exact", "linux::tests::child", "--nocapture", "--test-threads=1"])
        .env(SCENE, scene)
        .env(FOLDER, folder)
        .env("OUTBOARD_SECRET", "hunter2")
        .stdin(Stdio::null())
        .output()
        .expect("this program starts")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Plays a scene that has to end well.
fn fine(scene: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let output = play(scene, folder.path());
    assert_eq!(output.status.code(), Some(FINE), "{scene}: {}", said(&output));
    folder
}

/// What a process asks for: not a test by itself.
#[test]
fn child() {
    let Ok(scene) = std::env::var(SCENE) else { return };
    let folder = PathBuf::from(std::env::var(FOLDER).expect("the parent gives one"));
    let words: Vec<&str> = scene.split(' ').collect();
    match words[..] {
        ["call", kind, ..] => call(kind, &words[2..], Mode::On),
        ["log", kind, ..] => call(kind, &words[2..], Mode::Log),
        ["abort", kind] => on_thread(kind, || std::process::abort()),
        ["early"] => early(),
        ["files"] => files(&folder),
        ["keeper"] => keeper(&folder),
        ["threads"] => threads(),
        ["environment"] => environment(),
        _ => panic!("unknown scene {scene}"),
    }
    std::process::exit(FINE);
}

fn policy(mode: Mode) -> Policy {
    Policy { mode, network: true, memory: 8 << 30, ..Policy::default() }
}

fn kind(name: &str) -> ThreadKind {
    ThreadKind::ALL.into_iter().find(|kind| kind.name() == name).expect("a kind")
}

/// Does `body` on a confined thread of a kind; the main one is the caller.
fn on_thread(name: &str, body: impl FnOnce() + Send + 'static) {
    enter(&policy(Mode::On)).expect("a jail");
    let kind = kind(name);
    if kind == ThreadKind::Main {
        return body();
    }
    spawn(kind, name, body).expect("a thread").join().expect("no panic");
}

fn raw(words: &[&str]) -> libc::c_long {
    let word = |index: usize| words.get(index).map_or(0, |word| word.parse::<i64>().expect("a number"));
    // SAFETY: the tests below name calls that fail, or that the filter forbids, with these arguments.
    unsafe { libc::syscall(word(0), word(1), word(2), word(3), word(4), word(5), word(6)) }
}

fn call(name: &str, words: &[&str], mode: Mode) {
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let body = move || {
        raw(&words.iter().map(String::as_str).collect::<Vec<_>>());
    };
    if mode == Mode::On {
        return on_thread(name, body);
    }
    enter(&policy(mode)).expect("a jail");
    spawn(kind(name), name, body).expect("a thread").join().expect("no panic");
}

/// Calls that no thread may make, with arguments that do no harm where they are not forbidden.
fn forbidden() -> Vec<(&'static str, Vec<i64>)> {
    let bad = -1;
    let mut calls = vec![
        ("execve", vec![libc::SYS_execve, 0, 0, 0]),
        ("execveat", vec![libc::SYS_execveat, bad, 0, 0, 0, 0]),
        ("ptrace", vec![libc::SYS_ptrace, libc::PTRACE_PEEKDATA.into(), 1]),
        ("process_vm_readv", vec![libc::SYS_process_vm_readv, 1]),
        ("mount", vec![libc::SYS_mount, 0, 0, 0]),
        ("unshare", vec![libc::SYS_unshare, libc::CLONE_NEWUSER.into()]),
        ("setns", vec![libc::SYS_setns, bad]),
        ("chroot", vec![libc::SYS_chroot, 0]),
        ("fork", vec![libc::SYS_clone, libc::SIGCHLD.into()]),
        (
            "thread in a new user namespace",
            vec![
                libc::SYS_clone,
                (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_NEWUSER).into(),
            ],
        ),
        ("kill", vec![libc::SYS_kill, 1, 0]),
        ("tgkill of another", vec![libc::SYS_tgkill, 1, 1, 0]),
        ("pidfd_open", vec![libc::SYS_pidfd_open, 1]),
        ("io_uring_setup", vec![libc::SYS_io_uring_setup, 1, 0]),
        ("bpf", vec![libc::SYS_bpf, 0, 0, 0]),
        ("perf_event_open", vec![libc::SYS_perf_event_open, 0]),
        ("userfaultfd", vec![libc::SYS_userfaultfd, 0]),
        ("keyctl", vec![libc::SYS_keyctl, 0, 0]),
        ("add_key", vec![libc::SYS_add_key, 0]),
        ("memfd_create", vec![libc::SYS_memfd_create, 0, 0]),
        (
            "mmap of code",
            vec![
                libc::SYS_mmap,
                0,
                4096,
                (libc::PROT_READ | libc::PROT_EXEC).into(),
                (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).into(),
                bad,
            ],
        ),
        ("mprotect of code", vec![libc::SYS_mprotect, 0, 0, (libc::PROT_READ | libc::PROT_EXEC).into()]),
        ("setuid", vec![libc::SYS_setuid, bad]),
        ("capset", vec![libc::SYS_capset, 0, 0]),
        ("prctl", vec![libc::SYS_prctl, libc::PR_SET_DUMPABLE.into(), 1]),
        ("init_module", vec![libc::SYS_init_module, 0]),
        ("open_by_handle_at", vec![libc::SYS_open_by_handle_at, bad, 0]),
        ("symlinkat", vec![libc::SYS_symlinkat, 0, bad, 0]),
        ("listen", vec![libc::SYS_listen, bad, 1]),
        ("raised limit", vec![libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE.into(), 1 << 32]),
        ("ioctl TIOCSTI", vec![libc::SYS_ioctl, bad, libc::TIOCSTI as i64, 0]),
    ];
    for (name, family, kind, protocol) in [
        ("AF_NETLINK", libc::AF_NETLINK, libc::SOCK_RAW, 0),
        ("AF_PACKET", libc::AF_PACKET, libc::SOCK_RAW, 0),
        ("AF_VSOCK", libc::AF_VSOCK, libc::SOCK_STREAM, 0),
        ("AF_UNIX datagrams", libc::AF_UNIX, libc::SOCK_DGRAM, 0),
        ("raw IP", libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
        ("SCTP", libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP),
    ] {
        calls.push((name, vec![libc::SYS_socket, family.into(), kind.into(), protocol.into()]));
    }
    calls
}

fn numbers(call: &[i64]) -> String {
    call.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_forbidden_call_ends_the_process_and_names_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    for kind in ThreadKind::ALL {
        for (name, call) in forbidden() {
            let output = play(&format!("call {kind} {}", numbers(&call)), folder.path());
            let text = said(&output);
            assert_eq!(output.status.code(), Some(crate::VIOLATION_STATUS), "{name} by {kind}: {text}");
            let line = format!(
                "a thread of kind '{kind}' made system call {} ({})",
                call[0],
                std::env::consts::ARCH
            );
            assert!(text.contains(&line), "{name} by {kind}: {text}");
        }
    }
}

#[test]
fn only_the_kinds_that_need_it_open_files_and_connections() {
    let folder = tempfile::tempdir().expect("a folder");
    let (stream, inet, unix) =
        (i64::from(libc::SOCK_STREAM), i64::from(libc::AF_INET), i64::from(libc::AF_UNIX));
    for (call, kinds) in [
        (vec![libc::SYS_openat, -1, 0, 0], &[ThreadKind::Control, ThreadKind::Console, ThreadKind::Log][..]),
        (vec![libc::SYS_renameat, -1, 0, -1, 0], &[ThreadKind::Console, ThreadKind::Log]),
        (vec![libc::SYS_socket, inet, stream, 0], &[ThreadKind::Net]),
        (vec![libc::SYS_socket, unix, stream, 0], &[ThreadKind::Vsock]),
        (vec![libc::SYS_connect, -1, 0, 0], &[ThreadKind::Net, ThreadKind::Vsock]),
        (
            vec![libc::SYS_pwrite64, -1, 0, 0, 0],
            &[
                ThreadKind::Main,
                ThreadKind::Control,
                ThreadKind::Vcpu,
                ThreadKind::Block,
                ThreadKind::Pci,
                ThreadKind::Dma,
            ],
        ),
    ] {
        for kind in ThreadKind::ALL {
            let output = play(&format!("call {kind} {}", numbers(&call)), folder.path());
            let expected = if kinds.contains(&kind) { FINE } else { crate::VIOLATION_STATUS };
            assert_eq!(output.status.code(), Some(expected), "{call:?} by {kind}: {}", said(&output));
        }
    }
}

#[test]
fn a_panic_can_still_end_any_thread_by_the_usual_signal() {
    let folder = tempfile::tempdir().expect("a folder");
    for kind in ThreadKind::ALL {
        let output = play(&format!("abort {kind}"), folder.path());
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{kind}: {}", said(&output));
    }
}

#[test]
fn with_log_a_forbidden_call_is_made() {
    fine(&format!("log net {} 0", libc::SYS_memfd_create));
}

/// A thread that waits since before: what the whole process may not, and files, are out of its reach at once; what its kind may not, once it says
/// which that is.
fn early() {
    let (go, wait) = channel();
    let thread = spawn(ThreadKind::Signals, "early", move || {
        wait.recv().expect("a word");
        denied(fs::read("/proc/self/status"));
        assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_ok(), "some thread of the process may");
        crate::confine(ThreadKind::Control);
        denied(fs::read("/proc/self/status"));
        // The kind is that of the first time.
        crate::confine(ThreadKind::Entropy);
        assert!(fs::metadata("/").is_ok());
    });
    enter(&policy(Mode::On)).expect("a jail");
    go.send(()).expect("it waits");
    assert!(thread.expect("a thread").join().is_ok());
}

#[test]
fn a_thread_from_before_confines_itself() {
    fine("early");
}

fn denied<T>(result: io::Result<T>) {
    let error = result.err().expect("it is out of reach");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
}

fn files(folder: &Path) {
    let (logs, other) = (folder.join("logs"), folder.join("other"));
    fs::create_dir(&logs).expect("a folder");
    fs::write(&other, "x").expect("a file");
    fs::write(folder.join("given"), "x").expect("a file");
    let files = vec![
        (logs.clone(), Access::Rotate),
        (folder.join("given"), Access::Read),
        (folder.join("not there"), Access::Read),
    ];
    let confined = enter(&Policy { files, ..policy(Mode::On) }).expect("a jail");
    assert!(confined.landlock.is_some(), "this test needs a host with Landlock: {confined}");
    let folder = folder.to_owned();
    let body = move || {
        let log = logs.join("vm.log");
        fs::write(&log, "full").expect("a log");
        fs::rename(&log, logs.join("vm.log.1")).expect("the log is rotated");
        fs::write(&log, "new").expect("a new log");
        denied(fs::rename(&log, folder.join("away")));
        denied(fs::read(&other));
        denied(fs::write(&other, "y"));
        denied(fs::read("/etc/passwd"));
        denied(fs::write(folder.join("new"), "y"));
        denied(fs::remove_file(&other));
        assert_eq!(fs::read(folder.join("given")).expect("it was given"), b"x");
        denied(fs::write(folder.join("given"), "y"));
    };
    assert!(spawn(ThreadKind::Log, "log", body).expect("a thread").join().is_ok());
}

#[test]
fn nothing_is_opened_but_what_was_given() {
    let folder = fine("files");
    assert_eq!(fs::read(folder.path().join("other")).expect("still there"), b"x");
}

fn keeper(folder: &Path) {
    let (known, socket, other) = (folder.join("resolv.conf"), folder.join("socket"), folder.join("other"));
    for path in [&known, &socket, &other] {
        fs::write(path, "old").expect("a file");
    }
    let replace = folder.join("replaces");
    let policy = Policy { reread: vec![known.clone()], remove: vec![socket.clone()], ..policy(Mode::On) };
    fs::write(&replace, "new").expect("a file");
    // Somebody else replaces it while the process is confined.
    #[expect(clippy::zombie_processes, reason = "a confined process waits for no child")]
    let mut other_process = Command::new("sh")
        .args(["-c", "read line; mv \"$0\" \"$1\""])
        .args([&replace, &known])
        .stdin(Stdio::piped())
        .spawn()
        .expect("a shell");
    let go = other_process.stdin.take();
    enter(&policy).expect("a jail");
    let body = move || {
        assert_eq!(read_file(&known).expect("it is known"), b"old");
        drop(go);
        while read_file(&known).expect("it is known") != b"new" {
            std::thread::yield_now();
        }
        denied(read_file(&other));
        denied(remove_file(&known));
        remove_file(&socket).expect("it is ours");
        assert!(!fs::exists(&socket).unwrap_or(true));
        let error = remove_file(&socket).expect_err("it is gone");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    };
    assert!(spawn(ThreadKind::Net, "net", body).expect("a thread").join().is_ok());
}

#[test]
fn the_keeper_reads_and_removes_what_is_on_its_list_and_goes_with_its_process() {
    // `output` waits until every writer of its pipes has gone, the keeper too.
    let folder = fine("keeper");
    assert!(folder.path().join("other").is_file());
}

/// A thread that may not start any has others started, which may what it may not.
fn threads() {
    enter(&policy(Mode::On)).expect("a jail");
    let vcpu = spawn(ThreadKind::Vcpu, "vcpu0", || {
        let net = spawn(ThreadKind::Net, "net0", || std::net::UdpSocket::bind("127.0.0.1:0").is_ok());
        net.expect("a thread").join().expect("no panic")
    });
    assert!(vcpu.expect("a thread").join().expect("no panic"));
}

#[test]
fn a_confined_thread_has_others_started() {
    fine("threads");
}

fn environment() {
    let mut block = fs::File::open("/proc/self/environ").expect("a file of proc");
    assert!(std::env::var("OUTBOARD_SECRET").is_ok());
    enter(&policy(Mode::On)).expect("a jail");
    assert_eq!(std::env::vars_os().count(), 0);
    let mut left = Vec::new();
    block.read_to_end(&mut left).expect("its bytes");
    assert!(!left.windows(7).any(|window| window == b"hunter2"), "{}", String::from_utf8_lossy(&left));
    let body = || {
        let limit = |resource| {
            let mut limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
            // SAFETY: `limit` is writable.
            assert_eq!(unsafe { libc::getrlimit(resource, &mut limit) }, 0);
            limit
        };
        assert_eq!(limit(libc::RLIMIT_CORE).rlim_max, 0);
        assert!(limit(libc::RLIMIT_DATA).rlim_max <= 8 << 30);
        let files = limit(libc::RLIMIT_NOFILE);
        assert_eq!(files.rlim_cur, files.rlim_max);
    };
    assert!(spawn(ThreadKind::Control, "control", body).expect("a thread").join().is_ok());
}

#[test]
fn no_environment_is_kept_and_limits_are_low() {
    fine("environment");
}

#[test]
fn the_documents_table_is_the_allow_list() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/jail.md");
    let text = fs::read_to_string(&page).unwrap_or_default();
    let (begin, end) = ("<!-- allow-list -->\n", "<!-- end -->\n");
    let (before, rest) = text.split_once(begin).expect("docs/jail.md has a place for the allow-list");
    let (there, after) = rest.split_once(end).expect("which ends");
    let table = super::table();
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&page, format!("{before}{begin}{table}{end}{after}")).expect("the page");
        return;
    }
    assert!(there == table, "docs/jail.md is out of date: UPDATE=1 cargo test -p outboard-jail writes it");
}
