//! The four PCI interrupt lines INTA to INTD, shared by everything that has a pin.

use outboard_bus::{Event, IrqLine, warn_limited};
use outboard_hypervisor::InterruptController;
use outboard_passthrough::{LevelBinder, WiringError};
use outboard_platform::layout;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// The lines of the host bridge.
pub(crate) struct IntxLines {
    lines: [Arc<Line>; 4],
}

struct Line {
    gic: Arc<dyn InterruptController>,
    intid: u32,
    drivers: Mutex<Drivers>,
}

/// Who drives a line. The interrupt controller does not add up what this process and the kernel say (KVM on arm64 keeps one level for an
/// interrupt: the last word counts), so this process says its part again where the kernel may have overruled it, and has the kernel look
/// again where it may have overruled the kernel.
#[derive(Default)]
struct Drivers {
    /// How many of those that go by this process assert it.
    asserted: u32,
    /// Of each device that the kernel serves, the event that the guest's end of interrupt signals: its number, and a copy.
    kernel: Vec<(RawFd, File)>,
}

impl IntxLines {
    /// Lines that interrupt through `gic`.
    pub(crate) fn new(gic: &Arc<dyn InterruptController>) -> Self {
        let line = |index| {
            let intid = layout::PCI_INTX_INTIDS.start + index;
            Arc::new(Line { gic: gic.clone(), intid, drivers: Mutex::default() })
        };
        Self { lines: [line(0), line(1), line(2), line(3)] }
    }

    /// One more device on line `index` (0 to 3).
    pub(crate) fn share(&self, index: u32) -> Arc<dyn IrqLine> {
        Arc::new(Share { line: self.lines[index as usize].clone(), asserted: AtomicBool::new(false) })
    }

    /// The kernel's way to line `index`, past this process.
    pub(crate) fn kernel(&self, index: u32) -> Arc<dyn LevelBinder> {
        Arc::new(KernelLine(self.lines[index as usize].clone()))
    }
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, Drivers> {
        self.drivers.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn drive(&self, asserted: bool) {
        if let Err(error) = self.gic.set_spi(self.intid, asserted) {
            warn_limited!("PCI interrupt line {} could not be set: {error}", self.intid);
        }
    }
}

impl Drivers {
    /// As if the guest had ended each one's interrupt: its pin is unmasked, and fires again if the device still interrupts.
    fn ask_kernel(&self) {
        for (_, asks) in &self.kernel {
            let mut asks = asks;
            // An eventfd takes 8 bytes; one that is full is signalled already.
            let _ = asks.write(&1u64.to_ne_bytes());
        }
    }
}

/// A line that the kernel asserts and releases.
struct KernelLine(Arc<Line>);

impl LevelBinder for KernelLine {
    fn bind(&self, trigger: &Event, resample: &Event) -> Result<(), WiringError> {
        let asks = File::from(resample.as_fd().try_clone_to_owned()?);
        self.0.gic.bind_level_interrupt(self.0.intid, trigger.as_fd(), resample.as_fd())?;
        self.0.lock().kernel.push((resample.as_fd().as_raw_fd(), asks));
        Ok(())
    }

