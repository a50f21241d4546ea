use crate::{Activation, Health, Stop, WorkQueue, Worker};
use outboard_bus::Event;
use outboard_jail::ThreadKind;
use std::io;
use std::sync::Arc;

/// What a device with a receive and a transmit queue leads to: a network, sockets of the host.
pub(crate) trait Backend: Send + 'static {
    /// What its thread does.
    const KIND: ThreadKind;

    /// Lets `event` end a wait of the back end, until [`Backend::reset`].
    fn add_waker(&mut self, event: Arc<Event>) -> io::Result<()>;

    /// Forgets the guest and the wakers.
    fn reset(&mut self);
}

/// The two queues at work, on the thread that also works the back end: so a packet changes threads nowhere between them.
pub(crate) struct Pair<'m> {
    pub(crate) receive: WorkQueue<'m>,
    pub(crate) transmit: WorkQueue<'m>,
}

/// A back end that has a thread, and its device's queues, from the driver's DRIVER_OK to the next reset.
pub(crate) struct PairWorker<B> {
    /// `None` while the thread has it, and after that has panicked.
    backend: Option<Box<B>>,
    worker: Option<Worker<Box<B>>>,
    health: Health,
}

impl<B: Backend> PairWorker<B> {
    pub(crate) fn new(backend: B) -> Self {
        Self { backend: Some(Box::new(backend)), worker: None, health: Health::default() }
    }

    /// The health of the device.
    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    /// Starts the thread, called `name`, which runs `body` with the first two queues of `activation`, receive and transmit.
    ///
    /// # Errors
    /// A queue that the driver left disabled; a thread that panicked before; the operating system's.
    pub(crate) fn start<F>(&mut self, name: &str, activation: Activation, body: F) -> io::Result<()>
    where
        F: for<'m> FnOnce(&mut B, Pair<'m>, &Stop) + Send + 'static,
    {
        let Activation { memory, features: _, queues, interrupt } = activation;
        let mut queues = queues.into_iter();
        let (Some(Some(receive)), Some(Some(transmit))) = (queues.next(), queues.next()) else {
            return Err(io::Error::other("the driver left a queue of the device disabled"));
        };
        let Some(mut backend) = self.backend.take() else {
            return Err(io::Error::other("the device's thread has ended by an error; restart the VM"));
        };
        let doorbells = [&receive.doorbell, &transmit.doorbell];
        let added = doorbells.into_iter().try_for_each(|doorbell| backend.add_waker(Arc::clone(doorbell)));
        if let Err(error) = added {
            backend.reset();
            self.backend = Some(backend);
            return Err(error);
        }
        let wake = Arc::clone(&transmit.doorbell);
        let for_failure = Arc::clone(&interrupt);
        self.worker = Some(Worker::spawn(B::KIND, name, wake, &self.health, for_failure, move |stop| {
            let receive = WorkQueue::new(receive, &memory, Arc::clone(&interrupt));
            let pair = Pair { receive, transmit: WorkQueue::new(transmit, &memory, interrupt) };
            body(&mut backend, pair, stop);
            backend
        })?);
        Ok(())
    }

    /// Ends the thread, if there is one, and resets the back end, ready for the next start.
    pub(crate) fn stop(&mut self) {
        if let Some(mut backend) = self.worker.take().and_then(Worker::stop) {
            backend.reset();
            self.backend = Some(backend);
        }
    }
}
