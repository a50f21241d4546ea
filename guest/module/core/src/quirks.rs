//! Decisions of the quirks: which instructions to rewrite, which request of a driver to change. The C half finds, patches and undoes.

pub mod ffi;
pub mod uvm;
pub mod zva;
