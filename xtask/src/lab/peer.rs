//! The peer: the distribution's QEMU for arm64, to compare with and to develop against.

use super::libraries::{self, LOADER};
use crate::paths::Paths;
use crate::stamp;
use anyhow::Result;

/// Programs of the peer that the lab runs.
const PROGRAMS: [&str; 2] = ["qemu-system-aarch64", "qemu-img"];
const PACKAGES: [&str; 2] = ["qemu-system-arm", "qemu-utils"];

/// Puts the programs and the libraries they need into the share.
pub fn prepare(paths: &Paths) -> Result<()> {
    let share = paths.share().join("peer");
    let inputs = format!("{PACKAGES:?} {PROGRAMS:?}");
    stamp::once(paths, "peer", &inputs, &[&share.join(LOADER)], || {
        libraries::fetch(paths, &PACKAGES, &PROGRAMS, &share)
    })?;
    Ok(())
}
