//! What `cargo xtask lab` shows, and its shell.

use crate::case::{Case, Group, HOST};
use crate::data::Pattern;
use crate::guest::disk::GuestDisk;
use crate::guest::{Guest, load_module, net};
use crate::host::{Disk, ExitKind, Host, Kernel, web_server};
use crate::protocol::Command as FromXtask;
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::io::BufRead;
use std::net::Ipv4Addr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_secs(120);
const DISK_MIB: u64 = 32;
const DOWNLOAD: u64 = 8 << 20;
const SEED: u64 = 2;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "demo",
            about: "boot a guest, then its CPUs, a disk with checksum, the network (DHCP and a download)",
            limit_s: 300,
            host_kernel: HOST,
            group: Group::Tool,
            host: demo_host,
            guest: demo_guest,
        },
        Case {
            name: "shell",
            about: "a shell in the guest, on your terminal",
            limit_s: 24 * 3600,
            host_kernel: HOST,
            group: Group::Tool,
            host: shell_host,
            guest: shell_guest,
        },
    ]
}

fn demo_host(host: &Host) -> Result<Option<String>> {
    let disk = host.raw_image("demo.raw", DISK_MIB)?;
    let port = web_server(Ipv4Addr::LOCALHOST, 0)?.port();
    let kernel = Kernel::V6_12;
    let spec = host.guest(kernel).cpus(2).disk(Disk::raw(disk)).net().arg("port", port);
    let mut vm = host.start(&spec)?;
    let (to_init, uptime) = vm.init()?;
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    host.send(&crate::protocol::Event::Phase {
        name: "monitor and early kernel".into(),
        ms: millis(to_init.saturating_sub(uptime)),
    });
    host.send(&crate::protocol::Event::Phase { name: "guest kernel".into(), ms: millis(uptime) });
    let mut step = Instant::now();
    for (key, phase) in [("cpu", "guest CPUs"), ("disk", "guest disk"), ("net", "guest network")] {
        let value = vm.note(key, STEP).with_context(|| format!("phase '{phase}'"))?;
        host.phase(phase, step);
        host.fact(key, value);
        step = Instant::now();
    }
    let sum = vm.note("sha256", STEP)?;
    if sum != Pattern(SEED).sha256(DOWNLOAD).as_str() {
        bail!("the download's checksum is wrong: {sum}");
    }
    host.fact("guest", serde_json::json!({"kernel": vm.note("kernel", STEP)?, "cpus": 2, "memory_mib": 512}));
    vm.finish(STEP)?;
    host.phase("guest power-off", step);
    Ok(None)
}

fn demo_guest(guest: &mut Guest) -> Result<()> {
    let cpus = thread::available_parallelism()?.get();
    if cpus != 2 {
        bail!("the guest sees {cpus} CPUs, not 2");
    }
    let sums: Vec<String> = thread::scope(|scope| {
        let one = || {
            let mut buffer = vec![0; 4 << 20];
            Pattern(1).blocks(0, &mut buffer);
            crate::data::hex(&Sha256::digest(&buffer))
        };
        let threads: Vec<_> = (0..cpus).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|thread| thread.join().expect("the sum does not panic")).collect()
    });
    if sums[0] != sums[1] {
        bail!("two CPUs disagree about a checksum: {sums:?}");
    }
    guest.note("cpu", format!("{cpus} CPUs agree on a SHA-256 of 4 MiB ({}…)", &sums[0][..16]));

    let disk = GuestDisk::open(guest, "vda", true)?;
    let blocks = (DISK_MIB << 20) / 4096;
    disk.write_pattern(Pattern(SEED), 0, blocks)?;
    disk.flush()?;
    disk.check_pattern(Pattern(SEED), 0, blocks)?;
    guest.note("disk", format!("{DISK_MIB} MiB written to virtio-blk, flushed, read back, equal"));

    let lease = net::up(guest)?;
    let port = u16::try_from(guest.number("port")?)?;
    let sum = net::download(&lease.router, port, SEED, DOWNLOAD)?;
    guest.note("net", format!("DHCP gave {}, {} MiB downloaded", lease.address, DOWNLOAD >> 20));
    guest.note("sha256", sum);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    guest.note("kernel", release.trim());
    Ok(())
}

fn shell_host(host: &Host) -> Result<Option<String>> {
    let disk = host.raw_image("shell.raw", 1024)?;
    let port = web_server(Ipv4Addr::LOCALHOST, 0)?.port();
    host.stream_console();
    let spec = host.guest(Kernel::V6_12).cpus(2).disk(Disk::raw(disk)).net().arg("port", port);
    let mut vm = host.start(&spec)?;
    let (to_init, _) = vm.init()?;
    host.log(format!("the guest's init ran after {to_init:.1?}"));
    let (sender, input) = std::sync::mpsc::channel();
    thread::Builder::new().name("input".into()).spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if let Ok(FromXtask::Input(text)) = serde_json::from_str(&line)
                && sender.send(text).is_err()
            {
                break;
            }
        }
    })?;
    loop {
        while let Ok(text) = input.recv_timeout(Duration::from_millis(20)) {
            vm.type_text(&text)?;
        }
        if let Some(exit) = vm.try_exit()? {
            return match exit {
                ExitKind::Code(0) => Ok(None),
                other => bail!("the monitor ended with {other:?}: {}", vm.stderr()),
            };
        }
    }
}

fn shell_guest(guest: &mut Guest) -> Result<()> {
    for module in ["virtio_blk", "virtio_rng", "gpio_keys", "evdev"] {
        load_module(module)?;
    }
    match net::up(guest) {
        Ok(lease) => println!("eth0 has {}; the emulated host is {}.", lease.address, lease.router),
        Err(error) => println!("no network: {error:#}"),
    }
    println!("A shell in the guest. 'exit' or 'poweroff' switches it off, Ctrl-A x leaves at once.");
    // setsid and cttyhack: a session with the console as its terminal, so that Ctrl-C works.
    let status = Command::new("/bin/busybox")
        .args(["setsid", "-c", "/bin/busybox", "sh", "-l"])
        .env("PATH", "/bin:/sbin")
        .env("TERM", "vt100")
        .env("HOME", "/")
        .env("PS1", "guest# ")
        .status()?;
    println!("The shell ended with {status}.");
    Ok(())
}
