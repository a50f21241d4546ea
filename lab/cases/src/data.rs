//! Bytes that both sides can make by themselves, so that any block read back can be checked without sending it.

use sha2::{Digest, Sha256};

/// Bytes of one block of a pattern.
pub const BLOCK: usize = 4096;

/// A seed's endless pattern of blocks, each different from the others.
#[derive(Clone, Copy, Debug)]
pub struct Pattern(pub u64);

impl Pattern {
    /// Writes block `index` into `block`, whatever its length (a multiple of 8).
    pub fn block(self, index: u64, block: &mut [u8]) {
        // SplitMix64 (Steele, Lea, Flood, 2014): cheap, and no two positions agree by accident.
        let mut state = self.0.wrapping_add(index.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        for word in block.chunks_exact_mut(8) {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes());
        }
    }

    /// Fills `buffer` with the blocks from `first` on. Its length is a multiple of [`BLOCK`].
    pub fn blocks(self, first: u64, buffer: &mut [u8]) {
        assert!(buffer.len().is_multiple_of(BLOCK), "patterns come in whole blocks");
        for (index, block) in (first..).zip(buffer.chunks_exact_mut(BLOCK)) {
            self.block(index, block);
        }
    }

    /// The first block from `first` on that `buffer` does not hold, if any.
    pub fn first_difference(self, first: u64, buffer: &[u8]) -> Option<u64> {
        let mut wanted = [0; BLOCK];
        (first..).zip(buffer.chunks_exact(BLOCK)).find_map(|(index, block)| {
            self.block(index, &mut wanted);
            (block != wanted).then_some(index)
        })
    }

    /// The checksum of the first `len` bytes, a multiple of [`BLOCK`].
    pub fn sha256(self, len: u64) -> String {
        self.sha256_from(0, len / BLOCK as u64)
    }

    /// The checksum of `count` blocks from block `first` on.
    pub fn sha256_from(self, first: u64, count: u64) -> String {
        let mut sum = Sha256::new();
        let mut block = [0; BLOCK];
        for index in first..first + count {
            self.block(index, &mut block);
            sum.update(block);
        }
        hex(&sum.finalize())
    }
}

/// Lower-case hexadecimal digits of a checksum.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A buffer whose start is aligned to 4 KiB, as `O_DIRECT` wants it.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` zero bytes.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start, len }
    }

    /// The bytes.
    pub fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    /// The bytes, to change.
    pub fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_is_found_at_its_block() {
        let pattern = Pattern(7);
        let mut data = vec![0; 8 * BLOCK];
        pattern.blocks(100, &mut data);
        assert_eq!(pattern.first_difference(100, &data), None);
        assert_eq!(pattern.first_difference(101, &data), Some(101), "a shifted pattern differs at once");
        data[3 * BLOCK + 17] ^= 1;
        assert_eq!(pattern.first_difference(100, &data), Some(103));
    }

    #[test]
    fn aligned_buffers_are_aligned() {
        let buffer = Aligned::new(512);
        assert_eq!(buffer.get().as_ptr() as usize % BLOCK, 0);
        assert_eq!(buffer.get().len(), 512);
    }
}
