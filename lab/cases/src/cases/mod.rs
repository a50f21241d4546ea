//! The cases, each with its two halves.

mod bench;
mod boot;
mod demo;
mod devices;
mod disk;
mod net;
mod power;

use crate::case::Case;

pub(crate) fn table() -> Vec<Case> {
    let groups = [
        demo::cases(),
        boot::cases(),
        devices::cases(),
        power::cases(),
        disk::cases(),
        net::cases(),
        bench::cases(),
    ];
    groups.into_iter().flatten().collect()
}
