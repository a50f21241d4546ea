//! The program itself, as users call it: what it prints, where that goes, and its exit status. Nothing here needs a virtual machine.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Most time for a command. Only a hang takes as long.
const LIMIT: Duration = Duration::from_secs(120);

const OK: i32 = 0;
const CANNOT: i32 = 1;
const USAGE: i32 = 2;

/// A folder with a kernel that `--dry-run` takes, and nothing else.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        fs::write(place.path("Image"), image()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn outboard(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
        // Its sockets belong here.
        command
            .env("XDG_RUNTIME_DIR", self.folder.path())
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        command
    }

    fn dry_run(&self, args: &[&str]) -> Command {
        let mut command = self.outboard();
        command.args(["run", "--dry-run", "--headless", "--kernel", "Image"]).args(args);
        command
    }

    /// Names of what is in the folder.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        // The folder for control sockets stays.
        names.retain(|name| name != "outboard");
        names.sort();
        names
    }
}

/// The header of an arm64 kernel (Linux Documentation/arch/arm64/booting.rst) and nothing behind it.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; 64 << 10];
    bytes[16..24].copy_from_slice(&(64_u64 << 10).to_le_bytes());
    bytes[24..32].copy_from_slice(&0xa_u64.to_le_bytes());
    bytes[56..60].copy_from_slice(b"ARM\x64");
    bytes
}

/// Waits for the end; a hang fails the test.
fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert_eq!(status.signal(), None, "ended by a signal");
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn output(command: &mut Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait(&mut child);
    child.wait_with_output().unwrap()
}

/// Runs `command`, which must end with `status` and say all of `says` on standard error.
fn expect(command: &mut Command, status: i32, says: &[&str]) -> String {
    let output = output(command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{command:?} said: {said}");
    for text in says {
        assert!(said.contains(text), "{command:?} does not say '{text}': {said}");
    }
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn full() -> Option<File> {
    File::options().write(true).open("/dev/full").ok()
}

/// A pipe whose reader has gone.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn a_dry_run_shows_what_would_be_built_and_leaves_nothing_behind() {
    let place = Place::new();
    fs::write(place.path("console.log"), "the last guest").unwrap();
    fs::write(place.path("disk.raw"), [0; 4096]).unwrap();
    let before = place.files();
    let plan = expect(
        &mut place.dry_run(&[
            "--disk=disk.raw",
            "--console=file:console.log",
            "--virtio-console=file:new.log",
            "--vsock=socket=v.sock",
            "--net=user,forward=0:22",
            "--device=simulated:rtx5090",
        ]),
        OK,
        &[],
    );
    for text in ["512 MiB", "disk.raw", "vsock", "network", "a simulated device", "file:console.log"] {
        assert!(plan.contains(text), "{text}: {plan}");
    }
    assert_eq!(place.files(), before);
    assert_eq!(fs::read(place.path("console.log")).unwrap(), b"the last guest");
}

#[test]
fn a_reader_of_results_that_is_gone_ends_nothing_badly() {
    let place = Place::new();
    let trace = place.path("x.trace");
    fs::write(&trace, "m 1 1 100000:1000\nu 2 1\n").unwrap();
    let commands: [&mut dyn FnMut() -> Command; 5] = [
        &mut || place.dry_run(&[]),
        &mut || {
            let mut command = place.outboard();
            command.arg("devices");
            command
        },
        &mut || {
            let mut command = place.outboard();
            command.arg("status");
            command
        },
        &mut || {
            let mut command = place.outboard();
            command.arg("fit").arg(&trace);
            command
        },
        &mut || {
            let mut command = place.outboard();
            command.arg("--help");
            command
        },
    ];
    for make in commands {
        let mut command = make();
        let mut child = command.stdout(closed()).stderr(Stdio::piped()).spawn().unwrap();
        let status = wait(&mut child);
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(matches!(status.code(), Some(OK | CANNOT)), "{command:?}: {status}");
        assert!(!said.contains("write") && !said.contains("panic"), "{command:?}: {said}");
    }
}

#[test]
fn results_that_cannot_be_written_are_a_failure_with_its_reason() {
    let place = Place::new();
    let Some(disk) = full() else { return };
    let mut command = place.dry_run(&[]);
    let mut child = command.stdout(disk).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(wait(&mut child).code(), Some(CANNOT));
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("cannot write the results: No space left"), "{said}");
}

