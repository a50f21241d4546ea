//! PL031 real-time clock (Arm DDI 0224): tells the guest the host's time of day.
//!
//! No alarm interrupt is wired (Linux then offers no alarm); the match registers are kept for software that reads them back.

use crate::primecell;
use outboard_bus::{AccessError, MmioDevice, Width};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

const DR: u64 = 0x00;
const MR: u64 = 0x04;
const LR: u64 = 0x08;
const CR: u64 = 0x0c;
const IMSC: u64 = 0x10;
const RIS: u64 = 0x14;
const MIS: u64 = 0x18;
const ICR: u64 = 0x1c;

/// PeriphID0 to 3: part 0x031, designer 0x41 (Arm).
const PERIPH_ID: [u8; 4] = [0x31, 0x10, 0x04, 0x00];

/// The clock: seconds since 1970, UTC, 32 bits.
#[derive(Debug, Default)]
pub struct Pl031 {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the guest's load of LR added to the host's time, modulo 2^32.
    offset: u32,
    load: u32,
    matched: u32,
    mask: u32,
}

impl Pl031 {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self::default()
    }
}

/// The counter is 32 bits wide and wraps in 2106.
fn host_seconds() -> u32 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as u32)
}

impl MmioDevice for Pl031 {
    fn name(&self) -> &str {
        "pl031"
    }

    fn read(&self, offset: u64, width: Width) -> Result<u64, AccessError> {
        primecell::check(offset, width)?;
        let state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let value = match offset {
            DR => host_seconds().wrapping_add(state.offset),
            MR => state.matched,
            LR => state.load,
            // Always running: RTCCR.0 reads 1 once started and cannot be stopped but by reset.
            CR => 1,
            IMSC => state.mask,
            RIS | MIS => 0,
            _ => return primecell::id_register(offset, PERIPH_ID).ok_or(AccessError::NoRegister),
        };
        Ok(value.into())
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        primecell::check(offset, width)?;
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let word = value as u32;
        match offset {
            MR => state.matched = word,
            LR => {
                state.load = word;
                state.offset = word.wrapping_sub(host_seconds());
            }
            IMSC => state.mask = word & 1,
            CR | ICR => {}
            _ => return Err(AccessError::NoRegister),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_hosts_time_and_counts_on_from_what_was_loaded() {
        let clock = Pl031::new();
        let shown = clock.read(DR, Width::B4).unwrap();
        let host = u64::from(host_seconds());
        assert!(host.abs_diff(shown) <= 1);
        clock.write(LR, Width::B4, 1000).unwrap();
        assert!((1000..=1001).contains(&clock.read(DR, Width::B4).unwrap()));
    }

    #[test]
    fn survives_every_offset_width_and_value() {
        let clock = Pl031::new();
        for offset in 0..0x1000 {
            for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
                let _ = clock.write(offset, width, u64::MAX);
                let _ = clock.read(offset, width);
            }
        }
        assert_eq!(clock.read(0xfe0, Width::B4), Ok(0x31));
    }
}
