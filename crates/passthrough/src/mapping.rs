//! The parts of BARs that the guest reaches without an exit.

use crate::{GuestMapper, config::Bar};
use outboard_bus::{error_limited, warn_limited};
use outboard_host_pci::{GRANULE, HostFunction, MappedBar};
use outboard_pci::BAR_COUNT;
use std::sync::Arc;

/// A piece of a BAR in this process.
#[derive(Clone, Default)]
enum Piece {
    #[default]
    Untried,
    /// The host does not map it: it is trapped.
    Trapped,
    Mapped(Arc<dyn MappedBar>),
}

/// A piece in the guest.
struct Shown {
    ipa: u64,
    bar: Arc<dyn MappedBar>,
}

/// What is mapped of a function's BARs.
#[derive(Default)]
pub(crate) struct Mappings {
    /// Kept while the guest moves its BARs and turns decoding on and off.
    host: [Vec<Piece>; BAR_COUNT],
    guest: [Vec<Shown>; BAR_COUNT],
    /// Guest address of each BAR that is shown, as far as it can be mapped.
    at: [Option<u64>; BAR_COUNT],
    /// What could not be taken out of the guest: kept for good, since the guest may still reach it.
    stuck: Vec<Arc<dyn MappedBar>>,
}

impl Mappings {
    /// Shows BAR `index` at `ipa`, as far as that goes; the MMIO bus has the rest.
    pub(crate) fn show(
        &mut self,
        host: &dyn HostFunction,
        mapper: &dyn GuestMapper,
        (index, bar): (usize, &Bar),
        ipa: u64,
    ) {
        self.hide(mapper, index);
        // A BAR is aligned to its size, so this only happens to one that is smaller and has no pieces anyway.
        if !ipa.is_multiple_of(GRANULE) {
            return;
        }
        self.at[index] = Some(ipa);
        self.host[index].resize_with(bar.pieces.len(), Piece::default);
        for (range, piece) in bar.pieces.iter().zip(&mut self.host[index]) {
            if matches!(piece, Piece::Untried) {
                *piece = match host.map_bar(index, range.start, range.end - range.start) {
                    Ok(mapped) => Piece::Mapped(mapped),
                    Err(error) => {
                        warn_limited!(
                            "{}: {error}; the guest's accesses to it are slow",
                            host.identity().address
                        );
                        Piece::Trapped
                    }
                };
            }
            let Piece::Mapped(mapped) = piece else { continue };
            let ipa = ipa + range.start;
            match mapper.map(ipa, Arc::clone(mapped)) {
                Ok(()) => self.guest[index].push(Shown { ipa, bar: Arc::clone(mapped) }),
                Err(error) => warn_limited!(
                    "{}: BAR {index} cannot be mapped at {ipa:#x}: {error}; the guest's accesses to it are slow",
                    host.identity().address
                ),
            }
        }
    }

    /// Takes BAR `index` out of the guest.
    pub(crate) fn hide(&mut self, mapper: &dyn GuestMapper, index: usize) {
        self.at[index] = None;
        for Shown { ipa, bar } in self.guest[index].drain(..) {
            if let Err(error) = mapper.unmap(ipa, bar.len()) {
                error_limited!(
                    "BAR {index} at {ipa:#x} could not be taken from the guest: {error}; it stays mapped"
                );
                self.stuck.push(bar);
            }
        }
    }

    /// Where the root complex has put the BARs that are in the guest.
    pub(crate) fn shown(&self) -> [Option<u64>; BAR_COUNT] {
        self.at
    }

    /// Takes all BARs out of the guest.
    pub(crate) fn hide_all(&mut self, mapper: &dyn GuestMapper) {
        (0..BAR_COUNT).for_each(|index| self.hide(mapper, index));
    }

    /// Gives up the host's mappings of a device that is gone; nothing is shown any more.
    pub(crate) fn forget(&mut self, mapper: &dyn GuestMapper) {
        self.hide_all(mapper);
        self.host = Default::default();
    }
}
