//! What every back end needs and no user of the traits does: the rules of mappings and of interrupt numbers, checked
//! in one place, and the v2m frame's registers.

mod gic;
mod mappings;
mod slots;
mod v2m;

pub use gic::{check_gic, check_msi, check_spi};
pub use mappings::Mappings;
pub use slots::Slots;
pub use v2m::MsiFrame;
