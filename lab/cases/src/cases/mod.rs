//! The cases, each with its two halves.

mod boot;
mod demo;

use crate::case::Case;

pub(crate) fn table() -> Vec<Case> {
    let mut all = Vec::new();
    all.extend(demo::cases());
    all.extend(boot::cases());
    all
}
