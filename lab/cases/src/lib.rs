//! The lab's end-to-end cases, and what both sides of them share: see `docs/lab.md`.
//!
//! A case has two halves that stand side by side in one file under `cases/`: the host half runs in the emulated host
//! with [`host::Host`], the guest half in the guest with [`guest::Guest`]. `lab-agent` runs both.

#![allow(clippy::print_stdout, clippy::print_stderr)] // A developer's tool: nothing runs on after its output has failed.

mod case;
mod cases;
pub mod data;
pub mod guest;
pub mod host;
pub mod protocol;

pub use case::{Case, Group, all, find};
