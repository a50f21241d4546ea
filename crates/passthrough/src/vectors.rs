//! Message-signalled interrupts from the host's function to the guest.
//!
//! One engine ([`outboard_pci::Msix`]) keeps vectors, masks and pending bits for MSI and MSI-X. Where the machine has a [`VectorBinder`], each vector
//! has an event which the host's kernel signals: while the guest may be interrupted it is bound to the guest's interrupt and this
//! process sleeps; while the vector is masked it is not bound, and what the event holds is the pending bit. No thread is needed for
//! that: the bit is only ever looked at when the guest reads it or unmasks.

use crate::VectorBinder;
use outboard_bus::{Event, MsiMessage, MsiSink, warn_limited};
use outboard_host_pci::InterruptSink;
use outboard_pci::{Msix, VectorRoutes};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, OnceLock};

/// The vectors of one kind: what the host's function raises, and what the guest programs.
pub(crate) struct Vectors {
    pub(crate) state: Arc<Msix>,
    routes: Option<Arc<Routes>>,
}

impl Vectors {
    pub(crate) fn new(
        count: u16,
        sink: Arc<dyn MsiSink>,
        binder: Option<Arc<dyn VectorBinder>>,
    ) -> Arc<Self> {
        let routes = binder.map(|binder| Arc::new(Routes::new(count, binder)));
        let state =
            Msix::with_routes(count, sink, routes.clone().map(|routes| routes as Arc<dyn VectorRoutes>));
        Arc::new(Self { state: Arc::new(state), routes })
    }
}

impl InterruptSink for Vectors {
    fn raise(&self, vector: u16) {
        self.state.trigger(vector);
    }

    fn event(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        self.routes.as_ref()?.vectors.get(usize::from(vector))?.event().map(AsFd::as_fd)
    }
}

struct Routes {
    binder: Arc<dyn VectorBinder>,
    vectors: Vec<Route>,
}

#[derive(Default)]
struct Route {
    /// Made when it is first needed, so that a function with 2,048 vectors of which the guest uses four does not take 2,048 file descriptors
    /// by itself; `None` inside if there were none left, and interrupts go through this process then.
    event: OnceLock<Option<Event>>,
    /// What it is bound to.
    bound: Mutex<Option<MsiMessage>>,
}

impl Route {
    fn event(&self) -> Option<&Event> {
        let make = || {
            Event::new().inspect_err(|error| warn_limited!("no event for an interrupt vector: {error}")).ok()
        };
        self.event.get_or_init(make).as_ref()
    }

    fn bound(&self) -> std::sync::MutexGuard<'_, Option<MsiMessage>> {
        self.bound.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Routes {
    fn new(count: u16, binder: Arc<dyn VectorBinder>) -> Self {
        Self { binder, vectors: (0..count).map(|_| Route::default()).collect() }
    }

    fn route(&self, vector: u16) -> Option<&Route> {
        self.vectors.get(usize::from(vector))
    }
}

impl VectorRoutes for Routes {
    fn connect(&self, vector: u16, message: MsiMessage) {
        let Some(route) = self.route(vector) else { return };
        let Some(event) = route.event() else { return };
        match self.binder.bind(message, event) {
            Ok(()) => {
                *route.bound() = Some(message);
                // What came between the engine's take and the binding was delivered by the binding, as its contract says.
                // From then on the kernel consumes signals, so nothing else can be lost here.
                event.take();
            }
            Err(error) => warn_limited!("interrupt vector {vector} leads nowhere ({message:x?}): {error}"),
        }
    }

    fn disconnect(&self, vector: u16) {
        let Some(route) = self.route(vector) else { return };
        let Some(event) = route.event() else { return };
        match route.bound().take() {
            Some(message) => self.binder.unbind(message, event),
            // It was connected to a message that names no interrupt: what the device sent there went nowhere.
            None => drop(event.take()),
        }
    }

    fn take(&self, vector: u16) -> bool {
        // Not made yet: nothing can have come.
        self.route(vector)
            .and_then(|route| route.event.get())
            .and_then(Option::as_ref)
            .is_some_and(Event::take)
    }
}

impl Drop for Routes {
    fn drop(&mut self) {
        for route in &self.vectors {
            let bound = route.bound().take();
            if let (Some(message), Some(Some(event))) = (bound, route.event.get()) {
                self.binder.unbind(message, event);
            }
        }
    }
}
