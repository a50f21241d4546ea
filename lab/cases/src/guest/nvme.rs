//! An NVMe controller driven from user space, for one command: does its DMA get where it is told to?
//! (NVM Express Base Specification 1.4, sections 3.1, 4.2, 4.6 and 5.15.)

use super::function::GuestFunction;
use super::pci::{DmaPage, PAGE, Registers};
use super::{dma_device as dma, wait_for};
use anyhow::{Result, ensure};
use std::time::Duration;

const CONFIGURATION: usize = 0x14;
const STATUS: usize = 0x1c;
const QUEUE_SIZES: usize = 0x24;
const SUBMISSIONS: usize = 0x28;
const COMPLETIONS: usize = 0x30;
/// Tail of submission queue 0.
const DOORBELL: usize = 0x1000;
/// Class code of an NVMe controller.
const CLASS: u32 = 0x01_0802;
/// Identify, of the controller.
const IDENTIFY: u32 = 6;
const CONTROLLER: u32 = 1;
const PROMPT: Duration = Duration::from_secs(10);

/// A controller without a driver.
pub struct RawNvme {
    registers: Registers,
    /// Where it is.
    pub function: GuestFunction,
    /// Submissions, completions, data.
    pub pages: [DmaPage; 3],
}

impl RawNvme {
    /// The only one, allowed to decode and to be bus master as far as it can see.
    pub fn open() -> Result<Self> {
        let function = GuestFunction::the(CLASS)?;
        dma::enable(&function.folder())?;
        let registers = Registers::of_bar(&function.folder(), 0, 2 * PAGE)?;
        Ok(Self { registers, function, pages: [DmaPage::new()?, DmaPage::new()?, DmaPage::new()?] })
    }

    /// Turns the controller off: it does no DMA afterwards.
    pub fn stop(&self) -> Result<()> {
        self.registers.write(CONFIGURATION, 0_u32);
        wait_for("controller that is off", PROMPT, || (self.ready() == 0).then_some(()))
    }

    fn ready(&self) -> u32 {
        self.registers.read::<u32>(STATUS) & 1
    }

    /// Asks the controller who it is, with its queues and the answer at these bus addresses: its serial number, or nothing if no answer
    /// comes within `limit`. It is off afterwards.
    pub fn identify(&self, buses: [u64; 3], limit: Duration) -> Result<Option<String>> {
        dma::enable(&self.function.folder())?;
        self.stop()?;
        self.pages.iter().for_each(DmaPage::clear);
        let [submissions, completions, data] = buses;
        self.registers.write(QUEUE_SIZES, 3_u32 << 16 | 3);
        for (register, bus) in [(SUBMISSIONS, submissions), (COMPLETIONS, completions)] {
            self.registers.write(register, bus as u32);
            self.registers.write(register + 4, (bus >> 32) as u32);
        }
        // Entries of 2^6 and 2^4 bytes.
        self.registers.write(CONFIGURATION, 4_u32 << 20 | 6 << 16 | 1);
        wait_for("controller that is on", PROMPT, || (self.ready() == 1).then_some(()))?;
        let [queue, done, answer] = &self.pages;
        queue.write(0, IDENTIFY | 7 << 16);
        queue.write(24, data);
        queue.write(40, CONTROLLER);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.registers.write(DOORBELL, 1_u32);
        let completed = || (done.read::<u32>(12) >> 16 & 1 == 1).then_some(());
        let came = wait_for("completion", limit, completed).is_ok();
        self.stop()?;
        if !came {
            return Ok(None);
        }
        ensure!(done.read::<u32>(12) >> 17 == 0, "identify ended with {:#x}", done.read::<u32>(12));
        let serial: Vec<u8> = (4..24).map(|at| answer.read(at)).collect();
        Ok(Some(String::from_utf8_lossy(&serial).trim().to_owned()))
    }
}
