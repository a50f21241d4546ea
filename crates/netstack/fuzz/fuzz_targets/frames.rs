#![no_main]
//! A hostile guest at the whole network stack, smoltcp and the host's sockets included.

#[path = "../../tests/netstack/frames.rs"]
#[allow(dead_code)] // The tests use the rest.
mod frames;
#[path = "../../tests/netstack/scenario.rs"]
mod scenario;

use libfuzzer_sys::fuzz_target;
use scenario::World;
use std::cell::OnceCell;

thread_local! {
    static WORLD: OnceCell<World> = const { OnceCell::new() };
}

fuzz_target!(|input: &[u8]| WORLD.with(|world| world.get_or_init(World::new).run(input)));
