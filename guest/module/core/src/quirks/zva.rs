//! Finds the instructions through which a kernel uses `DC ZVA`, and what to put in their place.
//!
//! `DC ZVA` faults on memory that a Mac's hypervisor maps as device memory, which is how a GPU's BAR comes to a guest; amdgpu clears parts of
//! its BAR with the kernel's `memset`. The architecture has a way to say 'do not use it': bit 4 (DZP) of `DCZID_EL0`. So where
//! code asks that register and tests this bit, the question is replaced by the answer. Other readers (the kernel's table of CPU features) are
//! left alone: they would report a CPU that differs from the others. Encodings: Arm ARM (DDI 0487), C5 and C6.

/// Words that a replacement takes at most.
pub const MAX_WORDS: usize = 4;
/// Instructions behind the question within which its bit must be tested.
const TEST_WITHIN: usize = 4;
/// Instructions behind a rewritten question within which a `DC ZVA` counts as covered by it.
const COVERED: usize = 64;
const NOP: u32 = 0xD503_201F;
/// `STP XZR, XZR, [X0, #0]` and so on to `#48`.
const STORES: [u32; 4] = [0xA900_7C1F, 0xA901_7C1F, 0xA902_7C1F, 0xA903_7C1F];
/// Number 31: the zero register or the stack pointer, depending on the instruction.
const ZERO: u32 = 31;

/// Something to rewrite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Site {
    /// Index of its first instruction.
    pub at: u64,
    /// How many instructions: 1 or [`MAX_WORDS`].
    pub words: u32,
    /// Not used.
    pub reserved: u32,
    /// What is there.
    pub old: [u32; MAX_WORDS],
    /// What to put there.
    pub new: [u32; MAX_WORDS],
}

/// What a scan saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Seen {
    /// Questions whose answer decides about `DC ZVA`: rewritten.
    pub tests: u32,
    /// `DC ZVA` with room for stores behind it: rewritten.
    pub roomy: u32,
    /// `DC ZVA` that only a rewritten question leads to: left alone.
    pub covered: u32,
    /// `DC ZVA` that nothing was found for: still used.
    pub uncovered: u32,
    /// Other readers of the register: left alone.
    pub readers: u32,
    /// Sites that there was no room to report.
    pub unreported: u32,
}

/// Scans `count` instructions, which `word` reads, and reports sites to `found` (which is false when it has no room). `stores` says whether
/// a `DC ZVA` clears 64 bytes on this CPU, so that four stores can stand for it.
pub fn scan(
    count: usize,
    word: impl Fn(usize) -> u32,
    stores: bool,
    mut found: impl FnMut(Site) -> bool,
) -> Seen {
    let mut seen = Seen::default();
    let at = |index: usize| (index < count).then(|| word(index));
    let mut last_test: Option<usize> = None;
    let mut index = 0;
    while let Some(one) = at(index) {
        let behind = |n: usize| index.checked_add(n).and_then(at);
        let register = one & 0x1F;
        let mut site = None;
        if asks(one) && tested(register, &behind) {
            seen.tests = seen.tests.saturating_add(1);
            last_test = Some(index);
            site = Some(Site {
                words: 1,
                old: [one, 0, 0, 0],
                new: [answer(register), 0, 0, 0],
                ..Site::default()
            });
        } else if asks(one) {
            seen.readers = seen.readers.saturating_add(1);
        } else if clears(one) {
            let room = stores && register != ZERO && (1..MAX_WORDS).all(|n| behind(n) == Some(NOP));
            let covered = last_test.is_some_and(|test| index.saturating_sub(test) <= COVERED);
            let counter = if room {
                let new = STORES.map(|store| store | (register << 5));
                site = Some(Site { words: 4, old: [one, NOP, NOP, NOP], new, ..Site::default() });
                &mut seen.roomy
            } else if covered {
                &mut seen.covered
            } else {
                &mut seen.uncovered
            };
            *counter = counter.saturating_add(1);
        }
        let site = site.map(|site| Site { at: index as u64, ..site });
        if site.is_some_and(|site| !found(site)) {
            seen.unreported = seen.unreported.saturating_add(1);
        }
        index = index.saturating_add(1);
    }
    seen
}

/// `MRS Xt, DCZID_EL0`; into the zero register it is no question.
fn asks(word: u32) -> bool {
    word & 0xFFFF_FFE0 == 0xD53B_00E0 && word & 0x1F != ZERO
}

/// `DC ZVA, Xt`.
fn clears(word: u32) -> bool {
    word & 0xFFFF_FFE0 == 0xD50B_7420
}

/// `MOVZ Xd, #0x10`: DZP is set.
fn answer(register: u32) -> u32 {
    0xD280_0200 | register
}

