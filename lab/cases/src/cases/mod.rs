//! The cases, each with its two halves.

mod abuse;
mod bad_input;
mod bench;
mod boot;
mod demo;
mod devices;
mod disk;
mod dma;
mod dma_device;
mod host_pci;
mod hypervisor;
mod net;
mod outputs;
mod passthrough;
mod power;
mod quirks;
mod record;
mod terminal;
mod vsock;

use crate::case::Case;

pub(crate) fn table() -> Vec<Case> {
    let groups = [
        demo::cases(),
        hypervisor::cases(),
        host_pci::cases(),
        boot::cases(),
        power::cases(),
        terminal::cases(),
        outputs::cases(),
        devices::cases(),
        disk::cases(),
        net::cases(),
        vsock::cases(),
        passthrough::cases(),
        dma::cases(),
        dma_device::cases(),
        quirks::cases(),
        record::cases(),
        bad_input::cases(),
        abuse::cases(),
        bench::cases(),
    ];
    groups.into_iter().flatten().collect()
}
