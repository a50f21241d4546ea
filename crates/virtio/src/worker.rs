use crate::{Health, VirtioInterrupt};
use outboard_bus::Event;
use outboard_jail::ThreadKind;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Tells a worker's thread to come to an end.
#[derive(Debug, Default)]
pub struct Stop(AtomicBool);

impl Stop {
    /// Whether the thread shall end. Cheap enough to be asked before each request; must be asked after each wake-up.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Waits for `wake` and takes its signals back; `false` when the thread shall end.
    pub fn wait(&self, wake: &Event) -> bool {
        // The descriptor is open, so poll(2) cannot fail; if it did, there would be nothing left to wait for.
        !self.requested() && wake.wait().is_ok() && !self.requested()
    }
}

/// A named thread of a device that can be stopped and gives back what it worked with.
///
/// The thread must end soon after [`Stop::requested`] says so and `wake` is signalled, whatever the guest or the host's
/// side of the device does. Dropping the worker stops it too.
#[derive(Debug)]
pub struct Worker<T> {
    stop: Arc<Stop>,
    wake: Arc<Event>,
    thread: Option<JoinHandle<Option<T>>>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread of `kind` called `name` (Linux shows 15 bytes of it) that waits for `wake`, usually a queue's doorbell.
    /// If `body` panics, the device whose `health` this is has failed, and its driver hears through `interrupt` that it is
    /// broken.
    ///
    /// # Errors
    /// The operating system's, when there can be no more threads.
    pub fn spawn(
        kind: ThreadKind,
        name: &str,
        wake: Arc<Event>,
        health: &Health,
        interrupt: Arc<dyn VirtioInterrupt>,
        body: impl FnOnce(&Stop) -> T + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(Stop::default());
        let (for_thread, health, device) = (Arc::clone(&stop), health.clone(), name.to_owned());
        let thread = outboard_jail::spawn(kind, name, move || {
            let result = health.contain(&device, || body(&for_thread));
            if result.is_none() {
                interrupt.device_broken("its thread has ended by an internal error");
            }
            result
        })?;
        Ok(Self { stop, wake, thread: Some(thread) })
    }

    /// Ends the thread and waits for it; `None` if it panicked.
    pub fn stop(mut self) -> Option<T> {
        self.join()
    }
}

impl<T> Worker<T> {
    fn join(&mut self) -> Option<T> {
        let thread = self.thread.take()?;
        self.stop.0.store(true, Ordering::SeqCst);
        self.wake.signal();
        thread.join().ok().flatten()
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoDriver;

    impl VirtioInterrupt for NoDriver {
        fn queue_used(&self, _index: u16) {}
        fn config_changed(&self) {}
        fn device_broken(&self, _reason: &str) {}
    }

    fn spawn<T: Send + 'static>(
        wake: Arc<Event>,
        body: impl FnOnce(&Stop) -> T + Send + 'static,
    ) -> Worker<T> {
        Worker::spawn(ThreadKind::Entropy, "test", wake, &Health::default(), Arc::new(NoDriver), body)
            .unwrap()
    }

    #[test]
    fn stop_gives_the_state_back() {
        let wake = Arc::new(Event::new().unwrap());
        let for_thread = Arc::clone(&wake);
        let worker = spawn(Arc::clone(&wake), move |stop| {
            let mut wakes = 0;
            while stop.wait(&for_thread) {
                wakes += 1;
            }
            wakes
        });
        wake.signal();
        assert!(worker.stop().unwrap() <= 1);
    }

    #[test]
    fn a_panic_gives_nothing_back_and_fails_the_device() {
        let health = Health::default();
        let wake = Arc::new(Event::new().unwrap());
        let body = |_: &Stop| -> u8 { panic!("oh") };
        let worker =
            Worker::spawn(ThreadKind::Entropy, "test", wake, &health, Arc::new(NoDriver), body).unwrap();
        assert_eq!(worker.stop(), None);
        assert_eq!(health.failure(), Some("internal error: oh"));
    }

    #[test]
    fn drop_joins() {
        let wake = Arc::new(Event::new().unwrap());
        let alive = Arc::new(());
        let (for_thread, held) = (Arc::clone(&wake), Arc::clone(&alive));
        let worker = spawn(wake, move |stop| {
            let _held = held;
            while stop.wait(&for_thread) {}
        });
        drop(worker);
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}
