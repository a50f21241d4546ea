//! What a guest may see and do of each capability, as data. Where Linux's vfio (drivers/vfio/pci/vfio_pci_config.c) is laxer, the reason
//! stands beside the rule. A capability that has no rule here is not shown.

/// Length of a capability in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Len {
    /// Always this.
    Fixed(u16),
    /// In the byte at this offset of it.
    Byte(u16),
    /// In bits 31:20 of its second dword (PCIe 7.9.5.2, 7.9.6.2).
    Vendor,
    /// MSI: by its address width and mask bits (PCIe 7.7.1).
    Msi,
    /// PCI Express: by its version and port type (PCIe 7.5.3).
    Express,
    /// Resizable BAR: by its count (PCIe 7.8.6).
    ResizableBar,
}

/// A register of a capability that is not simply read from the hardware.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    /// Offset of its dword within the capability.
    pub(crate) at: u16,
    /// As in [`super::table::Dword`].
    pub(crate) emulated: u32,
    pub(crate) writable: u32,
    pub(crate) passed: u32,
    pub(crate) no_write_back: u32,
    /// Emulated bits that read as zero after reset; the others as the hardware had them.
    pub(crate) clear: u32,
}

/// A capability that is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    pub(crate) id: u16,
    pub(crate) len: Len,
    /// What is not named passes as it is, both ways.
    pub(crate) raw: bool,
    pub(crate) fields: &'static [Field],
}

const fn at(at: u16) -> Field {
    Field { at, emulated: 0, writable: 0, passed: 0, no_write_back: 0, clear: 0 }
}

impl Field {
    const fn emulated(self, bits: u32) -> Self {
        Self { emulated: self.emulated | bits, ..self }
    }
    /// Emulated, and the guest writes it.
    const fn writable(self, bits: u32) -> Self {
        Self { emulated: self.emulated | bits, writable: self.writable | bits, ..self }
    }
    /// Emulated, zero after reset.
    const fn clear(self, bits: u32) -> Self {
        Self { emulated: self.emulated | bits, clear: self.clear | bits, ..self }
    }
    const fn passed(self, bits: u32) -> Self {
        Self { passed: self.passed | bits, ..self }
    }
    const fn no_write_back(self, bits: u32) -> Self {
        Self { no_write_back: self.no_write_back | bits, ..self }
    }
    /// Status bits in the hardware that a written 1 clears.
    const fn clears(self, bits: u32) -> Self {
        self.passed(bits).no_write_back(bits)
    }
}

const fn shown(id: u16, len: Len, fields: &'static [Field]) -> Rule {
    Rule { id, len, raw: false, fields }
}
const fn raw(id: u16, len: Len) -> Rule {
    Rule { id, len, raw: true, fields: &[] }
}

pub(crate) const PM: u16 = 0x01;
pub(crate) const MSI: u16 = 0x05;
pub(crate) const EXPRESS: u16 = 0x10;
pub(crate) const MSIX: u16 = 0x11;
pub(crate) const ADVANCED_FEATURES: u16 = 0x13;
pub(crate) const RESIZABLE_BAR: u16 = 0x15;

/// DEVCTL's bits that stay here: error reporting (messages would fill the host's AER log at the guest's pace), payload size (both ends of
/// the link must agree, and the guest sees only one), extended tags (the host's bridges must take them), read request size (written to
/// the hardware with a floor), function level reset (a reset by the host).
const DEVCTL_EMULATED: u32 = 0xf7ef;
const DEVCTL_WRITABLE: u32 = 0x71ef;
/// Relaxed ordering and no-snoop.
const DEVCTL_PASSED: u32 = 0x0810;
/// DEVCTL2 without ARI forwarding.
const DEVCTL2_PASSED: u32 = 0x7fdf;

