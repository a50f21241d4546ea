//! Whether the host's function can still be used.

use outboard_bus::{Event, error_limited, warn_limited};
use outboard_host_pci::{Error, PciAddress};
use std::sync::OnceLock;

/// Why a function is no longer used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It was pulled, or its link went down.
    Gone,
    /// It is there but cannot be trusted: it did not come back from a reset. It must not be handed out again until it was
    /// released, and its DMA mappings must stay until it is powered off.
    Broken(String),
}

/// Goes from usable to lost, once.
pub(crate) struct Health {
    address: PciAddress,
    loss: OnceLock<Loss>,
    lost: Event,
}

impl Health {
    pub(crate) fn new(address: PciAddress) -> std::io::Result<Self> {
        Ok(Self { address, loss: OnceLock::new(), lost: Event::new()? })
    }

    pub(crate) fn loss(&self) -> Option<&Loss> {
        self.loss.get()
    }

    pub(crate) fn usable(&self) -> bool {
        self.loss.get().is_none()
    }

    /// Readable from the loss on.
    pub(crate) fn event(&self) -> &Event {
        &self.lost
    }

    /// Ends it; the first reason stays, and is logged once.
    pub(crate) fn lose(&self, loss: Loss) {
        if self.loss.set(loss).is_err() {
            return;
        }
        match self.loss.get() {
            Some(Loss::Broken(why)) => {
                error_limited!(
                    "{}: {why}; the guest sees it unplugged. Power-cycle it before it is used again",
                    self.address
                );
            }
            _ => warn_limited!(
                "{} is gone: the guest sees it unplugged, and reads all-ones from it",
                self.address
            ),
        }
        self.lost.signal();
    }

    /// Notes what an error of the host says about the function; other failures are the caller's to log.
    pub(crate) fn note(&self, error: &Error) {
        match error {
            Error::Gone(_) => self.lose(Loss::Gone),
            Error::ResetFailed { why, .. } => {
                self.lose(Loss::Broken(format!("it did not come back from a reset ({why})")))
            }
            _ => {}
        }
    }
}
