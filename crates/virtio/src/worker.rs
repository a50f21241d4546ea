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
    thread: Option<JoinHandle<T>>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread of `kind` called `name` (Linux shows 15 bytes of it) that waits for `wake`, usually a queue's doorbell.
    ///
    /// # Errors
    /// The operating system's, when there can be no more threads.
    pub fn spawn(
        kind: ThreadKind,
        name: &str,
        wake: Arc<Event>,
        body: impl FnOnce(&Stop) -> T + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(Stop::default());
        let for_thread = Arc::clone(&stop);
        let thread = outboard_jail::spawn(kind, name, move || body(&for_thread))?;
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
        thread.join().ok()
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

    #[test]
    fn stop_gives_the_state_back() {
        let wake = Arc::new(Event::new().unwrap());
        let for_thread = Arc::clone(&wake);
        let worker = Worker::spawn(ThreadKind::Entropy, "test", Arc::clone(&wake), move |stop| {
            let mut wakes = 0;
            while stop.wait(&for_thread) {
                wakes += 1;
            }
            wakes
        })
        .unwrap();
        wake.signal();
        assert!(worker.stop().unwrap() <= 1);
    }

    #[test]
    fn drop_joins() {
        let wake = Arc::new(Event::new().unwrap());
        let alive = Arc::new(());
        let (for_thread, held) = (Arc::clone(&wake), Arc::clone(&alive));
        let worker = Worker::spawn(ThreadKind::Entropy, "test", wake, move |stop| {
            let _held = held;
            while stop.wait(&for_thread) {}
        });
        drop(worker.unwrap());
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}
