//! A guest's init: runs the guest half that the kernel's command line names, reports, switches off.

use crate::mounts;
use anyhow::{Context, Result};
use lab_cases::guest::{Guest, dma, say};
use lab_cases::protocol::GuestLine;
use nix::time::{ClockId, clock_gettime};

/// The first line of init.
pub fn announce() {
    let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let (s, ns) = (time.tv_sec().unsigned_abs(), time.tv_nsec().unsigned_abs());
        s * 1000 + ns / 1_000_000
    });
    say(&GuestLine::Init { uptime_ms: uptime });
}

/// Runs the guest half and switches off.
pub fn init(cmdline: &str) -> Result<()> {
    let mut guest = Guest::new(cmdline);
    let result = run_half(&mut guest);
    say(&GuestLine::Done(result.err().map(|error| format!("{error:#}"))));
    mounts::power_off()
}

fn run_half(guest: &mut Guest) -> Result<()> {
    let name = guest.arg("case")?;
    let case = lab_cases::find(name).with_context(|| format!("no case is called '{name}'"))?;
    dma::before(guest)?;
    (case.guest)(guest)?;
    dma::after(guest)
}
