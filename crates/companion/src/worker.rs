//! Batches that the guest does not wait for: unmappings, on a thread of their own.

use crate::batch::{Batch, Queue};
use crate::core::Core;
use outboard_jail::ThreadKind;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often to look whether a driver waits for DMA that is held back; twice this is what a guest gets to ask for some.
const LOOK: Duration = Duration::from_secs(5);

/// Works batches off, one after the other. A queue has at most one under way, so there are never more than queues.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    core: Arc<Core>,
    queues: Arc<[Queue]>,
    jobs: Mutex<Jobs>,
    changed: Condvar,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<(usize, Batch)>,
    /// Batches handed over and done, since the start: they are done in order.
    given: u64,
    done: u64,
    stop: bool,
}

impl Worker {
    pub(crate) fn start(core: &Arc<Core>, queues: &Arc<[Queue]>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            core: core.clone(),
            queues: queues.clone(),
            jobs: Mutex::default(),
            changed: Condvar::new(),
        });
        let worker = shared.clone();
        let thread = outboard_jail::spawn(ThreadKind::Dma, &core.name, move || worker.work())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Leaves `batch` of queue `queue`, which the batch has taken, to the thread.
    pub(crate) fn hand_over(&self, queue: usize, batch: Batch) {
        let mut jobs = self.shared.lock();
        jobs.given += 1;
        jobs.waiting.push_back((queue, batch));
        drop(jobs);
        self.shared.changed.notify_all();
    }

    /// What is held back has changed.
    pub(crate) fn wake(&self) {
        // Under the lock: the thread has not looked yet, or waits already.
        let _jobs = self.shared.lock();
        self.shared.changed.notify_all();
    }

    /// Waits until all batches handed over so far are done. A guest that keeps handing over more does not make this longer.
    pub(crate) fn settle(&self) {
        let jobs = self.shared.lock();
        let all = jobs.given;
        let settled = self.shared.changed.wait_while(jobs, |jobs| jobs.done < all);
        drop(settled.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // The panic hook has reported a panic there.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut jobs = self.lock();
        loop {
            if let Some((index, batch)) = jobs.waiting.pop_front() {
                drop(jobs);
                let result = batch.run(&self.core, true);
                if let Some(queue) = self.queues.get(index) {
                    queue.end(result);
                }
                jobs = self.lock();
                jobs.done += 1;
                self.changed.notify_all();
            } else if jobs.stop {
                return;
            } else if self.core.holds() {
                let (again, timeout) =
                    self.changed.wait_timeout(jobs, LOOK).unwrap_or_else(PoisonError::into_inner);
                jobs = again;
                if timeout.timed_out() {
                    drop(jobs);
                    self.core.look();
                    jobs = self.lock();
                }
            } else {
                jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
