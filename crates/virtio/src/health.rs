//! A device's health: panics in the code that handles a guest's data end the device, not the machine.
//!
//! Images, frames and packets go through other people's code (the qcow2 layer, the TCP stack), whose assertions are within
//! a guest's reach until somebody finds and reports them. [`Health::contain`] runs such code; when it panics, the device is
//! failed for good and says so, while the machine and its other devices go on.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

thread_local! {
    /// Number of [`Health::contain`] calls that this thread is inside.
    static CONTAINED: Cell<u32> = const { Cell::new(0) };
}

/// True while the calling thread runs code whose panic ends a device only. A process-wide panic hook asks this: every
/// other panic is a broken invariant of the machine itself, which must not go on.
pub fn is_panic_contained() -> bool {
    CONTAINED.get() > 0
}

/// The health of one device, shared between its threads and those who report about it. Once failed, a device stays so
/// until the process ends, over reboots of the guest too.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<OnceLock<String>>);

impl Health {
    /// The reason why the device has failed, a sentence without a full stop; `None` while it is well.
    pub fn failure(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// Fails the device for `reason`; the first reason stays.
    pub fn fail(&self, reason: String) {
        // An error says that there is a reason already.
        let _ = self.0.set(reason);
    }

    /// Runs `work`. When it panics, the device called `name` is failed with the panic's message, and `None` comes back.
    ///
    /// `work` may leave what it borrows in any state: after a failure the caller uses none of it again but to drop it.
    pub fn contain<T>(&self, name: &str, work: impl FnOnce() -> T) -> Option<T> {
        CONTAINED.set(CONTAINED.get() + 1);
        let result = catch_unwind(AssertUnwindSafe(work));
        CONTAINED.set(CONTAINED.get() - 1);
        match result {
            Ok(value) => Some(value),
            Err(panic) => {
                let message = panic_message(&*panic);
                tracing::error!(
                    "{name} has failed and is out of use until Outboard is started again; the guest's other devices work \
                     on. This is a bug in Outboard, please report it: {message}"
                );
                self.fail(format!("internal error: {message}"));
                // The panic's value is somebody else's: its destructor could panic too, outside of all containment.
                std::mem::forget(panic);
                None
            }
        }
    }
}

/// The text that a panic was raised with.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "panic without a message",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_fails_the_device_and_nothing_else() {
        let health = Health::default();
        assert_eq!(health.contain("dev0", is_panic_contained), Some(true));
        assert!(!is_panic_contained());
        assert_eq!(health.failure(), None);
        assert_eq!(health.contain::<()>("dev0", || panic!("number {}", 7)), None);
        assert!(!is_panic_contained());
        assert_eq!(health.failure(), Some("internal error: number 7"));
    }

    #[test]
    fn the_first_reason_stays_and_is_shared() {
        let health = Health::default();
        let other = health.clone();
        other.fail("one".into());
        health.fail("two".into());
        assert_eq!((health.failure(), other.failure()), (Some("one"), Some("one")));
    }
}
