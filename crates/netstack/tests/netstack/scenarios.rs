//! Some scenarios of a hostile guest; the fuzz target looks for others.

use crate::scenario::World;
use proptest::prelude::*;
use std::fs;
use std::path::Path;

/// What libFuzzer found worth keeping.
#[test]
fn no_saved_scenario_does_harm() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/frames");
    let world = World::new();
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        world.run(&fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "no scenarios in {}", folder.display());
}

proptest! {
    // The same every time: a test that finds something new tells nobody which change is at fault.
    #![proptest_config(ProptestConfig {
        cases: 300,
        rng_seed: prop::test_runner::RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_scenario_does_harm(input in proptest::collection::vec(any::<u8>(), 0..1500)) {
        World::new().run(&input);
    }
}
