//! What a hostile guest can do to the host's functions that it has. The monitor, the other devices and the host come through.
//!
//! Every function is abused once, while another device of the same guest (the witness) writes and verifies data all the time. Then a new
//! process with all the devices shows that they work. Faults that the SMMU reports meanwhile are allowed to abused functions alone, and only
//! at addresses that are no guest memory: all of that is mapped as long as a device may do DMA, so a fault there is Outboard's.

mod attacks;
mod witness;

use super::{case, class, guest_with, load, sound, storage};
use crate::case::Case;
use crate::guest::Guest;
use crate::guest::function::GuestFunction;
use crate::host::{Assigned, ExitKind, Host, Port, SmmuFault};
use anyhow::{Context, Result, anyhow, ensure};
use attacks::{ATTACKS, TRAFFIC_ATTACKS, Victim};
use nix::sys::signal::Signal;
use serde_json::json;
use std::ops::Range;
use std::time::Duration;
use witness::Witness;

/// Most time for all attacks on one function: an emulated reset of a conventional device takes seconds.
const LIMIT: Duration = Duration::from_secs(240);
const MEMORY_MIB: u64 = 512;
/// Guest memory, as bus addresses.
const RAM: Range<u64> = 0x4000_0000..0x4000_0000 + (MEMORY_MIB << 20);
/// Where the NVMe disk is told to write though no guest memory is there.
const STRAY: u64 = 0x1_2345_0000;
/// What the guest has.
const PORTS: [Port; 6] = [Port::Nvme, Port::Network, Port::Usb, Port::Sata, Port::Sound, Port::Several];

pub(super) fn cases() -> Vec<Case> {
    let mut case = case(
        "passthrough-abuse",
        "every config byte, BARs on top of others, MSI-X rubbish, decoding and resets during traffic",
        host,
        guest,
    );
    case.limit_s = 1800;
    vec![case]
}

fn host(host: &Host) -> Result<Option<String>> {
    // Each function is a victim once: all but the NVMe disk, then that one.
    abuse(host, Port::Nvme, &["--device", "simulated:endpoint", "--device", "simulated:rtx5090"])?;
    abuse(host, Port::Sata, &[])?;
    let assigned = Assigned::bind(&PORTS)?;
    let mut vm = host.start(&guest_with(host, &assigned).memory_mib(MEMORY_MIB).arg("stage", "verify"))?;
    collect(host, &mut vm)?;
    vm.finish(LIMIT)?;
    assigned.release()?;
    Ok(None)
}

/// One guest that abuses what is not behind `witness`, or with the NVMe disk as the only victim.
fn abuse(host: &Host, witness: Port, simulated: &[&str]) -> Result<()> {
    let ports: &[Port] = if witness == Port::Nvme { &PORTS } else { &[Port::Nvme, Port::Sata] };
    let assigned = Assigned::bind(ports)?;
    let safe = streams(&witness.functions()?)?;
    let class = if witness == Port::Nvme { class::NVME } else { class::AHCI };
    let spec = guest_with(host, &assigned)
        .cpus(2)
        .memory_mib(MEMORY_MIB)
        .arg("stage", "abuse")
        .arg("witness", class)
        .extra(simulated);
    let mut vm = host.start(&spec)?;
    collect(host, &mut vm)?;
    ensure!(vm.try_exit()?.is_none(), "the monitor has ended: {}", vm.stderr());
    // The guest's drivers may hang in devices that do not answer: it is stopped from outside, in the middle of it all.
    vm.signal(Signal::SIGTERM)?;
    std::thread::sleep(Duration::from_secs(1));
    vm.signal(Signal::SIGTERM)?;
    let exit = vm.exit(Duration::from_secs(60))?;
    ensure!(exit == ExitKind::Code(4), "{exit:?} after the guest was stopped hard; {}", vm.stderr());
    let mut faults = Vec::new();
    assigned.release_with(|fault| {
        faults.push(fault.address);
        judge(fault, &safe)
    })?;
    // One was provoked: it must be among those that the kernel logs.
    let provoked = witness == Port::Nvme || faults.contains(&STRAY);
    ensure!(
        provoked,
        "the IOMMU let a write to {STRAY:#x} through, or its log is not understood: {faults:x?}"
    );
    host.log(format!("{} IOMMU faults, all of abused functions and outside of guest memory", faults.len()));
    Ok(())
}

/// Whether an abused function can have caused a fault by itself.
fn judge(fault: &SmmuFault, safe: &[u32]) -> Result<()> {
    ensure!(!safe.contains(&fault.stream), "a device that was not abused met a fault: {fault:x?}");
    ensure!(!RAM.contains(&fault.address), "guest memory was not mapped for DMA: {fault:x?}");
    Ok(())
}

