//! The stack as a guest and the host's programs see it.

mod datagrams;
mod frames;
mod guest;
mod hostile;
mod reach;
mod scenario;
mod scenarios;
mod segments;
mod tcp;
