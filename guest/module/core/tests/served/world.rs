//! What the threads of the model share: the functions of the slot, and the DMA device.

use outboard_dma_core::served::{Slot, State};

/// Functions of the slot.
pub const FUNCTIONS: usize = 2;
/// Threads that can take part.
pub const THREADS: usize = 7;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ops {
    /// The kernel's own: guest addresses.
    Raw,
    Ours,
    Refusing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Function {
    pub present: bool,
    /// Who holds its lock.
    pub lock: Option<usize>,
    pub driver: bool,
    /// The driver has mapped something, and told its device.
    pub mapped: bool,
    pub master: bool,
    pub ops: Ops,
    pub client: Option<State>,
    pub holds: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub functions: [Function; FUNCTIONS],
    /// The DMA device is in the list, goes, is enabled.
    pub listed: bool,
    pub closing: bool,
    pub enabled: bool,
    /// Something may be running that no driver of now started.
    pub dirty: bool,
    pub references: u32,
    pub going: bool,
    pub gone: bool,
    pub settling: [bool; FUNCTIONS],
    /// Threads that give windows back, or are about to.
    pub trims: u32,
    /// Where each thread is.
    pub at: [u8; THREADS],
}

impl World {
    pub fn new() -> Self {
        let function = Function {
            present: true,
            lock: None,
            driver: false,
            mapped: false,
            master: false,
            ops: Ops::Raw,
            client: None,
            holds: false,
        };
        Self {
            functions: [function; FUNCTIONS],
            listed: false,
            closing: false,
            enabled: false,
            dirty: false,
            references: 0,
            going: false,
            gone: false,
            settling: [false; FUNCTIONS],
            trims: 0,
            at: [0; THREADS],
        }
    }

    pub fn slot(&self, but: usize) -> Slot {
        let count = |states: &[State]| {
            let is = |(index, function): &(usize, &Function)| {
                *index != but && function.client.is_some_and(|state| states.contains(&state))
            };
            self.functions.iter().enumerate().filter(is).count() as u32
        };
        Slot {
            closing: self.closing,
            running: self.enabled,
            foreign: count(&[State::Foreign]),
            using: count(&[State::Served, State::Leaving]),
        }
    }

    /// The host stops and resets the functions and takes all mappings down.
    pub fn reset(&mut self) {
        self.enabled = false;
        self.functions.iter_mut().for_each(|function| function.master = false);
    }
}
