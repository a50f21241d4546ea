//! Entropy, and the formats a kernel may come in.

use crate::case::{Case, Group, HOST};
use crate::guest::{Guest, wait_for};
use crate::host::{Host, Kernel, SHARE};
use anyhow::{Result, ensure};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(120);

pub(super) fn cases() -> Vec<Case> {
    let format = |name, about, host| Case {
        name,
        about,
        limit_s: 300,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest: |_| Ok(()),
    };
    vec![
        Case {
            name: "entropy",
            about: "virtio-rng gives random bytes",
            limit_s: 300,
            host_kernel: HOST,
            group: Group::Test,
            host: |host| {
                host.start(&host.guest(Kernel::V6_12))?.finish(STEP)?;
                Ok(None)
            },
            guest: entropy_guest,
        },
        format("image-gzip", "a gzip-compressed Image boots", |host| boots(host, "image-gzip")),
        format("zboot-gzip", "an EFI zboot image with a gzip payload boots", |host| {
            boots(host, "zboot-gzip")
        }),
        format("zboot-zstd", "an EFI zboot image with a zstd payload boots", |host| {
            boots(host, "zboot-zstd")
        }),
    ]
}

fn boots(host: &Host, format: &str) -> Result<Option<String>> {
    // The images are made from this kernel's flat one.
    let mut spec = host.guest(Kernel::V6_12Cloud);
    spec.kernel = Path::new(SHARE).join("boot").join(format);
    host.start(&spec)?.finish(STEP)?;
    Ok(None)
}

fn entropy_guest(guest: &mut Guest) -> Result<()> {
    guest.need("virtio_rng")?;
    // The driver offers itself a moment after its module is there.
    wait_for("entropy from virtio_rng", Duration::from_secs(20), || {
        let current = fs::read_to_string("/sys/class/misc/hw_random/rng_current").ok()?;
        current.starts_with("virtio_rng").then_some(())
    })?;
    let mut bytes = vec![0; 32 << 10];
    File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
    // 32 KiB of random bytes: each value about 128 times. A bound that chance passes more often than 1 in 10^9.
    let mut counts = [0_u32; 256];
    bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    let odd = counts.iter().position(|count| !(40..=240).contains(count));
    ensure!(odd.is_none(), "byte {odd:?} is too rare or too frequent: {counts:?}");
    ensure!(bytes[..BLOCK] != bytes[BLOCK..2 * BLOCK], "the same bytes came twice");
    Ok(())
}

/// Bytes compared with the next as many.
const BLOCK: usize = 4096;