pub(crate) static STANDARD: &[Rule] = &[
    // Only D0 and D3hot, no PME: nobody would wake the host for it, and D3cold is not the guest's to enter. The state is
    // changed by the function, which first takes the BARs away.
    shown(PM, Len::Fixed(8), &[at(0).clear(0xfe00 << 16), at(4).emulated(0xffff).clear(0x9f03)]),
    // Reading only: the flag bit with a 1 would write the board's EEPROM, for good.
    shown(0x03, Len::Fixed(8), &[at(0).passed(0x7fff << 16).no_write_back(0x8000 << 16)]),
    shown(MSI, Len::Msi, &[]),
    raw(0x09, Len::Byte(2)),
    shown(
        EXPRESS,
        Len::Express,
        &[
            // No slot behind an endpoint.
            at(0x00).emulated(0xffff << 16).clear(1 << 24),
            // No phantom functions: their requests would carry another's identity.
            at(0x04).emulated(u32::MAX).clear(3 << 3),
            at(0x08)
                .emulated(DEVCTL_EMULATED)
                .writable(DEVCTL_WRITABLE)
                .clear(1 << 15)
                .passed(DEVCTL_PASSED)
                .no_write_back(1 << 15)
                .clears(0xf << 16),
            at(0x10).passed(0x0fcb),
            at(0x14).clear(u32::MAX),
            at(0x18).clear(u32::MAX),
            at(0x1c).clear(u32::MAX),
            at(0x20).clear(u32::MAX),
            at(0x24).clear(1 << 5),
            at(0x28).clear(1 << 5).passed(DEVCTL2_PASSED),
            at(0x30).passed(0xffff),
            at(0x34).clear(u32::MAX),
            at(0x38).clear(u32::MAX),
        ],
    ),
    // The table is emulated; the hardware's enable bit is the host's.
    shown(
        MSIX,
        Len::Fixed(12),
        &[
            at(0).emulated(0xffff << 16).writable(0xc000 << 16).clear(0xc000 << 16),
            at(4).emulated(u32::MAX),
            at(8).emulated(u32::MAX),
        ],
    ),
    shown(0x12, Len::Fixed(8), &[]),
    // FLR, as in DEVCTL.
    shown(ADVANCED_FEATURES, Len::Fixed(8), &[at(0).emulated(0xffff << 16), at(4).clear(0x00ff)]),
];

/// Hidden among others, because they are the host's: ATS (translated requests pass the IOMMU unchecked), PASID, PRI, ACS, ARI,
/// SR-IOV, multicast, DPC, PTM, L1 substates, virtual channels, data object exchange.
pub(crate) static EXTENDED: &[Rule] = &[
    // AER: the guest clears status; masks and severities are its own copy, since the host's AER driver works by the real ones. No ECRC.
    shown(
        0x01,
        Len::Fixed(0x2c),
        &[
            at(0x04).clears(u32::MAX),
            at(0x08).writable(u32::MAX),
            at(0x0c).writable(u32::MAX),
            at(0x10).clears(u32::MAX),
            at(0x14).writable(u32::MAX),
            at(0x18).clear(0x1e0),
        ],
    ),
    shown(0x03, Len::Fixed(12), &[]),
    // Power budgeting: the index of what is to be read.
    shown(0x04, Len::Fixed(16), &[at(4).passed(0xff)]),
    raw(0x0b, Len::Vendor),
    shown(RESIZABLE_BAR, Len::ResizableBar, &[]),
    // Latency tolerance, data link feature, 16 and 32 GT/s.
    shown(0x18, Len::Fixed(8), &[]),
    raw(0x23, Len::Vendor),
    shown(0x25, Len::Fixed(12), &[]),
    shown(0x26, Len::Fixed(0x20), &[]),
    shown(0x2a, Len::Fixed(0x20), &[]),
];

/// The rule for `id`, if it is shown.
pub(crate) fn find(rules: &'static [Rule], id: u16) -> Option<&'static Rule> {
    rules.iter().find(|rule| rule.id == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bit_is_both_emulated_and_passed_and_what_is_written_here_is_emulated() {
        for rule in STANDARD.iter().chain(EXTENDED) {
            for field in rule.fields {
                assert_eq!(field.emulated & field.passed, 0, "{:#x}+{:#x}", rule.id, field.at);
                assert_eq!(field.writable & !field.emulated, 0, "{:#x}+{:#x}", rule.id, field.at);
                assert_eq!(field.clear & !field.emulated, 0, "{:#x}+{:#x}", rule.id, field.at);
                assert!(field.at.is_multiple_of(4));
            }
        }
    }

    #[test]
    fn each_capability_has_one_rule() {
        for rules in [STANDARD, EXTENDED] {
            for rule in rules {
                assert_eq!(rules.iter().filter(|r| r.id == rule.id).count(), 1, "{:#x}", rule.id);
            }
        }
    }
}
