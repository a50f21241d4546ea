//! What every back end needs and no user of the traits does: the rules of mappings and of interrupt numbers, checked
//! in one place, the v2m frame's registers, and a look at the instruction that a guest is at.

mod gic;
mod mappings;
mod slots;
mod stage1;
mod v2m;

pub use gic::{check_gic, check_msi, check_spi};
pub use mappings::Mappings;
pub use slots::Slots;
pub use stage1::{SignedLoad, Stage1};
pub use v2m::MsiFrame;
