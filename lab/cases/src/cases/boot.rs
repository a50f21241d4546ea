//! Kernels, vCPUs, memory sizes; how a guest ends.

use crate::case::{Case, Group, HOST};
use crate::guest::Guest;
use crate::host::{Host, Kernel};
use anyhow::{Result, bail};
use std::time::Duration;

const STEP: Duration = Duration::from_secs(120);

pub(super) fn cases() -> Vec<Case> {
    let boot = |name, about, host| Case {
        name,
        about,
        limit_s: 600,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest: report,
    };
    vec![
        boot("boot-6.1", "Debian's kernel 6.1 with 1, 2 and 4 vCPUs, 256 MiB and 2 GiB", |host| {
            matrix(host, Kernel::V6_1, &[(1, 256), (4, 2048)])
        }),
        boot("boot-6.1-cloud", "Debian's cloud kernel 6.1", |host| {
            matrix(host, Kernel::V6_1Cloud, &[(1, 2048), (2, 256)])
        }),
        boot("boot-6.12", "Debian's kernel 6.12", |host| matrix(host, Kernel::V6_12, &[(2, 2048), (4, 256)])),
        boot("boot-6.12-cloud", "Debian's cloud kernel 6.12", |host| {
            matrix(host, Kernel::V6_12Cloud, &[(1, 256), (4, 2048)])
        }),
    ]
}

/// Boots once for each (vCPUs, MiB): the four cases together have every value of each with both generations.
fn matrix(host: &Host, kernel: Kernel, shapes: &[(u32, u64)]) -> Result<Option<String>> {
    for (cpus, memory) in shapes {
        host.part(format!("{cpus}cpu-{memory}M"), boot_once(host, kernel, *cpus, *memory));
    }
    Ok(None)
}

fn boot_once(host: &Host, kernel: Kernel, cpus: u32, memory: u64) -> Result<()> {
    let mut vm = host.start(&host.guest(kernel).cpus(cpus).memory_mib(memory))?;
    let release = vm.note("release", STEP)?;
    let (version, cloud) = kernel.name().split_once('-').map_or((kernel.name(), false), |(v, _)| (v, true));
    let text = release.as_str().unwrap_or_default();
    if !text.starts_with(&format!("{version}.")) || text.contains("cloud") != cloud {
        bail!("a guest with kernel {} says that it runs {release}", kernel.name());
    }
    let seen = vm.note("cpus", STEP)?;
    if seen != cpus {
        bail!("a guest with {cpus} vCPUs sees {seen}");
    }
    // The kernel keeps some for itself: its image, page structures, the initramfs.
    let total = vm.note("memory_mib", STEP)?.as_u64().unwrap_or(0);
    if total > memory || total < memory * 8 / 10 - 40 {
        bail!("a guest with {memory} MiB sees {total} MiB");
    }
    vm.finish(STEP)
}

fn report(guest: &mut Guest) -> Result<()> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    guest.note("release", release.trim());
    guest.note("cpus", std::thread::available_parallelism()?.get());
    let memory = std::fs::read_to_string("/proc/meminfo")?;
    let kib = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok());
    guest.note("memory_mib", kib.map_or(0, |kib| kib >> 10));
    Ok(())
}
