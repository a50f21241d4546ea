//! What becomes of a function that a DMA device serves, from one driver to the next: the table of its states. The C half does what the table
//! says, under one lock; `tests/served.rs` tries the table in every order of what can happen at the same time.

/// What a function is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum State {
    /// It has no driver, or none that is known.
    Free = 0,
    /// Its driver was bound before the module came: its DMA does not go through the module, and the host holds all of the slot back.
    Foreign = 1,
    /// Its driver has the module's operations.
    Served = 2,
    /// Its driver has operations that refuse everything.
    Refused = 3,
    /// The driver's probe has failed, and the kernel may still free what the driver had, through the operations.
    Leaving = 4,
}

/// What happens to a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Event {
    /// The module came and found a driver.
    Found = 0,
    /// That driver has not begun with DMA, and nothing else is in the way of serving it.
    Taken = 1,
    /// A driver is about to be probed, and can be served.
    Bind = 2,
    /// A driver is about to be probed, and cannot be served.
    Denied = 3,
    /// The driver has gone, and so has all that the kernel frees for it.
    Unbound = 4,
    /// The driver's probe has failed.
    Failed = 5,
    /// The failed probe is over: its lock was to be had.
    Settled = 6,
    /// The function is gone.
    Removed = 7,
}

/// The module may not go: a reference to it is taken.
pub const HOLD_MODULE: u32 = 1 << 0;
/// Bus master off, and what is under way drained. Stands before everything that gives memory back.
pub const QUIET: u32 = 1 << 1;
/// The operations become the module's.
pub const SERVE: u32 = 1 << 2;
/// The operations become those that refuse everything.
pub const REFUSE: u32 = 1 << 3;
/// The operations become what they were.
pub const RESTORE: u32 = 1 << 4;
/// What the driver left mapped is counted.
pub const LEAKS: u32 = 1 << 5;
/// Idle windows are given back, once the lock is free.
pub const TRIM: u32 = 1 << 6;
/// Somebody waits for the end of the failed probe, and then tells [`Event::Settled`].
pub const SETTLE: u32 = 1 << 7;
/// The reference to the module is dropped.
pub const DROP_MODULE: u32 = 1 << 8;
/// The function is forgotten.
pub const FORGET: u32 = 1 << 9;

/// A state's successor, and what is to be done, in the order of the bits. What cannot happen changes nothing that is in use.
pub const fn next(state: State, event: Event) -> (State, u32) {
    use Event::{Bind, Denied, Failed, Found, Removed, Settled, Taken, Unbound};
    use State::{Foreign, Free, Leaving, Refused, Served};
    match (state, event) {
        (Free, Found) => (Foreign, 0),
        (Free | Foreign, Bind) | (Foreign, Taken) => (Served, HOLD_MODULE | SERVE),
        (Free | Foreign, Denied) => (Refused, HOLD_MODULE | REFUSE),
        // Of a driver that had no operations of the module's.
        (Free | Foreign, Unbound | Failed) => (Free, QUIET),
        (Free | Foreign, Removed) => (Free, LEAKS | FORGET),
        (Served, Unbound) | (Leaving, Settled | Unbound) => {
            (Free, QUIET | RESTORE | LEAKS | TRIM | DROP_MODULE)
        }
        (Refused, Unbound) => (Free, QUIET | RESTORE | DROP_MODULE),
        (Served | Refused, Failed) => (Leaving, QUIET | SETTLE),
        // The next driver's probe comes after the end of the failed one's.
        (Leaving, Bind) => (Served, SERVE | LEAKS),
        (Leaving, Denied) => (Refused, REFUSE | LEAKS),
        (Served | Refused | Leaving, Removed) => (Free, RESTORE | LEAKS | DROP_MODULE | FORGET),
        (Served, Bind) => (Served, SERVE),
        (Served | Refused, Denied) => (Refused, REFUSE),
        (Refused, Bind) => (Served, SERVE),
        (state, Found | Taken | Settled | Failed) => (state, 0),
    }
}

/// What is known of a slot when a driver of one of its functions is about to be served.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slot {
    /// The DMA device goes.
    pub closing: bool,
    /// The DMA device is enabled.
    pub running: bool,
    /// Functions, the one in question left out, that are [`State::Foreign`].
    pub foreign: u32,
    /// Likewise, [`State::Served`] or [`State::Leaving`]: what they have mapped stands in the table of windows.
    pub using: u32,
}

/// Whether a driver can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Admission {
    /// At once.
    Go = 0,
    /// Once the DMA device has been started, with nothing mapped.
    Start = 1,
    /// No: the DMA device goes.
    Closing = 2,
    /// No: another function of the slot has a driver from before.
    Foreign = 3,
    /// No: the DMA device was reset under another function's driver.
    Lost = 4,
}

/// Decides it.
pub const fn admit(slot: Slot) -> Admission {
    match slot {
        Slot { closing: true, .. } => Admission::Closing,
        Slot { foreign: 1.., .. } => Admission::Foreign,
        Slot { running: true, .. } => Admission::Go,
        Slot { using: 1.., .. } => Admission::Lost,
        _ => Admission::Start,
    }
}

impl State {
    /// The state of that number.
    pub const fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Foreign,
            2 => Self::Served,
            3 => Self::Refused,
            4 => Self::Leaving,
            _ => Self::Free,
        }
    }
}

impl Event {
    /// The event of that number.
    pub const fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Found,
            1 => Self::Taken,
            2 => Self::Bind,
            3 => Self::Denied,
            4 => Self::Unbound,
            5 => Self::Failed,
            6 => Self::Settled,
            _ => Self::Removed,
        }
    }
}