#[test]
fn messages_that_cannot_be_written_change_no_status() {
    let place = Place::new();
    let mut all: Vec<Stdio> = vec![closed()];
    all.extend(full().map(Stdio::from));
    for stderr in all {
        let mut command = place.outboard();
        command.args(["run", "--kernel", "missing"]);
        let mut child = command.stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        assert_eq!(wait(&mut child).code(), Some(CANNOT));
    }
    if let Some(disk) = full() {
        let mut child = place.outboard().arg("nonsense").stdout(Stdio::null()).stderr(disk).spawn().unwrap();
        assert_eq!(wait(&mut child).code(), Some(USAGE));
    }
    // Closed altogether.
    let shell = format!("exec {} run --kernel missing 2>&-", env!("CARGO_BIN_EXE_outboard"));
    let mut child = Command::new("sh").args(["-c", &shell]).spawn().unwrap();
    assert_eq!(wait(&mut child).code(), Some(CANNOT));
}

#[test]
fn a_reader_of_messages_that_stops_keeps_nothing_from_ending() {
    let place = Place::new();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let pipe = writer.try_clone().unwrap();
    // Ends only when the reader goes: the pipe is full from here on.
    let filler = std::thread::spawn(move || writer.write_all(&[b'x'; 1 << 20]));
    std::thread::sleep(Duration::from_millis(500));
    for (args, status) in
        [(&["run", "--log-level=trace", "--kernel", "missing"][..], CANNOT), (&["nonsense"], USAGE)]
    {
        let mut command = place.outboard();
        let stderr = pipe.try_clone().unwrap();
        let mut child = command.args(args).stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        assert_eq!(wait(&mut child).code(), Some(status));
    }
    drop((reader, pipe));
    let _ = filler.join();
}

#[test]
fn a_log_file_takes_the_log_and_keeps_what_it_had() {
    let place = Place::new();
    fs::write(place.path("log"), "before\n").unwrap();
    let mut command = place.outboard();
    command.args(["run", "--log-level=debug", "--log-file=log", "--dry-run", "--kernel", "missing"]);
    expect(&mut command, CANNOT, &["missing", "check the path"]);
    let log = fs::read_to_string(place.path("log")).unwrap();
    assert!(log.starts_with("before\n") && log.contains("ERROR") && log.contains("missing"), "{log}");
    expect(
        place.outboard().args(["status", "--log-file=missing/log"]),
        CANNOT,
        &["missing/log", "No such file"],
    );
    expect(place.outboard().args(["status", "--log-file=log,limit=512iB"]), USAGE, &["'iB' is no unit"]);
    // Not over a disk.
    fs::write(place.path("disk.raw"), [0; 4096]).unwrap();
    let twice = ["--log-level=debug", "--log-file=disk.raw", "--disk=disk.raw"];
    expect(&mut place.dry_run(&twice), USAGE, &["--disk", "--log-file", "a file of its own"]);
    assert_eq!(fs::read(place.path("disk.raw")).unwrap(), [0; 4096]);
}

/// All of these were found only by a real start, or not at all.
#[test]
fn a_dry_run_finds_what_a_start_would() {
    let place = Place::new();
    let large = File::create(place.path("initrd")).unwrap();
    large.set_len(100 << 20).unwrap();
    fs::write(place.path("disk.raw"), [0; 4096]).unwrap();
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let _used = UnixListener::bind(place.path("used.sock")).unwrap();
    let long = format!("socket:{}", place.text(&"x".repeat(120)));
    let before = place.files();
    let cannot = |args: &[&str], says: &[&str]| expect(&mut place.dry_run(args), CANNOT, says);
    cannot(&["--memory=64M", "--initrd=initrd"], &["initrd", "more --memory"]);
    cannot(&["--console=file:missing/x"], &["missing/x", "No such file"]);
    cannot(&["--console=file:disk.raw/x"], &["disk.raw/x", "Not a directory"]);
    cannot(&["--console=socket:missing/x"], &["missing/x", "No such file"]);
    cannot(&[&format!("--console={long}")], &["SUN_LEN"]);
    cannot(&["--virtio-console=file:missing/x"], &["missing/x"]);
    cannot(&["--vsock=socket=missing/x"], &["missing/x", "No such file"]);
    cannot(&[&format!("--vsock=socket={}", &long[7..])], &["path"]);
    cannot(&["--vsock=socket=used.sock"], &["used.sock", "in use"]);
    cannot(&[&format!("--net=user,forward={port}:22")], &["forward", "in use"]);
    let twice = ["--net=user,forward=24871:22", "--net=user,forward=24871:80"];
    expect(&mut place.dry_run(&twice), USAGE, &["forward", "same port of the host"]);
    cannot(&["--device=simulated:large-bar"], &["PCIe window"]);
    cannot(&["--memory=1048576G"], &["smaller --memory"]);
    assert_eq!(place.files(), before);
}

