//! The conformance suite: what any back end must do, checked through the traits alone.
//!
//! The unit tests run it on the simulated device, the binary `host-pci-conformance` on a function behind VFIO. Cases that need
//! the device to interrupt or to do DMA need to know how it is told to: an [`Exerciser`].

mod device;
mod dma;
mod exercise;
mod function;
mod interrupts;
mod memory;

#[cfg(test)]
pub(crate) use device::peek;
pub use exercise::{Exerciser, exerciser_for};

use crate::{DmaDomain, HostFunction};
use std::fmt::Display;
use std::sync::Arc;

/// An open function with the domain it is in.
pub struct Subject {
    /// The function.
    pub function: Arc<dyn HostFunction>,
    /// Its domain.
    pub domain: Arc<dyn DmaDomain>,
    /// Other functions of its slot, open beside it.
    pub beside: Vec<Arc<dyn HostFunction>>,
}

/// Opens the function under test; called again and again, never while it is open.
pub type Opener<'a> = &'a dyn Fn() -> Result<Subject, String>;

/// A named check.
#[derive(Clone, Copy)]
pub struct Case {
    /// Unique name, in words joined by `-`.
    pub name: &'static str,
    run: fn(Opener<'_>) -> Outcome,
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The back end does it right.
    Passed,
    /// It does not, and why.
    Failed(String),
    /// It could not be tried, and why.
    Skipped(String),
}

type Outcome = Result<(), Verdict>;

const fn case(name: &'static str, run: fn(Opener<'_>) -> Outcome) -> Case {
    Case { name, run }
}

/// All cases, in order.
pub fn cases() -> Vec<Case> {
    [function::CASES, device::CASES, interrupts::CASES, dma::CASES].concat()
}

impl Case {
    /// Runs the case on what `open` opens.
    pub fn run(&self, open: Opener<'_>) -> Verdict {
        (self.run)(open).err().unwrap_or(Verdict::Passed)
    }
}

fn fail<T>(why: impl Display) -> Result<T, Verdict> {
    Err(Verdict::Failed(why.to_string()))
}

fn skip<T>(why: impl Display) -> Result<T, Verdict> {
    Err(Verdict::Skipped(why.to_string()))
}

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(Verdict::Failed(why())) }
}

fn ensure_eq<T: PartialEq + std::fmt::LowerHex>(what: impl Display, is: T, should_be: T) -> Outcome {
    ensure(is == should_be, || format!("{what} is {is:#x}, not {should_be:#x}"))
}

fn opened(open: Opener<'_>) -> Result<Subject, Verdict> {
    open().or_else(|e| fail(format!("opening: {e}")))
}

/// Names the step that failed.
trait Step<T> {
    fn step(self, name: &str) -> Result<T, Verdict>;
}

impl<T> Step<T> for crate::Result<T> {
    fn step(self, name: &str) -> Result<T, Verdict> {
        self.or_else(|e| fail(format!("{name}: {e}")))
    }
}

impl Subject {
    /// The function with the way to make it interrupt and do DMA.
    fn exerciser(&self) -> Result<Box<dyn Exerciser>, Verdict> {
        let id = self.function.identity();
        match exerciser_for(&id) {
            Some(exerciser) => Ok(exerciser),
            None => skip(format!("how to exercise a {:04x}:{:04x} is not known", id.vendor, id.device)),
        }
    }
}
