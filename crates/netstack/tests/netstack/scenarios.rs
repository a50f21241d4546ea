//! Some scenarios of a hostile guest; the fuzz target looks for others.

use crate::scenario::World;
use proptest::prelude::*;
use std::fs;
use std::path::Path;

/// What libFuzzer found worth keeping.
#[test]
fn no_saved_scenario_does_harm() {
    let world = World::new();
    seeds().iter().for_each(|seed| world.run(seed));
}

/// The saved scenarios.
fn seeds() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/frames");
    let mut paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    // The order of a folder is any.
    paths.sort();
    assert!(!paths.is_empty(), "no scenarios in {}", folder.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

proptest! {
    // The same every time: a test that finds something new tells nobody which change is at fault.
    #![proptest_config(ProptestConfig {
        cases: 100,
        rng_seed: prop::test_runner::RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_crossing_of_scenarios_does_harm(
        parts in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..5),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..10),
    ) {
        let seeds = seeds();
        let mut input = Vec::new();
        for (seed, cut) in parts {
            let seed = seed.get(&seeds);
            input.extend_from_slice(&seed[..1 + cut.index(seed.len().max(1))]);
        }
        for (at, value) in changes {
            let at = at.index(input.len());
            input[at] = value;
        }
        World::new().run(&input);
    }
}
