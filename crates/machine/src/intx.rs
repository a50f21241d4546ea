//! The four PCI interrupt lines INTA to INTD, shared by everything that has a pin.

use outboard_bus::{Event, IrqLine, warn_limited};
use outboard_hypervisor::InterruptController;
use outboard_passthrough::{LevelBinder, WiringError};
use outboard_platform::layout;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// The lines of the host bridge.
pub(crate) struct IntxLines {
    lines: [Arc<Line>; 4],
}

struct Line {
    gic: Arc<dyn InterruptController>,
    intid: u32,
    /// How many of those that share it assert it.
    asserted: Mutex<u32>,
}

impl IntxLines {
    /// Lines that interrupt through `gic`.
    pub(crate) fn new(gic: &Arc<dyn InterruptController>) -> Self {
        let line = |index| {
            let intid = layout::PCI_INTX_INTIDS.start + index;
            Arc::new(Line { gic: gic.clone(), intid, asserted: Mutex::new(0) })
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

/// A line that the kernel asserts and releases.
struct KernelLine(Arc<Line>);

impl LevelBinder for KernelLine {
    fn bind(&self, trigger: &Event, resample: &Event) -> Result<(), WiringError> {
        Ok(self.0.gic.bind_level_interrupt(self.0.intid, trigger.as_fd(), resample.as_fd())?)
    }

    fn unbind(&self, trigger: &Event, _: &Event) {
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
        let mut count = self.line.asserted.lock().unwrap_or_else(|e| e.into_inner());
        if self.asserted.swap(asserted, Ordering::Relaxed) == asserted {
            return;
        }
        *count = if asserted { *count + 1 } else { *count - 1 };
        let changed = if asserted { *count == 1 } else { *count == 0 };
        if changed && let Err(error) = self.line.gic.set_spi(self.line.intid, asserted) {
            warn_limited!("PCI interrupt line {} could not be set: {error}", self.line.intid);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(false);
    }
}
