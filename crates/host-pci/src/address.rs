use std::fmt;
use std::str::FromStr;

/// Where a PCI function is on the host: segment (domain), bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Segment group, 0 on most machines.
    pub segment: u16,
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

/// A slot with all its functions (`01:00`), or one function of it (`01:00.0`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Selection {
    /// Function 0 of the slot, or the one function.
    address: PciAddress,
    whole_slot: bool,
}

impl Selection {
    /// Whether `address` is meant.
    pub fn contains(&self, address: PciAddress) -> bool {
        self.address == if self.whole_slot { PciAddress { function: 0, ..address } } else { address }
    }

    /// Whether a function is meant by both: `01:00` and `01:00.1` overlap.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.address) || other.contains(self.address)
    }
}

impl PciAddress {
    /// The slot it is in, with all its functions.
    pub fn slot(self) -> Selection {
        Selection { address: Self { function: 0, ..self }, whole_slot: true }
    }
}

impl From<PciAddress> for Selection {
    fn from(address: PciAddress) -> Self {
        Self { address, whole_slot: false }
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciAddress { segment, bus, device, .. } = self.address;
        if self.whole_slot { write!(f, "{segment:04x}:{bus:02x}:{device:02x}") } else { self.address.fmt(f) }
    }
}

impl FromStr for Selection {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let slot = || parse(&format!("{text}.0")).map(|address| Self { address, whole_slot: true });
        parse(text).map(Self::from).or_else(slot).ok_or_else(|| AddressError(text.to_owned()))
    }
}

/// Text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no PCI address; write BUS:DEVICE.FUNCTION as `lspci` shows it, such as 01:00.0 or 0000:01:00.0"
)]
pub struct AddressError(String);

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.segment, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        parse(text).ok_or_else(|| AddressError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (slot, function) = text.rsplit_once('.')?;
    let mut parts = slot.rsplit(':');
    let device = hex(parts.next()?, 2, 31)? as u8;
    let bus = hex(parts.next()?, 2, 255)? as u8;
    let segment = parts.next().map_or(Some(0), |s| hex(s, 4, 0xffff))? as u16;
    let function = hex(function, 1, 7)? as u8;
    parts.next().is_none().then_some(PciAddress { segment, bus, device, function })
}

fn hex(text: &str, digits: usize, most: u32) -> Option<u32> {
    let plain = (1..=digits).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    u32::from_str_radix(text, 16).ok().filter(|n| plain && *n <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_they_are_written() {
        let address: PciAddress = "0000:01:1f.7".parse().unwrap();
        assert_eq!(address, PciAddress { segment: 0, bus: 1, device: 31, function: 7 });
        assert_eq!(address.to_string(), "0000:01:1f.7");
        assert_eq!("01:1f.7".parse(), Ok(address));
        for text in
            ["", "01:00", "1:20.0", "01:00.8", "0:0:0:0.0", "+1:00.0", "01:00.0 ", "g1:00.0", "00001:00:00.0"]
        {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_slot_is_all_its_functions() {
        let function: PciAddress = "0000:01:1f.7".parse().unwrap();
        let slot: Selection = "01:1f".parse().unwrap();
        assert_eq!(slot.to_string(), "0000:01:1f");
        assert_eq!(function.slot(), slot);
        assert!(slot.contains(function) && slot.contains(PciAddress { function: 0, ..function }));
        assert!(!slot.contains(PciAddress { device: 30, ..function }));
        let select = |text: &str| text.parse::<Selection>().unwrap();
        for (a, b, both) in [
            ("01:1f", "01:1f", true),
            ("01:1f", "01:1f.7", true),
            ("01:1f.7", "01:1f.7", true),
            ("01:1f.7", "01:1f.0", false),
            ("01:1f", "01:1e.0", false),
            ("01:1f", "02:1f", false),
        ] {
            assert_eq!(
                (select(a).overlaps(&select(b)), select(b).overlaps(&select(a))),
                (both, both),
                "{a} {b}"
            );
        }
        let one: Selection = "01:1f.7".parse().unwrap();
        assert_eq!(one.to_string(), function.to_string());
        assert!(one.contains(function) && !one.contains(PciAddress { function: 6, ..function }));
        for text in ["", "01", "01:00.", "01:00.0.0", "01:00.x", "nvme"] {
            assert!(text.parse::<Selection>().is_err(), "{text}");
        }
    }
}
