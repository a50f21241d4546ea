//! A sound controller that fetches what is to be played by itself.

use super::{case, class, load, one_guest, positive, pressed};
use crate::case::Case;
use crate::guest::Guest;
use crate::guest::function::GuestFunction;
use crate::guest::pressure::{self, Hog};
use crate::guest::sound::{Playback, RATE};
use crate::host::{Host, Port};
use anyhow::{Result, ensure};

pub(super) const MODULES: [&str; 2] = ["snd_hda_codec_generic", "snd_hda_intel"];

pub(super) fn cases() -> Vec<Case> {
    vec![case(
        "passthrough-hda",
        "snd_hda_intel on the host's sound controller: playback advances, interrupts arrive",
        host,
        guest,
    )]
}

fn host(host: &Host) -> Result<Option<String>> {
    one_guest(
        host,
        &[Port::Sound],
        |spec| spec,
        |vm| {
            pressed(host, vm)?;
            positive(vm, "frames")?;
            positive(vm, "interrupts").map(drop)
        },
    )
}

fn guest(guest: &mut Guest) -> Result<()> {
    load(guest, &MODULES)?;
    let function = GuestFunction::the(class::HDA)?;
    function.wait_driver("snd_hda_intel")?;
    if pressure::wanted(guest)? {
        let hog = Hog::start(&function, pressure::ROOM)?;
        // It may find no memory, and says so.
        let errors = (0..3).filter(|_| exercise(&function).is_err()).count();
        hog.end(guest, errors as u64)?;
        pressure::rebind(&function, "snd_hda_intel")?;
    }
    let (frames, interrupts) = exercise(&function)?;
    guest.note("frames", frames);
    guest.note("interrupts", interrupts);
    Ok(())
}

/// Plays for a second: how many frames the controller fetched, and how many interrupts came meanwhile.
pub(super) fn exercise(function: &GuestFunction) -> Result<(u64, u64)> {
    let playback = Playback::open(function.sound_card()?)?;
    let interrupts = function.interrupt_count()?;
    playback.play(RATE / 2)?;
    let half = playback.position()?;
    playback.play(RATE / 2)?;
    let end = playback.position()?;
    ensure!(half > 0 && end > half, "playback does not advance: {half} frames, then {end}");
    Ok((end, function.interrupt_count()? - interrupts))
}
