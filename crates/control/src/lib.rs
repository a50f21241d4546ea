//! Asking and telling a running VM: one Unix socket each, `NAME.sock` in a folder that only its user may enter.
//!
//! One connection carries one [`Request`] and one reply, each a line of JSON. The server side ([`Server`]) runs on threads of its own and
//! never makes the VM wait; the client side is [`running`] and [`request`].

mod client;
mod error;
mod folder;
mod line;
mod name;
mod protocol;
mod server;

pub use client::{Found, request, running};
pub use error::Error;
pub use folder::Folder;
pub use name::Name;
pub use protocol::{
    Answer, Counters, DeviceFunction, Disk, DmaCounters, FailedDevice, GuestState, Network, Request, Slot,
    SlotState, VmStatus,
};
pub use server::{Handler, Server};

#[cfg(test)]
mod tests;