#[test]
fn a_dry_run_finds_a_control_socket_that_cannot_be() {
    let place = Place::new();
    // Others may enter it.
    fs::create_dir(place.path("outboard")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(place.path("outboard"), mode).unwrap();
    expect(&mut place.dry_run(&["--name=x"]), CANNOT, &["open to other users"]);
    let deep = place.path(&"d".repeat(100));
    fs::create_dir(&deep).unwrap();
    expect(place.dry_run(&["--name=x"]).env("XDG_RUNTIME_DIR", &deep), CANNOT, &["SUN_LEN"]);
}

#[test]
fn two_forwards_of_one_port_are_refused() {
    let place = Place::new();
    let output = output(&mut place.dry_run(&["--net=user,forward=24872:22,forward=24872:80"]));
    // Where it is found depends on who looks first; that it is found does not.
    assert!(matches!(output.status.code(), Some(CANNOT | USAGE)), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("24872"), "{output:?}");
}

#[test]
fn what_is_wrong_on_any_host_is_status_2() {
    let place = Place::new();
    fs::write(place.path("disk.raw"), [0; 4096]).unwrap();
    for args in [
        &["--cpus=0"][..],
        &["--cpus=33"],
        &["--cpus=-1"],
        &["--memory=0"],
        &["--memory=512iB"],
        &["--memory=512B"],
        &["--memory=+1G"],
        &["--memory=99999999999999T"],
        &["--memory=100K"],
        &["--memory="],
        &["--console=file:"],
        &["--console=file:x,limit=512iB"],
        &["--console=file:x,limit=1K"],
        &["--console=file:x", "--virtio-console=file:x"],
        &["--console=file:disk.raw", "--disk=disk.raw"],
        &["--console=file:Image"],
        &["--console=stdio", "--virtio-console=stdio"],
        &["--vsock=cid=1,socket=x"],
        &["--device=zz:00"],
        &["--device=01:00,dma=mac,limit-bytes=512iB"],
        &["--device=simulated:rtx5090", "--device=simulated:rtx5090"],
        &["--spare-ports=200"],
        &["--name=../x"],
        &["--log-level=loud"],
        &["--no-such-flag"],
    ] {
        expect(&mut place.dry_run(args), USAGE, &[]);
        assert_eq!(place.files(), ["Image", "disk.raw"], "{args:?}");
    }
    let long = format!("--append={}", "x".repeat(5000));
    expect(&mut place.dry_run(&[&long]), USAGE, &["shorten --append"]);
    for args in [
        &["fit", "--limit-bytes=512iB", "x"][..],
        &["fit", "--limit-bytes=0", "x"],
        &["fit"],
        &["record"],
        &["device", "remove", "nonsense"],
        &["device", "add", "01:00,dma=none"],
        &["status", "../x"],
        &["devices", "bind", "nonsense"],
        &["nonsense"],
        &[],
    ] {
        expect(place.outboard().args(args), USAGE, &[]);
    }
}

#[test]
fn errors_say_their_causes() {
    let place = Place::new();
    std::os::unix::fs::symlink("loop.raw", place.path("loop.raw")).unwrap();
    expect(&mut place.dry_run(&["--disk=loop.raw"]), CANNOT, &["loop.raw", "symbolic links"]);
    fs::write(place.path("file"), "x").unwrap();
    expect(&mut place.dry_run(&["--disk=file/disk.raw"]), CANNOT, &["file/disk.raw", "Not a directory"]);
    // Cut off after its header: the reason is in the cause.
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    fs::write(place.path("cut.qcow2"), header).unwrap();
    let output = output(&mut place.dry_run(&["--disk=cut.qcow2"]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(CANNOT));
    assert!(said.contains("cut.qcow2") && said.trim_end().contains(": "), "{said}");
}

/// Without root this ends earlier, with the file as untouched.
#[test]
fn a_recording_is_not_emptied_for_a_command_that_does_not_exist() {
    let place = Place::new();
    fs::write(place.path("x.trace"), "precious").unwrap();
    let output = output(place.outboard().args(["record", "-o", "x.trace", "--", "no-such-command"]));
    assert!(matches!(output.status.code(), Some(125 | 127)), "{output:?}");
    assert_eq!(fs::read(place.path("x.trace")).unwrap(), b"precious");
    let before = place.files();
    crate::output(place.outboard().args(["record", "-o", "new.trace", "--", "no-such-command"]));
    assert_eq!(place.files(), before);
}

#[test]
fn a_plot_replaces_a_file_only_when_it_is_whole() {
    let place = Place::new();
    fs::write(place.path("x.trace"), "m 1 1 100000:1000\nu 2 1\n").unwrap();
    fs::write(place.path("x.svg"), "precious").unwrap();
    expect(place.outboard().args(["fit", "--plot=x.svg", "missing.trace"]), CANNOT, &["missing.trace"]);
    assert_eq!(fs::read(place.path("x.svg")).unwrap(), b"precious");
    expect(place.outboard().args(["fit", "--plot=x.svg", "x.trace"]), OK, &[]);
    assert!(fs::read_to_string(place.path("x.svg")).unwrap().starts_with("<svg"));
}
