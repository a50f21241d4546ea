//! The device driven as a guest drives it: by its registers and guest RAM.

mod batches;
mod hostile;
mod life;
mod nth;
mod published;
mod rig;
