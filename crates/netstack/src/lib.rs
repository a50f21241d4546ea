//! A user-mode network for one guest: Ethernet frames on one side, the host's ordinary sockets on the other, no
//! privileges needed. IPv4 with DHCP, a DNS relay, TCP, UDP, ping, and ports of the host that lead into the guest.
//!
//! TCP towards the guest is smoltcp's; everything around it, the address translation above all, is here.
//! The guest is not trusted: tables and buffers are bounded, and what it sends is dropped where it makes no sense.

pub mod address;
mod assign;
mod datagram;
mod dhcp;
mod dns;
mod flow;
mod fragment;
mod frame;
mod guest;
mod host_net;
mod options;
mod resolver;
mod sockopt;
mod stack;
mod tcp;
mod window;

pub use assign::{AssignError, assign};
pub use frame::{Frame, MAX_FRAME, PartialChecksum};
pub use options::{Forward, NetOptions, OptionError, Protocol};
pub use stack::{Checksum, NetError, Stack};
