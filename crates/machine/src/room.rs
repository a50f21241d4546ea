//! Whether the BARs of the host's devices find room in the guest.

use crate::Error;
use outboard_host_pci::{HostBar, HostBarKind, HostFunction, PciAddress};
use outboard_platform::layout::{self, AddressSpace};
use std::sync::Arc;

/// Windows of a bridge come in units of this (PCIe 7.5.1.3.6).
const UNIT: u64 = 1 << 20;

/// The memory BARs of a slot that a bridge has to place in one of its windows.
struct Bars {
    /// Bytes, in the window's unit.
    sum: u64,
    /// The largest, with its function and index.
    largest: Option<(u64, PciAddress, usize)>,
}

/// Refuses devices whose BARs do not fit the guest's PCIe windows: the guest would leave some unassigned, and its driver fail. `slots` are the
/// functions of each slot.
///
/// # Errors
/// [`Error::Room`], with the largest BAR of those that are too many or too large.
pub(crate) fn check<'a>(
    slots: impl Iterator<Item = &'a [Arc<dyn HostFunction>]> + Clone,
    space: &AddressSpace,
) -> Result<(), Error> {
    for (high, range) in [(false, &layout::PCI_WINDOW_32), (true, &space.pci_window_64)] {
        let slots: Vec<Bars> = slots.clone().map(|functions| Bars::of(functions, high)).collect();
        let need = slots.iter().fold(0_u64, |sum, bars| sum.saturating_add(bars.sum));
        let size = range.end - range.start;
        let largest = slots.iter().filter_map(|bars| bars.largest).max();
        if let Some((len, address, bar)) = largest.filter(|_| need > size) {
            let window = if high { "64-bit" } else { "32-bit" };
            return Err(Error::Room {
                address,
                bar,
                len_mib: len >> 20,
                need_mib: need >> 20,
                window,
                size_mib: size >> 20,
            });
        }
    }
    Ok(())
}

impl Bars {
    fn of(functions: &[Arc<dyn HostFunction>], high: bool) -> Self {
        let mut all = Self { sum: 0, largest: None };
        for function in functions {
            for (index, bar) in function.bars().into_iter().enumerate() {
                let Some(HostBar { len, .. }) = bar.filter(|bar| is_high(bar.kind) == Some(high)) else {
                    continue;
                };
                all.sum = all.sum.saturating_add(len);
                all.largest = all.largest.max(Some((len, function.identity().address, index)));
            }
        }
        all.sum = all.sum.div_ceil(UNIT).saturating_mul(UNIT);
        all
    }
}

/// Whether a BAR goes above 4 GiB: behind a bridge only prefetchable ones do (PCIe 7.5.1.2.1). `None` for I/O ports: their window has room
/// for more than 31 slots can have that keep to 256 ports a BAR (PCI 6.2.5.1).
fn is_high(kind: HostBarKind) -> Option<bool> {
    match kind {
        HostBarKind::Io => None,
        HostBarKind::Memory32 { .. } => Some(false),
        HostBarKind::Memory64 { prefetchable } => Some(prefetchable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outboard_host_pci::DmaPolicy;
    use outboard_host_pci::simulated::SimulatedKind;

    #[test]
    fn what_fits_into_no_window_is_refused_with_the_largest_bar() {
        let space = AddressSpace::new(512 << 20, 40).unwrap();
        let open = |kind: SimulatedKind| kind.open(DmaPolicy::Identity).unwrap().0;
        let check = |slots: &[Vec<Arc<dyn HostFunction>>]| check(slots.iter().map(Vec::as_slice), &space);
        let gpu = || open(SimulatedKind::Rtx5090);
        assert!(check(&[]).is_ok());
        assert!(check(&[gpu(), open(SimulatedKind::Endpoint)]).is_ok());
        let Err(Error::Room { bar: 2, len_mib, window: "64-bit", .. }) =
            check(&[open(SimulatedKind::LargeBar)])
        else {
            panic!("1 TiB does not fit into 512 GiB");
        };
        assert_eq!(len_mib, 1 << 20);
        // 64 MiB and a little below 4 GiB each: seven fit into 512 MiB, eight do not.
        assert!(check(&(0..7).map(|_| gpu()).collect::<Vec<_>>()).is_ok());
        let eight = check(&(0..8).map(|_| gpu()).collect::<Vec<_>>());
        assert!(matches!(eight, Err(Error::Room { bar: 0, window: "32-bit", .. })), "{eight:?}");
    }
}