/// Requester IDs.
fn streams(functions: &[String]) -> Result<Vec<u32>> {
    let stream = |address: &String| {
        let (_, rest) = address.split_once(':')?;
        let (bus, rest) = rest.split_once(':')?;
        let (device, function) = rest.split_once('.')?;
        let hex = |text: &str| u32::from_str_radix(text, 16).ok();
        Some(hex(bus)? << 8 | hex(device)? << 3 | hex(function)?)
    };
    functions
        .iter()
        .map(|address| stream(address).with_context(|| format!("{address} is no address")))
        .collect()
}

/// Reports the guest's parts until there are no more.
fn collect(host: &Host, vm: &mut crate::host::RunningVm) -> Result<()> {
    loop {
        let part = vm.note("part", LIMIT)?;
        let Some(name) = part["name"].as_str() else { return Ok(()) };
        host.part(name, part["fault"].as_str().map_or(Ok(()), |fault| Err(anyhow!("{fault}"))));
    }
}

fn guest(guest: &mut Guest) -> Result<()> {
    if guest.arg("stage")? == "verify" {
        verify(guest)?
    } else {
        attack(guest)?
    }
    guest.note("part", json!({}));
    if guest.arg("stage")? == "abuse" {
        // Stopped from outside.
        std::thread::sleep(Duration::from_secs(600));
    }
    Ok(())
}

fn part(guest: &Guest, name: &str, result: Result<()>) {
    let fault = result.err().map(|error| format!("{error:#}"));
    guest.note("part", json!({ "name": name, "fault": fault }));
}

fn attack(guest: &mut Guest) -> Result<()> {
    let class = u32::try_from(guest.number("witness")?)?;
    load(guest, if class == class::NVME { &["nvme"] } else { &["ahci", "sd_mod"] })?;
    let function = GuestFunction::of_class(class)?.into_iter().next().context("the guest has no witness")?;
    let witness = Witness::start(&function.disk()?)?;
    let others = GuestFunction::behind_ports()?;
    let victims = others.iter().filter(|other| other.address != function.address);
    let victims = victims.map(Victim::new).collect::<Result<Vec<_>>>()?;
    for victim in &victims {
        let result = ATTACKS.iter().try_for_each(|(name, attack)| {
            let before = witness.rounds();
            let result = attack(victim, &witness).and_then(|()| victim.reset_slot());
            result
                .and_then(|()| victims.iter().try_for_each(Victim::restore))
                .and_then(|()| witness.wait_round(before))
                .with_context(|| (*name).to_owned())
        });
        part(guest, &victim.name, result);
    }
    load(guest, &["nvme", "e1000e", "xhci_pci", "usb_storage", "sd_mod", "ahci"])?;
    load(guest, &sound::MODULES)?;
    // All of it first: what resets one function resets its siblings.
    let started = victims.iter().map(|victim| (victim, victim.start_traffic())).collect::<Vec<_>>();
    std::thread::sleep(Duration::from_millis(500));
    for (victim, started) in started {
        let result = started.and_then(|started| {
            TRAFFIC_ATTACKS.iter().filter(|_| started).try_for_each(|(name, attack)| {
                let before = witness.rounds();
                let result = attack(victim, &witness);
                result.and_then(|()| witness.wait_round(before)).with_context(|| (*name).to_owned())
            })
        });
        part(guest, &format!("{}/traffic", victim.name), result);
    }
    witness.end()
}

/// All devices at work, after all that.
fn verify(guest: &mut Guest) -> Result<()> {
    load(guest, &["nvme", "e1000e", "xhci_pci", "usb_storage", "sd_mod", "ahci"])?;
    load(guest, &sound::MODULES)?;
    for (name, class) in [("nvme", class::NVME), ("sata", class::AHCI), ("usb", class::XHCI)] {
        for (index, function) in GuestFunction::of_class(class)?.iter().enumerate() {
            let result = storage::exercise_disk(function).and_then(|sum| {
                ensure!(sum == storage::wanted_sum(), "data was read with checksum {sum}");
                Ok(())
            });
            part(guest, &format!("after/{name}-{index}"), result);
        }
    }
    for (index, function) in GuestFunction::of_class(class::HDA)?.iter().enumerate() {
        let result = sound::exercise(function).and_then(|(_, interrupts)| {
            ensure!(interrupts > 0, "no interrupt of the sound controller arrived");
            Ok(())
        });
        part(guest, &format!("after/sound-{index}"), result);
    }
    let card = GuestFunction::the(class::ETHERNET)?;
    part(guest, "after/network", super::network::up(&card).map(drop));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_judged_by_device_and_address() {
        let safe = streams(&["0000:01:00.0".into(), "0000:06:00.1".into()]).expect("addresses");
        assert_eq!(safe, [0x100, 0x601]);
        let fault = |stream, address| judge(&SmmuFault { event: 0x10, stream, address }, &safe).is_ok();
        assert!(fault(0x200, 0x1000));
        assert!(!fault(0x100, 0x1000), "the witness");
        assert!(!fault(0x200, RAM.start), "guest memory");
        assert!(fault(0x200, RAM.end));
    }
}
