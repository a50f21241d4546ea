use super::host::{ConsoleHost, Input};
use super::panic_watch::{Line, PanicWatch};
use crate::run::{EventSender, MachineEvent};
use outboard_bus::Event;
use outboard_virtio::console::ConsoleBackend;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The host's end of the virtio console. A guest whose kernel logs there is watched for a panic as on the serial one.
pub(crate) struct VirtioEnd {
    host: ConsoleHost,
    watch: Arc<PanicWatch>,
    line: Line,
    events: EventSender,
    /// Read from the host, not yet given to the device.
    waiting: Vec<u8>,
}

impl VirtioEnd {
    /// Connects `host` with a device that is still to be made.
    pub(crate) fn new(host: ConsoleHost, watch: Arc<PanicWatch>, events: EventSender) -> Self {
        Self { host, watch, line: Line::default(), events, waiting: Vec::new() }
    }
}

impl ConsoleBackend for VirtioEnd {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        self.host.input()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Input::Leave = self.host.read(&mut self.waiting) {
            self.events.send(MachineEvent::Leave);
        }
        // The host's side reads at most 1 KiB, the device gives 4 KiB, so nothing is left waiting for long.
        let n = self.waiting.len().min(buffer.len());
        buffer[..n].copy_from_slice(&self.waiting[..n]);
        self.waiting.drain(..n);
        Ok(n)
    }

    fn write(&mut self, data: &[u8], stop: &Event) {
        let suspect = self.watch.scan_text(&mut self.line, data);
        self.host.write(data, stop);
        if suspect {
            self.events.send(MachineEvent::PanicSuspected);
        }
    }
}
