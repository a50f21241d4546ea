use proptest::prelude::*;

use super::*;

fn small() -> Dart {
    Dart::new(Config {
        first: 0x8000_0000,
        last: 0x8000_0000 + 16 * GRANULE - 1,
        bytes: 16 * GRANULE,
        entries: 6,
        return_delay: 100,
    })
    .expect("config")
}

#[test]
fn places_at_the_first_fit_and_returns_late() {
    let mut dart = small();
    let a = dart.map(0, 0, 4 * GRANULE).unwrap();
    let b = dart.map(0, GRANULE, 8 * GRANULE).unwrap();
    assert_eq!((a.bus, b.bus), (0x8000_0000, 0x8000_0000 + 4 * GRANULE));
    dart.unmap(10, a.handle, Release::Driver).unwrap();
    // The hole at the front is not there yet: 3 go behind b, 4 more must wait.
    assert_eq!(dart.map(20, 0, 3 * GRANULE).unwrap().bus, b.bus + b.len);
    assert_eq!(dart.map(20, 0, 4 * GRANULE), Err(MapError::Returning { len: 4 * GRANULE, until: 110 }));
    assert_eq!(dart.map(110, 0, 4 * GRANULE).unwrap().bus, 0x8000_0000);
    assert_eq!(dart.panicked(), None, "space in pieces or on its way is no probing");
}

#[test]
fn tells_fragmentation_from_exhaustion() {
    let mut dart = small();
    let all: Vec<_> = (0..4).map(|_| dart.map(0, 0, 4 * GRANULE).unwrap()).collect();
    dart.unmap(0, all[0].handle, Release::Driver).unwrap();
    dart.unmap(0, all[2].handle, Release::Driver).unwrap();
    let error = dart.map(200, 0, 5 * GRANULE).unwrap_err();
    assert_eq!(error, MapError::Fragmented { len: 5 * GRANULE, largest: 4 * GRANULE, holes: 2 });
    assert_eq!(dart.panicked(), None);
    let error = dart.map(200, 0, 9 * GRANULE).unwrap_err();
    assert!(matches!(error, MapError::Bytes { .. }));
    assert_eq!(dart.panicked(), Some(Panic::LimitProbed(error)));
}

#[test]
fn entries_run_out_before_bytes() {
    let mut dart = small();
    for _ in 0..6 {
        dart.map(0, 0, GRANULE).unwrap();
    }
    assert_eq!(dart.map(0, 0, GRANULE), Err(MapError::Entries { limit: 6 }));
    assert!(matches!(dart.panicked(), Some(Panic::LimitProbed(_))));
}

#[test]
fn refuses_what_is_not_whole_granules() {
    let mut dart = small();
    for (start, len) in [(1, GRANULE), (0, GRANULE + 1), (0, 0), (u64::MAX - GRANULE + 1, GRANULE)] {
        assert_eq!(dart.map(0, start, len), Err(MapError::Misaligned { start, len }));
    }
    assert!(Dart::new(Config { first: 1, ..Config::MAC }).is_err());
    assert!(Dart::new(Config { entries: 0, ..Config::MAC }).is_err());
    assert!(Dart::new(Config { last: 0, ..Config::MAC }).is_err());
    assert!(Dart::new(Config::MAC).is_ok());
}

#[test]
fn tear_down_of_an_active_device_panics_a_mac() {
    let mut dart = small();
    let a = dart.map(0, 0, GRANULE).unwrap();
    let b = dart.map(0, 0, GRANULE).unwrap();
    dart.set_device_active(true);
    dart.unmap(0, a.handle, Release::Driver).unwrap();
    assert_eq!(dart.panicked(), None);
    dart.unmap(0, b.handle, Release::TearDown).unwrap();
    assert_eq!(dart.panicked(), Some(Panic::UnmappedWhileActive { handle: b.handle }));
    assert_eq!(dart.unmap(0, b.handle, Release::Driver), Err(UnknownHandle(b.handle)));

    let mut dart = small();
    let a = dart.map(0, 0, GRANULE).unwrap();
    dart.unmap(0, a.handle, Release::TearDown).unwrap();
    dart.note_device_mapping(false);
    assert_eq!(dart.panicked(), None);
    dart.note_device_mapping(true);
    assert_eq!(dart.panicked(), Some(Panic::ExecutableDevice));
}

#[test]
fn accesses_translate_across_neighbours_or_are_stray() {
    let mut dart = small();
    let a = dart.map(0, 0x10_0000, GRANULE).unwrap();
    let b = dart.map(0, 0x40_0000, GRANULE).unwrap();
    assert_eq!(dart.access(a.bus + 8, 8), Some(0x10_0008));
    assert_eq!(dart.access(a.bus + GRANULE - 4, 8), Some(0x10_0000 + GRANULE - 4));
    assert_eq!(dart.access(b.bus, GRANULE), Some(0x40_0000));
    assert_eq!(dart.panicked(), None);
    assert_eq!(dart.access(b.bus, GRANULE + 1), None);
    assert_eq!(dart.panicked(), Some(Panic::StrayAccess { bus: b.bus, len: GRANULE + 1 }));
}

proptest! {
    /// Mappings never overlap, stay in the window, and all space is back in one piece at the end.
    #[test]
    fn keeps_its_books(steps in prop::collection::vec((any::<bool>(), 1u64..6, 0usize..8, 0u64..60), 1..200)) {
        let mut dart = small();
        let (mut live, mut now) = (Vec::new(), 0);
        for (map, granules, pick, wait) in steps {
            now += wait;
            if map {
                if let Ok(mapping) = dart.map(now, 0, granules * GRANULE) {
                    live.push(mapping);
                }
            } else if !live.is_empty() {
                let mapping: Mapping = live.swap_remove(pick % live.len());
                dart.unmap(now, mapping.handle, Release::Driver).unwrap();
            }
            let mut sorted = live.clone();
            sorted.sort_by_key(|m| m.bus);
            prop_assert!(sorted.windows(2).all(|w| w[0].bus + w[0].len <= w[1].bus));
            prop_assert!(sorted.iter().all(|m| m.bus >= 0x8000_0000 && m.bus + m.len <= 0x8000_0000 + 16 * GRANULE));
            let usage = dart.usage(now);
            prop_assert_eq!(usage.bytes, live.iter().map(|m| m.len).sum::<u64>());
            prop_assert_eq!(usage.entries as usize, live.len());
        }
        for mapping in live {
            dart.unmap(now, mapping.handle, Release::Driver).unwrap();
        }
        let usage = dart.usage(now + 100);
        prop_assert_eq!((usage.bytes, usage.returning, usage.holes, usage.largest_hole), (0, 0, 1, 16 * GRANULE));
    }
}
