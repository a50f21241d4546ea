mod abuse;
mod bars;
mod config;
mod device;
mod interrupts;
mod lifecycle;
mod simulated;
mod slot;
