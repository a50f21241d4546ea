//! Packages of the distribution: from the mirror that the machine itself uses, into the system or beside it.

mod apt;
mod mirrors;
pub mod rust;
pub mod setup;

pub use apt::{Apt, Status, UNSTABLE, unpack};
