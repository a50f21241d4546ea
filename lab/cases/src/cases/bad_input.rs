//! What users get wrong: a clear message with the next step, a status that is not 0, nothing left behind.

use crate::case::{Case, Group, HOST};
use crate::host::{ExitKind, Host, Kernel, SHARE, WORK, outboard_path};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Most time until a refusal.
const LIMIT: Duration = Duration::from_secs(60);
/// A status of `outboard --help`: it could not run, the command line was wrong.
pub(super) const CANNOT: ExitKind = ExitKind::Code(1);
pub(super) const USAGE: ExitKind = ExitKind::Code(2);

/// A mistake: its name, what is put on the command line in place of something good, what the message must contain.
pub(super) struct Mistake {
    pub(super) name: &'static str,
    pub(super) args: Vec<String>,
    pub(super) status: ExitKind,
    pub(super) says: Vec<&'static str>,
}

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "bad-input",
        about: "every mistake on the command line: message, next step, status, nothing left behind",
        limit_s: 900,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest: |_| bail!("no mistake may boot a guest"),
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    for mistake in mistakes(host, taken.local_addr()?.port())? {
        host.part(mistake.name, try_it(&mistake));
    }
    host.part("no-kvm", without_kvm());
    Ok(None)
}

fn mistakes(host: &Host, taken: u16) -> Result<Vec<Mistake>> {
    let path = |name: &str| host.scratch(name).display().to_string();
    make_files(host)?;
    let zboot = make_corrupt_zboot(host)?;
    let mistake = |name, args: &[&str], says: &[&'static str]| Mistake {
        name,
        args: args.iter().map(|word| (*word).to_owned()).collect(),
        status: CANNOT,
        says: says.to_vec(),
    };
    let usage =
        |name, args: &[&str], says: &[&'static str]| Mistake { status: USAGE, ..mistake(name, args, says) };
    let forward = format!("user,forward=127.0.0.1:{taken}:22");
    let frozen = format!("{SHARE}/kernels/6.12/frozen.raw");
    let mut all = vec![
        mistake("kernel-missing", &["--kernel", &path("none")], &["none", "check the path"]),
        mistake("kernel-truncated", &["--kernel", &path("short")], &["short", "truncated"]),
        mistake("kernel-x86", &["--kernel", &path("bzImage")], &["bzImage", "x86", "arm64"]),
        mistake("zboot-corrupt", &["--kernel", &zboot], &["corrupt", "again"]),
        mistake("initrd-too-large", &["--initrd", &path("large")], &["initrd", "more --memory"]),
        usage("cpus-0", &["--cpus", "0"], &["--cpus", "from 1 to"]),
        usage("cpus-1000", &["--cpus", "1000"], &["1000", "from 1 to"]),
        mistake("memory-beyond-addresses", &["--memory", "8T"], &["smaller --memory"]),
        mistake("memory-beyond-host", &["--memory", "64G"], &["host", "smaller --memory"]),
        mistake("disk-missing", &["--disk", &path("none.raw")], &["none.raw", "check the path"]),
        mistake("disk-directory", &["--disk", WORK], &["directory", "name a file"]),
        mistake("disk-not-writable", &["--disk", &frozen], &["read-only", ":ro"]),
        mistake("qcow2-backing-missing", &["--disk", &path("orphan.qcow2")], &["backing", "rebase"]),
        mistake("qcow2-backing-cyclic", &["--disk", &path("a.qcow2")], &["backing", "rebase"]),
        usage(
            "device-twice",
            &["--device", "simulated:rtx5090", "--device", "simulated:rtx5090"],
            &["is given twice", "leave one --device out"],
        ),
        usage(
            "device-and-its-function",
            &["--device", "77:00", "--device", "77:00.1"],
            &["0000:77:00.1 is given twice", "leave one --device out"],
        ),
        mistake("port-in-use", &["--net", &forward], &["forward", "in use"]),
        usage("unknown-flag", &["--no-such-flag"], &["--no-such-flag", "--help"]),
        usage("memory-no-number", &["--memory", "lots"], &["lots", "--help"]),
    ];
    if !Path::new(&frozen).exists() {
        all.retain(|one| one.name != "disk-not-writable");
        host.part("disk-not-writable", Err(anyhow::anyhow!("the share has no {frozen}")));
    }
    Ok(all)
}

fn make_files(host: &Host) -> Result<()> {
    let kernel = fs::read(Kernel::V6_12.image())?;
    fs::write(host.scratch("short"), &kernel[..1 << 20])?;
    // A Linux x86 boot sector (Documentation/arch/x86/boot.rst): 0x55AA at 0x1FE, "HdrS" at 0x202.
    let mut x86 = vec![0_u8; 64 << 10];
    x86[..2].copy_from_slice(b"MZ");
    x86[0x1FE..0x200].copy_from_slice(&[0x55, 0xAA]);
    x86[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(host.scratch("bzImage"), x86)?;
    File::create(host.scratch("large"))?.set_len(300 << 20)?;
    let at = |name: &str| host.scratch(name).display().to_string();
    let (base, orphan) = (at("base.qcow2"), at("orphan.qcow2"));
    let create = |image: &str, backing: Option<&str>| {
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if let Some(backing) = backing {
            args.extend(["-F", "qcow2", "-b", backing]);
        }
        args.extend([image, "16M"]);
        host.qemu_img(&args)
    };
    create(&base, None)?;
    create(&orphan, Some(&base))?;
    fs::remove_file(&base)?;
    let (a, b) = (at("a.qcow2"), at("b.qcow2"));
    create(&a, None)?;
    create(&b, Some(&a))?;
    host.qemu_img(&["rebase", "-u", "-F", "qcow2", "-b", &b, &a])?;
    Ok(())
}

fn make_corrupt_zboot(host: &Host) -> Result<String> {
    let mut bytes = fs::read(Path::new(SHARE).join("boot/zboot-gzip"))?;
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64].fill(0xA5);
    let path = host.scratch("zboot");
    fs::write(&path, bytes)?;
    Ok(path.display().to_string())
}

pub(super) fn try_it(mistake: &Mistake) -> Result<()> {
    let before = left_behind()?;
    let mut command = Command::new(outboard_path());
    command.arg("run").arg("--headless");
    // What is not the mistake is good.
    let mut good = vec![
        ("--kernel", Kernel::V6_12.image().display().to_string()),
        ("--initrd", Kernel::V6_12.initrd().display().to_string()),
        ("--memory", "256M".to_owned()),
    ];
    good.retain(|(flag, _)| !mistake.args.iter().any(|word| word == flag));
    for (flag, value) in good {
        command.arg(flag).arg(value);
    }
    command.args(&mistake.args);
    let (exit, said) = run(&mut command)?;
    ensure!(exit == mistake.status, "{exit:?} instead of {:?}; it said: {said}", mistake.status);
    for wanted in &mistake.says {
        ensure!(said.contains(wanted), "the message does not have '{wanted}': {said}");
    }
    let after = left_behind()?;
    let new: Vec<&String> = after.difference(&before).collect();
    ensure!(new.is_empty(), "it left behind {new:?}");
    Ok(())
}

fn run(command: &mut Command) -> Result<(ExitKind, String)> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let deadline = Instant::now() + LIMIT;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("it ran instead of refusing");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Ok((ExitKind::Code(output.status.code().context("it was killed by a signal")?), said))
}

/// Files in the places where a program might leave some.
fn left_behind() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    // Where machines put their control sockets. The folder stays; what is in it must not.
    const CONTROL: &str = "/run/outboard";
    for folder in [WORK, "/tmp", "/run", CONTROL, "/dev", "/"] {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        for entry in entries {
            names.insert(entry?.path().display().to_string());
        }
    }
    names.remove(CONTROL);
    Ok(names)
}

fn without_kvm() -> Result<()> {
    fs::rename("/dev/kvm", "/dev/kvm-away").context("cannot move /dev/kvm away")?;
    let mistake = Mistake { name: "no-kvm", args: Vec::new(), status: CANNOT, says: vec!["/dev/kvm"] };
    let result = try_it(&mistake);
    fs::rename("/dev/kvm-away", "/dev/kvm").context("cannot move /dev/kvm back")?;
    result
}
