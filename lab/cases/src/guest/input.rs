//! Keys of the guest.

use super::wait_for;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Code of the power key (Linux, `input-event-codes.h`).
pub const KEY_POWER: u16 = 116;
/// Type of a key's event.
const EV_KEY: u16 = 1;
/// Bytes of an event on a 64-bit kernel: two of 8 for the time, type, code, value.
const EVENT: usize = 24;

/// The input device called `name`.
pub fn find(name: &str) -> Result<PathBuf> {
    wait_for(&format!("input device {name}"), Duration::from_secs(10), || {
        for entry in fs::read_dir("/sys/class/input").ok()?.flatten() {
            let found = fs::read_to_string(entry.path().join("device/name")).unwrap_or_default();
            let device = Path::new("/dev/input").join(entry.file_name());
            if found.trim() == name && device.exists() {
                return Some(device);
            }
        }
        None
    })
}

/// Waits until `key` is pressed on `device`.
pub fn wait_for_key(device: &Path, key: u16) -> Result<()> {
    let mut file = fs::File::open(device).with_context(|| format!("cannot open {}", device.display()))?;
    let mut event = [0; EVENT];
    loop {
        file.read_exact(&mut event).context("the input device ended")?;
        let word = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
        let pressed = event[20] == 1;
        match (word(16), word(18)) {
            (EV_KEY, code) if code == key && pressed => return Ok(()),
            (EV_KEY, code) if pressed => bail!("key {code} was pressed, not {key}"),
            _ => {}
        }
    }
}
