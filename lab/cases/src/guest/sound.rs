//! Playback of silence through the kernel's PCM interface (Linux, include/uapi/sound/asound.h).
#![allow(unsafe_code)] // UNSAFETY: three ioctls of sound devices that no safe wrapper has.

use super::wait_for;
use anyhow::{Context, Result};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

/// Frames per second.
pub const RATE: u32 = 48_000;
/// Frames between two interrupts, and in the buffer.
const PERIOD: u32 = 2_048;
const BUFFER: u32 = 4 * PERIOD;
const CHANNELS: u32 = 2;
const BYTES: usize = 2 * CHANNELS as usize;

/// `struct snd_pcm_hw_params`.
#[repr(C)]
struct HwParams {
    flags: u32,
    /// Access, format, subformat: a set of 256 values each; then five that are not used.
    masks: [[u32; 8]; 8],
    /// `struct snd_interval` (minimum, maximum, flags) of the parameters from 8 on; then nine that are not used.
    intervals: [[u32; 3]; 21],
    rmask: u32,
    cmask: u32,
    info: u32,
    msbits: u32,
    rate_num: u32,
    rate_den: u32,
    fifo_size: u64,
    reserved: [u8; 64],
}

/// `struct snd_xferi`.
#[repr(C)]
struct Transfer {
    result: i64,
    buffer: *const u8,
    frames: u64,
}

/// Index of an interval: the parameter's number less 8, SNDRV_PCM_HW_PARAM_FIRST_INTERVAL.
const PARAM_CHANNELS: usize = 2;
const PARAM_RATE: usize = 3;
const PARAM_PERIOD_SIZE: usize = 5;
const PARAM_BUFFER_SIZE: usize = 9;
/// The value is a whole number.
const INTEGER: u32 = 1 << 2;
/// SNDRV_PCM_ACCESS_RW_INTERLEAVED, SNDRV_PCM_FORMAT_S16_LE.
const INTERLEAVED: u32 = 3;
const S16_LE: u32 = 2;

nix::ioctl_readwrite!(
    /// SNDRV_PCM_IOCTL_HW_PARAMS.
    hw_params,
    b'A',
    0x11,
    HwParams
);
nix::ioctl_none!(
    /// SNDRV_PCM_IOCTL_PREPARE.
    prepare,
    b'A',
    0x40
);
nix::ioctl_write_ptr!(
    /// SNDRV_PCM_IOCTL_WRITEI_FRAMES.
    write_frames,
    b'A',
    0x50,
    Transfer
);

/// A playback device that is ready.
pub struct Playback {
    file: File,
    card: u32,
}

impl Playback {
    /// Opens device 0 of card `card`: 48 kHz, two channels, 16 bits.
    pub fn open(card: u32) -> Result<Self> {
        let path = format!("/dev/snd/pcmC{card}D0p");
        // The card shows in sysfs before its codec has been found and has a node.
        wait_for(&path, Duration::from_secs(30), || Path::new(&path).exists().then_some(()))?;
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {path}"))?;
        let mut params = HwParams {
            flags: 0,
            masks: [[u32::MAX; 8]; 8],
            intervals: [[0, u32::MAX, 0]; 21],
            rmask: u32::MAX,
            cmask: 0,
            info: u32::MAX,
            msbits: 0,
            rate_num: 0,
            rate_den: 0,
            fifo_size: 0,
            reserved: [0; 64],
        };
        for (mask, value) in params.masks.iter_mut().zip([INTERLEAVED, S16_LE, 0]) {
            *mask = [1 << value, 0, 0, 0, 0, 0, 0, 0];
        }
        for (index, value) in [
            (PARAM_CHANNELS, CHANNELS),
            (PARAM_RATE, RATE),
            (PARAM_PERIOD_SIZE, PERIOD),
            (PARAM_BUFFER_SIZE, BUFFER),
        ] {
            params.intervals[index] = [value, value, INTEGER];
        }
        // SAFETY: the structure has the kernel's layout and size, and outlives the call.
        unsafe { hw_params(file.as_raw_fd(), &mut params) }.context("the card does not take the format")?;
        // SAFETY: no argument.
        unsafe { prepare(file.as_raw_fd()) }.context("playback cannot be prepared")?;
        Ok(Self { file, card })
    }

    /// Plays `frames` frames of silence; returns when the last of them are in the buffer. The buffer once full, playback starts.
    pub fn play(&self, frames: u32) -> Result<()> {
        let silence = vec![0; PERIOD as usize * BYTES];
        for _ in 0..frames.div_ceil(PERIOD) {
            let transfer = Transfer { result: 0, buffer: silence.as_ptr(), frames: PERIOD.into() };
            // SAFETY: the kernel reads `frames` frames from `buffer`, which holds as many and outlives the call.
            unsafe { write_frames(self.file.as_raw_fd(), &transfer) }.context("playback stopped")?;
        }
        Ok(())
    }

    /// How many frames the card has fetched: the kernel computes it from the position of the card's DMA engine.
    pub fn position(&self) -> Result<u64> {
        let path = format!("/proc/asound/card{}/pcm0p/sub0/status", self.card);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let value = text.lines().find_map(|line| line.strip_prefix("hw_ptr")?.trim().strip_prefix(':'));
        let value = value.and_then(|value| value.trim().parse().ok());
        value.with_context(|| format!("{path} shows no position: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_size() {
        assert_eq!(size_of::<HwParams>(), 608);
        assert_eq!(size_of::<Transfer>(), 24);
    }
}
