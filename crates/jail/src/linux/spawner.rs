//! The thread that starts all others once the process is confined: a confined thread cannot, and its filter would be inherited.

use std::io;
use std::sync::mpsc::{Sender, channel};

type Job = Box<dyn FnOnce() + Send>;

/// This side of it.
pub(super) struct Spawner(Sender<Job>);

impl Spawner {
    /// Starts it; it lives as long as the process.
    pub(super) fn start() -> io::Result<Self> {
        let (jobs, work) = channel::<Job>();
        let body = move || work.into_iter().for_each(|job| job());
        std::thread::Builder::new().name("spawner".into()).spawn(body)?;
        Ok(Self(jobs))
    }

    /// Has it run `job`, which must be short, and waits for the result.
    pub(super) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (reply, answer) = channel();
        // Whoever asked waits right below.
        let send = Box::new(move || drop(reply.send(job())));
        let gone = || io::Error::other("the thread that starts others has ended");
        self.0.send(send).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}
