//! Real PCI devices of the emulated host in the guest, driven by stock drivers, behind the SMMU.
//!
//! Every case works with any [`Dma`]: which, its name says.

mod abuse;
mod bench;
mod errors;
mod io_ports;
pub(in crate::cases) mod network;
mod reboot;
mod removal;
mod rtx5090;
mod several;
mod sound;
mod storage;

use crate::case::{Case, Group, GuestHalf, HOST_OF_DMA, HostHalf};
use crate::guest::Guest;
use crate::host::{Assigned, Dma, GuestSpec, Host, Kernel, Port, RunningVm};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

const STEP: Duration = Duration::from_secs(400);

/// PCI classes of what guests get.
pub(in crate::cases) mod class {
    pub(in crate::cases) const NVME: u32 = 0x01_0802;
    pub(in crate::cases) const AHCI: u32 = 0x01_0601;
    pub(in crate::cases) const ETHERNET: u32 = 0x02_0000;
    pub(in crate::cases) const XHCI: u32 = 0x0c_0330;
    pub(in crate::cases) const HDA: u32 = 0x04_0300;
}

pub(super) fn cases() -> Vec<Case> {
    let groups = [
        storage::cases(),
        network::cases(),
        io_ports::cases(),
        sound::cases(),
        several::cases(),
        reboot::cases(),
        rtx5090::cases(),
        errors::cases(),
        abuse::cases(),
        removal::cases(),
        bench::cases(),
    ];
    groups.into_iter().flatten().collect()
}

fn case(name: &'static str, about: &'static str, host: HostHalf, guest: GuestHalf) -> Case {
    Case { name, about, limit_s: 600, host_kernel: HOST_OF_DMA, group: Group::Test, host, guest }
}

/// A guest with the devices of `assigned`.
fn guest_with(host: &Host, assigned: &Assigned) -> GuestSpec {
    host.guest(Kernel::V6_12).devices(assigned)
}

/// Runs one guest with what is behind `ports` to its end: `check` looks at its notes meanwhile.
fn one_guest(
    host: &Host,
    ports: &[Port],
    describe: impl FnOnce(GuestSpec) -> GuestSpec,
    check: impl FnOnce(&mut RunningVm) -> Result<()>,
) -> Result<Option<String>> {
    if ports.contains(&Port::Network) {
        // The other end of the wire. Its driver has the IOMMU map the interrupt doorbell, in page tables that stay: they are there before
        // what the IOMMU holds is first looked at.
        host.need("virtio_net")?;
    }
    let assigned = Assigned::bind(ports)?;
    let mut vm = host.start(&describe(guest_with(host, &assigned)))?;
    check(&mut vm)?;
    vm.finish(STEP)?;
    assigned.release()?;
    Ok(None)
}

/// In the tight lane: what the guest says of the time without room.
fn pressed(host: &Host, vm: &mut RunningVm) -> Result<()> {
    if Dma::of(host.case()) == Dma::Tight {
        host.log(format!("without room: {}", vm.note("pressure", STEP)?));
    }
    Ok(())
}

/// A note that is a number above 0.
fn positive(vm: &mut RunningVm, key: &str) -> Result<u64> {
    let value = vm.note(key, STEP)?.as_u64().with_context(|| format!("'{key}' is a number"))?;
    ensure!(value > 0, "{key}: 0");
    Ok(value)
}

/// Loads `modules` in the guest.
fn load(guest: &mut Guest, modules: &[&str]) -> Result<()> {
    modules.iter().try_for_each(|module| guest.need(module))
}