    fn unbind(&self, trigger: &Event, resample: &Event) {
        let number = resample.as_fd().as_raw_fd();
        self.0.lock().kernel.retain(|(bound, _)| *bound != number);
        if let Err(error) = self.0.gic.unbind_interrupt(self.0.intid, trigger.as_fd()) {
            warn_limited!("PCI interrupt line {}: {error}", self.0.intid);
        }
    }
}

/// One device's say about a line.
struct Share {
    line: Arc<Line>,
    asserted: AtomicBool,
}

impl IrqLine for Share {
    fn set(&self, asserted: bool) {
        let mut drivers = self.line.lock();
        let new = self.asserted.swap(asserted, Ordering::Relaxed) != asserted;
        match (asserted, new) {
            (true, true) => drivers.asserted += 1,
            (false, true) => drivers.asserted -= 1,
            // Said again: the kernel may have released the line meanwhile.
            (true, false) if !drivers.kernel.is_empty() => {}
            (_, false) => return,
        }
        let is_first = new && drivers.asserted == 1;
        match asserted {
            true if is_first || !drivers.kernel.is_empty() => self.line.drive(true),
            false if drivers.asserted == 0 => {
                self.line.drive(false);
                drivers.ask_kernel();
            }
            _ => {}
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{BorrowedFd, OwnedFd};

    /// One level for each interrupt, whoever sets it last; a trigger asserts it, and its end is the test's to play.
    #[derive(Default)]
    struct Gic {
        level: AtomicBool,
        trigger: Mutex<Option<OwnedFd>>,
    }

    impl Gic {
        /// The kernel takes a trigger's signals at once.
        fn run(&self) {
            let trigger = self.trigger.lock().unwrap();
            let fired = trigger.as_ref().is_some_and(|fd| {
                outboard_bus::poll_readable(&[fd.as_fd()], Some(std::time::Duration::ZERO)).unwrap()[0]
            });
            if fired {
                let mut file = File::from(trigger.as_ref().unwrap().try_clone().unwrap());
                std::io::Read::read(&mut file, &mut [0; 8]).unwrap();
                self.level.store(true, Ordering::SeqCst);
            }
        }
        fn is_high(&self) -> bool {
            self.run();
            self.level.load(Ordering::SeqCst)
        }
        /// The guest's end of an interrupt that the kernel serves.
        fn end(&self) {
            self.level.store(false, Ordering::SeqCst);
        }
    }

    impl InterruptController for Gic {
        fn set_spi(&self, _: u32, asserted: bool) -> outboard_hypervisor::Result<()> {
            self.run();
            self.level.store(asserted, Ordering::SeqCst);
            Ok(())
        }
        fn send_msi(&self, _: u64, _: u32) -> outboard_hypervisor::Result<()> {
            Ok(())
        }
        fn bind_interrupt(&self, _: u32, _: BorrowedFd<'_>) -> outboard_hypervisor::Result<()> {
            Ok(())
        }
        fn unbind_interrupt(&self, _: u32, _: BorrowedFd<'_>) -> outboard_hypervisor::Result<()> {
            *self.trigger.lock().unwrap() = None;
            Ok(())
        }
        fn bind_level_interrupt(
            &self,
            _: u32,
            trigger: BorrowedFd<'_>,
            _: BorrowedFd<'_>,
        ) -> outboard_hypervisor::Result<()> {
            *self.trigger.lock().unwrap() = Some(trigger.try_clone_to_owned().unwrap());
            Ok(())
        }
    }

    #[test]
    fn a_line_is_high_while_any_of_those_that_share_it_asserts_it() {
        let gic = Arc::new(Gic::default());
        let lines = IntxLines::new(&(gic.clone() as Arc<dyn InterruptController>));
        let (one, other) = (lines.share(0), lines.share(0));
        one.set(true);
        other.set(true);
        one.set(false);
        assert!(gic.is_high());
        drop(other);
        assert!(!gic.is_high());
    }

    #[test]
    fn a_line_that_the_kernel_and_this_process_share_loses_no_interrupt_of_either() {
        let gic = Arc::new(Gic::default());
        let lines = IntxLines::new(&(gic.clone() as Arc<dyn InterruptController>));
        let (ours, kernel) = (lines.share(0), lines.kernel(0));
        let (trigger, resample) = (Event::new().unwrap(), Event::new().unwrap());
        kernel.bind(&trigger, &resample).unwrap();
        // Both interrupt; the guest ends the kernel's, and the kernel releases the line. Ours is still asserted, and says so again.
        trigger.signal();
        ours.set(true);
        assert!(gic.is_high());
        gic.end();
        ours.set(true);
        assert!(gic.is_high(), "ours was lost");
        // The kernel's device interrupts before ours is released: it is asked, as if the guest had ended its interrupt.
        trigger.signal();
        assert!(gic.is_high() && !resample.take());
        ours.set(false);
        assert!(resample.take(), "the kernel's was lost");
        trigger.signal();
        assert!(gic.is_high());
        kernel.unbind(&trigger, &resample);
        ours.set(true);
        ours.set(false);
        assert!(!resample.take() && !gic.is_high(), "not any more");
    }
}
