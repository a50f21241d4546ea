//! Config space by table: built once from what the hardware shows, then served by one engine.

mod bars;
mod build;
mod image;
mod registers;
mod rules;
mod table;

pub(crate) use bars::{Bar, Bars};
pub(crate) use build::{Facts, Features, Layout, MsiShape};
pub(crate) use image::Image;
pub(crate) use registers::{BOOT_0, Device, Meaning, Registers};
pub(crate) use table::Table;

/// COMMAND's dword.
pub(crate) const COMMAND: u16 = 0x04;
/// COMMAND: no interrupts by pin.
pub(crate) const COMMAND_INTX_DISABLE: u32 = 1 << 10;
