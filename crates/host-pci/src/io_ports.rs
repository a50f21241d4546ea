//! What a guest can have of a function's I/O ports.

/// Base address registers of an endpoint (PCIe 7.5.1.2.1).
const BARS: usize = 6;

/// What a guest can have of a function's I/O ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoPorts {
    /// The function has none.
    #[default]
    None,
    /// All of them, by [`crate::HostFunction::bar_read`] and [`crate::HostFunction::bar_write`] of 1, 2 and 4 bytes.
    Reachable,
    /// Not all: the host's firmware and kernel gave some no address.
    Unassigned,
    /// None: this host has no I/O ports, as a Mac.
    Absent,
}

impl IoPorts {
    /// Those of a function whose base address registers read `registers`; `reachable` says of a BAR of ports, by its index, if the host has
    /// given it an address.
    pub(crate) fn of(registers: [u32; BARS], reachable: impl Fn(usize) -> bool) -> Self {
        let bars: Vec<usize> = io_bars(registers);
        if bars.is_empty() {
            Self::None
        } else if !HOST_HAS_IO_PORTS {
            Self::Absent
        } else if bars.into_iter().all(reachable) {
            Self::Reachable
        } else {
            Self::Unassigned
        }
    }

    /// Text for the user where a guest does not have all that the function has: what is missing, what comes of it, and the next step.
    pub fn warning(self) -> Option<&'static str> {
        match self {
            Self::None | Self::Reachable => None,
            Self::Unassigned => Some(
                "it has I/O ports that this host has given no address, so a guest does not see them, and a driver that needs them fails or \
                 crashes the guest's kernel: move the card to another slot, or boot the host with pci=realloc",
            ),
            Self::Absent => Some(
                "it has I/O ports, which this host has not (no Mac has), so a guest does not see them, and a driver that needs them fails or \
                 crashes the guest's kernel (e1000 on an 82540EM does): use a card that works without",
            ),
        }
    }
}

/// A Mac's CPUs and bridges have no I/O space.
const HOST_HAS_IO_PORTS: bool = !cfg!(target_os = "macos");

/// Indices of the registers that are BARs of I/O ports; the upper half of a 64-bit BAR may look like one.
fn io_bars(registers: [u32; BARS]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut index = 0;
    while let Some(register) = registers.get(index) {
        // Bit 0 is set for I/O; bits 2:1 say that a memory BAR takes two registers.
        let is_io = register & 1 != 0;
        if is_io {
            found.push(index);
        }
        index += if !is_io && register & 0b110 == 0b100 { 2 } else { 1 };
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_registers_of_ports_count() {
        assert_eq!(io_bars([0; 6]), []);
        assert_eq!(io_bars([0x8000_0000, 0x1001, 1, 0, 0, 0xe1]), [1, 2, 5]);
        assert_eq!(
            io_bars([0x4, 0x1, 0xc, 0x5, 0x1, 0x4]),
            [4],
            "upper halves are no registers of their own"
        );
    }

    #[test]
    fn ports_without_an_address_are_said() {
        let registers = [0xf000_0000, 0x1001, 0, 0, 1, 0];
        assert_eq!(IoPorts::of([0xf000_0000; 6], |_| false), IoPorts::None);
        if HOST_HAS_IO_PORTS {
            assert_eq!(IoPorts::of(registers, |_| true), IoPorts::Reachable);
            assert_eq!(IoPorts::of(registers, |index| index == 1), IoPorts::Unassigned);
        } else {
            assert_eq!(IoPorts::of(registers, |_| true), IoPorts::Absent);
        }
        for ports in [IoPorts::Unassigned, IoPorts::Absent] {
            assert!(ports.warning().is_some());
        }
        assert!(IoPorts::Reachable.warning().is_none() && IoPorts::None.warning().is_none());
    }
}
