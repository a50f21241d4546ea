//! Several functions of one slot, and several slots.

use super::network::{both_ways, guest_end};
use super::storage::{exercise_disk, wanted_sum};
use super::{STEP, case, class, load, one_guest, positive, sound};
use crate::case::Case;
use crate::guest::Guest;
use crate::guest::function::GuestFunction;
use crate::host::{Host, Port};
use anyhow::{Result, ensure};
use std::thread;

/// Bytes each way while the disk works, too.
const LEN: u64 = 16 << 20;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            "passthrough-multifunction",
            "two functions of one slot, under the same numbers, at work at the same time",
            slot_host,
            slot_guest,
        ),
        case(
            "passthrough-two-devices",
            "an NVMe disk and a network card at once, at work at the same time",
            two_host,
            two_guest,
        ),
    ]
}

fn slot_host(host: &Host) -> Result<Option<String>> {
    one_guest(
        host,
        &[Port::Several],
        |spec| spec.cpus(2),
        |vm| {
            let sum = vm.note("sha256", STEP)?;
            ensure!(sum == wanted_sum().as_str(), "the guest read data with checksum {sum}");
            positive(vm, "frames")?;
            positive(vm, "disk-interrupts")?;
            positive(vm, "sound-interrupts").map(drop)
        },
    )
}

fn slot_guest(guest: &mut Guest) -> Result<()> {
    load(guest, &["ahci", "sd_mod"])?;
    load(guest, &sound::MODULES)?;
    let (disk, card) = (GuestFunction::the(class::AHCI)?, GuestFunction::the(class::HDA)?);
    // As on the emulated host: xtask puts SATA at function 0 and sound at 1.
    ensure!(disk.number()? == 0 && card.number()? == 1, "the functions are {disk:?} and {card:?}");
    let slot = |function: &GuestFunction| function.address.rsplit_once('.').map(|(slot, _)| slot.to_owned());
    ensure!(slot(&disk) == slot(&card), "{disk:?} and {card:?} are in different slots");
    disk.wait_driver("ahci")?;
    card.wait_driver("snd_hda_intel")?;
    let (sum, played) = thread::scope(|scope| {
        let played = scope.spawn(|| sound::exercise(&card));
        (exercise_disk(&disk), played.join().expect("no panic"))
    });
    guest.note("sha256", sum?);
    let (frames, interrupts) = played?;
    guest.note("frames", frames);
    guest.note("disk-interrupts", disk.interrupt_count()?);
    guest.note("sound-interrupts", interrupts);
    Ok(())
}

fn two_host(host: &Host) -> Result<Option<String>> {
    one_guest(
        host,
        &[Port::Nvme, Port::Network],
        |spec| spec.cpus(2).arg("len", LEN),
        |vm| {
            both_ways(host, vm, LEN)?;
            let sum = vm.note("sha256", STEP)?;
            ensure!(sum == wanted_sum().as_str(), "the guest read data with checksum {sum}");
            Ok(())
        },
    )
}

fn two_guest(guest: &mut Guest) -> Result<()> {
    load(guest, &["nvme", "e1000e"])?;
    let (disk, card) = (GuestFunction::the(class::NVME)?, GuestFunction::the(class::ETHERNET)?);
    disk.wait_driver("nvme")?;
    card.wait_driver("e1000e")?;
    let sum = thread::scope(|scope| {
        let sum = scope.spawn(|| exercise_disk(&disk));
        guest_end(guest, &card)?;
        sum.join().expect("no panic")
    })?;
    guest.note("sha256", sum);
    Ok(())
}
