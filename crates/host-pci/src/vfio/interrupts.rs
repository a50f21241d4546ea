//! The function's interrupts: straight to the guest where the sink has an eventfd, else through a thread.

use super::sys::{self, Irqs, failed};
use crate::{InterruptCounts, InterruptKind, InterruptSink, PciAddress, Result};
use outboard_bus::{Event, error_limited, poll_readable, warn_limited};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use vfio_bindings::bindings::vfio as raw;

/// VFIO's index of a kind.
fn index(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::Intx => raw::VFIO_PCI_INTX_IRQ_INDEX,
        InterruptKind::Msi => raw::VFIO_PCI_MSI_IRQ_INDEX,
        InterruptKind::MsiX => raw::VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

/// How many vectors the kernel has of each kind.
pub(super) fn counts(device: BorrowedFd<'_>) -> Result<InterruptCounts> {
    let count = |kind, most: u32| Ok(irq_count(device, index(kind))?.min(most) as u16);
    Ok(InterruptCounts {
        intx: count(InterruptKind::Intx, 1)?,
        msi: count(InterruptKind::Msi, 32)?,
        msix: count(InterruptKind::MsiX, 2048)?,
    })
}

fn irq_count(device: BorrowedFd<'_>, index: u32) -> Result<u32> {
    let argsz = size_of::<raw::vfio_irq_info>() as u32;
    let mut info = raw::vfio_irq_info { argsz, index, ..Default::default() };
    match sys::DEVICE_GET_IRQ_INFO.with(device, &mut info) {
        Ok(_) => Ok(info.count),
        // An index that this function does not have.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(0),
        Err(e) => Err(failed(sys::DEVICE_GET_IRQ_INFO.name(), format!("index {index}"))(e)),
    }
}

/// Lets the kernel signal `removal` when it wants the device back, and on an uncorrectable error.
pub(super) fn watch_removal(device: BorrowedFd<'_>, removal: &Event) -> Result<()> {
    for index in [raw::VFIO_PCI_ERR_IRQ_INDEX, raw::VFIO_PCI_REQ_IRQ_INDEX] {
        if irq_count(device, index)? > 0 {
            sys::set_irqs(device, index, &Irqs::Trigger(&[removal.as_fd()]))
                .map_err(failed("VFIO_DEVICE_SET_IRQS", format!("index {index}")))?;
        }
    }
    Ok(())
}

/// Interrupts that are on. The kernel holds on to the eventfds by itself.
pub(super) struct Enabled {
    kind: InterruptKind,
    thread: Option<Thread>,
}

impl Enabled {
    /// Turns on the first `count` vectors of `kind`.
    pub(super) fn new(
        device: BorrowedFd<'_>,
        address: PciAddress,
        kind: InterruptKind,
        count: u16,
        sink: Arc<dyn InterruptSink>,
    ) -> Result<Self> {
        let own = |e| failed("eventfd", address)(e);
        let events: Vec<(u16, Event)> = (0..count)
            .filter(|vector| sink.event(*vector).is_none())
            .map(|vector| Ok((vector, Event::new()?)))
            .collect::<io::Result<_>>()
            .map_err(own)?;
        let events = Arc::new(events);
        let mut next_own = events.iter();
        let fds: Vec<BorrowedFd<'_>> = (0..count)
            .filter_map(|vector| sink.event(vector).or_else(|| next_own.next().map(|(_, e)| e.as_fd())))
            .collect();
        assert_eq!(fds.len(), usize::from(count), "a sink's answer for a vector stays the same");
        let thread = if events.is_empty() { None } else { Some(Thread::start(&events, &sink).map_err(own)?) };
        // From here on dropping `thread` stops it.
        trigger(&fds, |fds| sys::set_irqs(device, index(kind), &Irqs::Trigger(fds)), (address, kind))
            .map_err(failed("VFIO_DEVICE_SET_IRQS", format!("{address}: {count} vectors of {kind:?}")))?;
        Ok(Self { kind, thread })
    }

    /// Turns them off: none is raised after this.
    pub(super) fn disable(self, device: BorrowedFd<'_>, address: PciAddress) -> Result<()> {
        let Self { kind, thread } = self;
        let off = sys::set_irqs(device, index(kind), &Irqs::Off);
        drop(thread);
        off.map(drop).map_err(failed("VFIO_DEVICE_SET_IRQS", format!("{address}: {kind:?} off")))
    }

    /// Lets the pin fire again.
    pub(super) fn unmask_intx(device: BorrowedFd<'_>, address: PciAddress) -> Result<()> {
        sys::set_irqs(device, index(InterruptKind::Intx), &Irqs::Unmask)
            .map(drop)
            .map_err(failed("VFIO_DEVICE_SET_IRQS", format!("{address}: unmask INTx")))
    }
}

/// Sets up as many of the vectors that `fds` signal as the host has; the others never fire. A host without interrupt remapping has one MSI
/// vector for a device, whatever the device could use; the device then folds its vectors into that (PCIe 7.7.1.2).
fn trigger(
    fds: &[BorrowedFd<'_>],
    set: impl Fn(&[BorrowedFd<'_>]) -> io::Result<Option<usize>>,
    (address, kind): (PciAddress, InterruptKind),
) -> io::Result<()> {
    let mut fds = fds;
    // Fewer each time, so this ends.
    while let Some(there) = set(fds)? {
        // MSI comes in powers of two.
        let most = if kind == InterruptKind::Msi { 1 << there.ilog2() } else { there };
        if most >= fds.len() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        warn_limited!(
            "{address}: the host has {there} of {} {kind:?} vectors; the guest's others never fire",
            fds.len()
        );
        fds = &fds[..most];
    }
    Ok(())
}

/// Waits for eventfds and raises their vectors, until dropped.
struct Thread {
    stop: Arc<Event>,
    handle: Option<JoinHandle<()>>,
}

impl Thread {
    fn start(events: &Arc<Vec<(u16, Event)>>, sink: &Arc<dyn InterruptSink>) -> io::Result<Self> {
        let stop = Arc::new(Event::new()?);
        let (its_stop, its_events, sink) = (Arc::clone(&stop), Arc::clone(events), Arc::clone(sink));
        let body = move || {
            if let Err(error) = forward(&its_stop, &its_events, &*sink) {
                error_limited!("waiting for a device's interrupts: {error}; they stop here");
            }
        };
        let handle = outboard_jail::spawn(outboard_jail::ThreadKind::Pci, "pci-interrupts", body)?;
        Ok(Self { stop, handle: Some(handle) })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.stop.signal();
        if self.handle.take().is_some_and(|h| h.join().is_err()) {
            error_limited!("a thread that forwards interrupts panicked");
        }
    }
}

fn forward(stop: &Event, events: &[(u16, Event)], sink: &dyn InterruptSink) -> io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> =
        std::iter::once(stop.as_fd()).chain(events.iter().map(|(_, e)| e.as_fd())).collect();
    loop {
        let ready = poll_readable(&fds, None)?;
        if ready[0] {
            return Ok(());
        }
        for ((vector, event), _) in events.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            if event.take() {
                sink.raise(*vector);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn fewer_vectors_than_asked_for_are_taken_as_they_are() {
        let event = Event::new().unwrap();
        let fds = [event.as_fd(); 16];
        let address: PciAddress = "01:00.0".parse().unwrap();
        let ask = |kind, answers: &[Option<usize>]| {
            let (asked, mut answers) = (RefCell::new(vec![]), RefCell::new(answers.iter()));
            let set = |fds: &[BorrowedFd<'_>]| {
                asked.borrow_mut().push(fds.len());
                Ok(*answers.borrow_mut().next().unwrap())
            };
            let done = trigger(&fds, set, (address, kind)).is_ok();
            assert_eq!(answers.get_mut().next(), None);
            (done, asked.into_inner())
        };
        assert_eq!(ask(InterruptKind::Msi, &[None]), (true, vec![16]));
        assert_eq!(ask(InterruptKind::Msi, &[Some(1), None]), (true, vec![16, 1]));
        assert_eq!(ask(InterruptKind::Msi, &[Some(7), Some(2), None]), (true, vec![16, 4, 2]));
        assert_eq!(ask(InterruptKind::MsiX, &[Some(7), None]), (true, vec![16, 7]));
        // A host that says that it has what it does not give.
        assert_eq!(ask(InterruptKind::MsiX, &[Some(16)]), (false, vec![16]));
    }
}
