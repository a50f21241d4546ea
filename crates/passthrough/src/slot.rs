//! The functions of a host's slot, together behind one root port, and a thread that watches them.

use crate::{Error, Function, Loss};
use outboard_bus::{Event, error_limited, poll_readable};
use outboard_host_pci::PciAddress;
use outboard_jail::ThreadKind;
use outboard_pci::{PciFunction, RootComplex, RootPort};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Why a slot is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vacated {
    /// The guest let go of it, after [`Slot::request_eject`] or by itself.
    Ejected,
    /// A function was lost while the guest had it or in the reset after that, and all of the slot with it: each function with its loss. One that only went with
    /// another counts as [`Loss::Gone`] here.
    Lost(Vec<(PciAddress, Loss)>),
}

/// Told what became of a slot.
pub trait SlotListener: Send + Sync {
    /// The slot is empty, nothing of it is in the guest, and its functions are held by nobody but the [`Slot`]. Called once, from the slot's
    /// own thread: the listener must not drop the [`Slot`] itself, but have another thread do so.
    fn vacated(&self, why: Vacated);
}

/// The functions of one slot of the host, in one slot of the guest. Dropping it empties the slot and gives the functions back.
pub struct Slot {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Device number of the port on bus 0.
    device: u8,
    port: Arc<RootPort>,
    /// Signalled by the port when the guest changes the slot's power.
    power: Arc<Event>,
    root: Arc<RootComplex>,
    functions: Vec<Arc<Function>>,
    listener: Arc<dyn SlotListener>,
    stop: Event,
    stopping: AtomicBool,
    /// Whether the functions are still behind the port.
    plugged: Mutex<bool>,
}

impl Slot {
    /// Puts `functions` behind `port`, which has device number `device` on bus 0 of `root` and signals `power`. They keep their numbers; where
    /// function 0 is not among them, the first takes its place, since a guest looks for nothing without one (PCIe 7.5.1.1.9). In a
    /// running guest this is a hot plug.
    ///
    /// # Errors
    /// [`Error::Place`] if the slot is not empty or `port` is not there, [`Error::Resources`]. Nothing stays behind.
    pub fn plug(
        root: &Arc<RootComplex>,
        device: u8,
        (port, power): (Arc<RootPort>, Arc<Event>),
        functions: Vec<Arc<Function>>,
        listener: Arc<dyn SlotListener>,
    ) -> Result<Self, Error> {
        let stop = Event::new().map_err(|source| Error::Resources { what: "an event", source })?;
        let shared = Arc::new(Shared {
            device,
            port,
            power,
            root: Arc::clone(root),
            functions,
            listener,
            stop,
            stopping: AtomicBool::new(false),
            plugged: Mutex::new(false),
        });
        shared.add()?;
        let watcher = Arc::clone(&shared);
        // Owns what was added, should there be no thread for it.
        let mut slot = Self { shared, thread: None };
        let name = format!("pci slot {device}");
        let spawned = outboard_jail::spawn(ThreadKind::Pci, &name, move || watcher.watch());
        slot.thread = Some(spawned.map_err(|source| Error::Resources { what: "a thread", source })?);
        Ok(slot)
    }

    /// The functions, in the order they were given.
    pub fn functions(&self) -> &[Arc<Function>] {
        &self.shared.functions
    }

    /// Asks the guest to let go: it has [`SlotListener::vacated`] called when it has. A guest without a hot-plug driver never does.
    pub fn request_eject(&self) {
        self.shared.port.press_attention_button();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.stop.signal();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook; the slot is emptied below all the same.
            let _ = thread.join();
        }
        self.shared.empty();
    }
}

impl Shared {
    fn add(&self) -> Result<(), Error> {
        let mut plugged = self.plugged();
        // Function 0 last: a guest that looks at the slot meanwhile sees nothing or everything.
        for (number, function) in self.numbered().into_iter().rev() {
            let endpoint = Arc::clone(function) as Arc<dyn PciFunction>;
            if let Err(source) = self.root.add_behind(self.device, number, endpoint) {
                // Only what was added here is taken out: a slot that others are in was refused at the first function.
                if *plugged {
                    let _ = self.root.remove_behind(self.device);
                    *plugged = false;
                }
                return Err(Error::Place { name: function.name().to_owned(), source });
            }
            *plugged = true;
        }
        Ok(())
    }

    fn numbered(&self) -> Vec<(u8, &Arc<Function>)> {
        let number = |function: &Arc<Function>| function.host().identity().address.function;
        let mut numbered: Vec<_> = self.functions.iter().map(|f| (number(f), f)).collect();
        numbered.sort_by_key(|(number, _)| *number);
        if let Some(first) = numbered.first_mut() {
            first.0 = 0;
        }
        numbered
    }

    /// Until the slot is empty, or the end.
    fn watch(&self) {
        loop {
            let fixed = [self.stop.as_fd(), self.power.as_fd()];
            let watched = self.functions.iter().flat_map(|f| [f.lost().as_fd(), f.removal()]);
            let fds: Vec<BorrowedFd<'_>> = fixed.into_iter().chain(watched).collect();
            let Ok(ready) = poll_readable(&fds, None) else { return };
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            if ready.iter().skip(2).any(|ready| *ready) {
                return self.lost();
            }
            if ready.get(1) == Some(&true) && self.power.take() && !self.port.powered() {
                return self.ejected();
            }
        }
    }

    /// The device is gone: the guest is told by the link, its accesses read all-ones, its mappings are taken away.
    fn lost(&self) {
        self.functions.iter().for_each(|function| function.withdraw());
        let loss = |function: &Arc<Function>| Some((function.host().identity().address, function.loss()?));
        let losses = self.functions.iter().filter_map(loss).collect();
        self.empty();
        self.listener.vacated(Vacated::Lost(losses));
    }

    /// The guest has turned the power off: the device is quiet and reset before anybody else gets it. One that does not come back from that is
    /// lost all the same.
    fn ejected(&self) {
        self.functions.iter().for_each(|function| function.reset());
        if self.functions.iter().any(|function| function.loss().is_some()) {
            return self.lost();
        }
        self.empty();
        self.listener.vacated(Vacated::Ejected);
    }

    fn empty(&self) {
        let mut plugged = self.plugged();
        if std::mem::take(&mut *plugged)
            && let Err(error) = self.root.remove_behind(self.device)
        {
            error_limited!("PCI slot {} could not be emptied: {error}", self.device);
        }
    }

    fn plugged(&self) -> std::sync::MutexGuard<'_, bool> {
        self.plugged.lock().unwrap_or_else(|e| e.into_inner())
    }
}