/// Whether one of the next instructions is `TBZ` or `TBNZ` on bit 4 of `register`, with no other branch or system instruction before it.
fn tested(register: u32, behind: &impl Fn(usize) -> Option<u32>) -> bool {
    for word in (1..=TEST_WITHIN).map_while(behind) {
        // Bit 24 tells TBZ from TBNZ; bits 31 and 23:19 are the number of the bit.
        if word & 0xFEF8_0000 == 0x3620_0000 {
            return word & 0x1F == register;
        }
        // Op0 = x101: branches, exceptions, system.
        if word & 0x1C00_0000 == 0x1400_0000 {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const MRS_X3: u32 = 0xD53B_00E3;
    /// Of Debian's 6.12: `memset` begins its large case with these.
    const TBNZ_W3_4: u32 = 0x3727_FDE3;
    const ZVA_X8: u32 = 0xD50B_7428;
    const ADD: u32 = 0x8B05_0108;
    const RET: u32 = 0xD65F_03C0;

    fn run(words: &[u32], stores: bool) -> (Vec<Site>, Seen) {
        let mut sites = Vec::new();
        let seen = scan(
            words.len(),
            |i| words[i],
            stores,
            |site| {
                sites.push(site);
                true
            },
        );
        (sites, seen)
    }

    #[test]
    fn memset_of_a_kernel() {
        let words = [ADD, MRS_X3, TBNZ_W3_4, 0x5280_0089, 0x1200_0C65, ZVA_X8, ADD, RET];
        let (sites, seen) = run(&words, true);
        let new = [0xD280_0203, 0, 0, 0];
        assert_eq!(sites, [Site { at: 1, words: 1, reserved: 0, old: [MRS_X3, 0, 0, 0], new }]);
        assert_eq!(seen, Seen { tests: 1, covered: 1, ..Seen::default() });
    }

    #[test]
    fn every_register_and_both_tests() {
        for register in 0..31 {
            for test in [0x3620_0000, 0x3720_0000] {
                let words = [0xD53B_00E0 | register, ADD, ADD, ADD, test | 0x7_FFE0 | register];
                let (sites, _) = run(&words, true);
                assert_eq!(sites.len(), 1, "{register}");
                assert_eq!(sites[0].new[0], 0xD280_0200 | register);
                // One instruction too far.
                assert!(run(&[words[0], ADD, ADD, ADD, ADD, words[4]], true).0.is_empty());
            }
        }
        assert!(run(&[0xD53B_00FF, 0x3620_001F], true).0.is_empty(), "the zero register");
    }

    #[test]
    fn what_does_not_test_the_bit_is_left_alone() {
        for second in [
            0xF901_AC02, // the kernel stores it: a table of CPU features
            0x17FF_FF53, // b
            0x3620_0004, // tests another register
            0x3628_0003, // bit 5
            0xB620_0003, // bit 36
            0x3618_0003, // bit 3
            0xB400_0003, // cbz
            RET,
        ] {
            let (sites, seen) = run(&[MRS_X3, second, TBNZ_W3_4 | 0x1F], true);
            assert_eq!((sites.len(), seen.readers, seen.tests), (0, 1, 0), "{second:#x}");
        }
        // Behind a branch the test belongs to something else; at the end there is none.
        assert_eq!(run(&[MRS_X3, RET, TBNZ_W3_4], true).1.readers, 1);
        assert_eq!(run(&[MRS_X3], true).1.readers, 1);
    }

    #[test]
    fn stores_where_there_is_room() {
        let words = [ZVA_X8, NOP, NOP, NOP, RET];
        let (sites, seen) = run(&words, true);
        // stp xzr, xzr, [x8], [x8, #16], [x8, #32], [x8, #48]
        let new = [0xA900_7D1F, 0xA901_7D1F, 0xA902_7D1F, 0xA903_7D1F];
        assert_eq!(sites, [Site { at: 0, words: 4, reserved: 0, old: [ZVA_X8, NOP, NOP, NOP], new }]);
        assert_eq!((seen.roomy, seen.uncovered), (1, 0));
        for (words, stores) in [
            (&[ZVA_X8, NOP, NOP, RET][..], true),
            (&[ZVA_X8, NOP, NOP], true),
            (&[0xD50B_743F, NOP, NOP, NOP], true), // from the stack pointer it would be something else
            (&[ZVA_X8, NOP, NOP, NOP], false),     // another block size
        ] {
            let (sites, seen) = run(words, stores);
            assert_eq!((sites.len(), seen.uncovered), (0, 1), "{words:x?}");
        }
    }

    #[test]
    fn cover_ends_somewhere() {
        let mut words = vec![MRS_X3, TBNZ_W3_4];
        words.resize(COVERED, ADD);
        words.extend([ZVA_X8, ZVA_X8]);
        let (_, seen) = run(&words, true);
        assert_eq!((seen.covered, seen.uncovered), (1, 1));
        // DC GZVA writes tags and is not ours.
        assert_eq!(run(&[0xD50B_7480], true).1, Seen::default());
    }

    #[test]
    fn no_room_is_counted() {
        let words = [MRS_X3, TBNZ_W3_4].repeat(5);
        let mut room = 2;
        let seen = scan(
            words.len(),
            |i| words[i],
            true,
            |_| {
                room -= 1;
                room >= 0
            },
        );
        assert_eq!((seen.tests, seen.unreported), (5, 3));
    }
}
