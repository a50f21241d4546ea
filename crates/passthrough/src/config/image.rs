//! The function's config space as it was when it was opened, and the walks over its capability chains.

use outboard_bus::Width;
use outboard_host_pci::{HostFunction, Result};

/// End of the part that every function has; extended capabilities follow (PCIe 7.6.1).
pub(crate) const CONVENTIONAL_END: u16 = 0x100;
/// End of config space.
pub(crate) const EXTENDED_END: u16 = 0x1000;
/// 192 bytes of at least 4 each: no sound chain is longer.
const MAX_STANDARD: usize = 48;
/// A bound for broken hardware; 3,840 bytes of at least 8 each could hold 480, real devices have about twenty.
const MAX_EXTENDED: usize = 256;

/// A copy of config space: 256 or 4,096 bytes.
#[derive(Clone, Debug)]
pub(crate) struct Image(Vec<u8>);

/// A capability in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capability {
    /// 8 bits for a standard one, 16 for an extended one.
    pub(crate) id: u16,
    /// Version of an extended one.
    pub(crate) version: u8,
    /// Where it starts; a multiple of 4.
    pub(crate) at: u16,
}

impl Image {
    /// Reads all of it from the hardware.
    pub(crate) fn read(host: &dyn HostFunction) -> Result<Self> {
        let len = if host.config_len() >= EXTENDED_END { EXTENDED_END } else { CONVENTIONAL_END };
        let mut bytes = Vec::with_capacity(usize::from(len));
        for offset in (0..len).step_by(4) {
            bytes.extend_from_slice(&host.config_read(offset, Width::B4)?.to_le_bytes());
        }
        Ok(Self(bytes))
    }

    #[cfg(test)]
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub(crate) fn len(&self) -> u16 {
        self.0.len() as u16
    }

    /// The byte at `offset`; zero beyond the end.
    pub(crate) fn u8(&self, offset: u16) -> u8 {
        self.0.get(usize::from(offset)).copied().unwrap_or(0)
    }

    pub(crate) fn u16(&self, offset: u16) -> u16 {
        u16::from_le_bytes([self.u8(offset), self.u8(offset + 1)])
    }

    pub(crate) fn u32(&self, offset: u16) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// The standard chain, in its order, up to the first pointer that leads nowhere or back.
    pub(crate) fn standard(&self) -> Vec<Capability> {
        let mut found: Vec<Capability> = Vec::new();
        if self.u16(0x06) & 1 << 4 == 0 {
            return found;
        }
        let mut at = u16::from(self.u8(0x34)) & 0xfc;
        while at >= 0x40 && found.len() < MAX_STANDARD && found.iter().all(|c| c.at != at) {
            match self.u8(at) {
                0xff => break,
                id => found.push(Capability { id: id.into(), version: 0, at }),
            }
            at = u16::from(self.u8(at + 1)) & 0xfc;
        }
        found
    }

    /// The extended chain, without null capabilities (id 0), up to the first pointer that leads nowhere or back.
    pub(crate) fn extended(&self) -> Vec<Capability> {
        let mut found: Vec<Capability> = Vec::new();
        let mut visited = Vec::new();
        let mut at = CONVENTIONAL_END;
        while (CONVENTIONAL_END..self.len()).contains(&at)
            && visited.len() < MAX_EXTENDED
            && !visited.contains(&at)
        {
            visited.push(at);
            let header = self.u32(at);
            if header == 0 || header as u16 == 0xffff {
                break;
            }
            if header as u16 != 0 {
                found.push(Capability { id: header as u16, version: (header >> 16 & 0xf) as u8, at });
            }
            at = (header >> 20) as u16 & 0xffc;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(writes: &[(u16, u32)], len: usize) -> Image {
        let mut bytes = vec![0; len];
        for (at, value) in writes {
            bytes[usize::from(*at)..usize::from(*at) + 4].copy_from_slice(&value.to_le_bytes());
        }
        Image::from_bytes(bytes)
    }

    #[test]
    fn b11_a_chain_that_bites_its_own_tail_ends() {
        let cyclic = image(&[(0x04, 1 << 20), (0x34, 0x40), (0x40, 0x5001), (0x50, 0x4005)], 256);
        assert_eq!(cyclic.standard().iter().map(|c| c.at).collect::<Vec<_>>(), [0x40, 0x50]);
        let own_tail = image(&[(0x04, 1 << 20), (0x34, 0x40), (0x40, 0x4009)], 256);
        assert_eq!(own_tail.standard().len(), 1);
        let cyclic = image(&[(0x100, 0x1401_0001), (0x140, 0x1001_0003)], 4096);
        assert_eq!(cyclic.extended().iter().map(|c| c.at).collect::<Vec<_>>(), [0x100, 0x140]);
    }

    #[test]
    fn b11_all_ones_and_pointers_into_the_header_end_the_walk() {
        let ones = Image::from_bytes(vec![0xff; 4096]);
        assert_eq!((ones.standard().len(), ones.extended().len()), (0, 0));
        let header = image(&[(0x04, 1 << 20), (0x34, 0x40), (0x40, 0x1009), (0x100, 0x0401_0003)], 4096);
        assert_eq!((header.standard().len(), header.extended().len()), (1, 1));
    }

    proptest! {
        #[test]
        fn walks_over_rubbish_end_and_stay_inside(bytes in prop::collection::vec(any::<u8>(), 4096)) {
            let image = Image::from_bytes(bytes);
            let standard = image.standard();
            prop_assert!(standard.len() <= MAX_STANDARD && standard.iter().all(|c| (0x40..0x100).contains(&c.at)));
            let extended = image.extended();
            prop_assert!(extended.len() <= MAX_EXTENDED && extended.iter().all(|c| (0x100..0x1000).contains(&c.at)));
        }
    }
}
