//! The table of states (`served.rs`) in every order of what can happen at the same time: drivers that bind, fail and go, functions that are pulled,
//! the module that comes and goes. The threads take the locks that the kernel and the C half take (`served.c`); all their interleavings are walked.

#[path = "served/world.rs"]
mod world;

use outboard_dma_core::served::*;
use std::collections::HashSet;
use world::{FUNCTIONS, Function, Ops, THREADS, World};

/// What the checker must find, as a test of itself. `None` is the module as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// A driver's release leaves bus master on.
    Loud,
    /// A refused driver keeps the kernel's own operations.
    RawRefusal,
    /// A failed probe does not wait for its lock.
    NoSettling,
    /// The DMA device is forgotten first and reset afterwards.
    LateReset,
    /// A start does not ask who still has mappings.
    BlindStart,
}

/// Binds a driver to function 0 whose probe may fail, as the world says.
const BINDER: usize = 0;
/// Likewise to function 1, and its driver goes again.
const OTHER: usize = 1;
const LOADER: usize = 2;
const UNLOADER: usize = 3;
const SETTLER: usize = 4;
const PULLER: usize = 5;
/// The host, which resets the DMA device: the device in the slot is another one.
const HOST: usize = 6;
const END: u8 = u8::MAX;

struct Checker {
    fault: Fault,
    /// Probes of function 0 fail.
    failing: bool,
    /// Threads that take part.
    active: [bool; THREADS],
    seen: HashSet<World>,
    violation: Option<String>,
}

impl Checker {
    fn check(fault: Fault, failing: bool, active: &[usize]) -> Option<String> {
        let mut on = [false; THREADS];
        active.iter().for_each(|thread| on[*thread] = true);
        on[SETTLER] = true;
        let mut checker = Self { fault, failing, active: on, seen: HashSet::new(), violation: None };
        checker.walk(World::new());
        checker.violation
    }

    fn walk(&mut self, start: World) {
        let mut open = vec![start];
        while let Some(world) = open.pop() {
            if self.violation.is_some() || !self.seen.insert(world) {
                continue;
            }
            let mut moved = false;
            for thread in 0..THREADS {
                let mut next = world;
                if self.active[thread] && self.step(thread, &mut next) {
                    moved = true;
                    self.look(&next);
                    open.push(next);
                }
            }
            if !moved {
                self.at_rest(&world);
            }
        }
    }

    fn fail(&mut self, what: &str, world: &World) {
        self.violation.get_or_insert_with(|| format!("{what}: {world:?}"));
    }

    /// What must never be.
    fn look(&mut self, world: &World) {
        for function in &world.functions {
            if world.enabled
                && function.present
                && function.master
                && function.driver
                && function.ops == Ops::Raw
            {
                self.fail("a driver's raw addresses reach the host", world);
            }
            if world.gone && function.ops != Ops::Raw {
                self.fail("operations of a module that is gone", world);
            }
            if function.ops == Ops::Ours && !matches!(function.client, Some(State::Served | State::Leaving)) {
                self.fail("operations of a function that is forgotten", world);
            }
        }
    }

    /// What must not be when nobody can do anything any more.
    fn at_rest(&mut self, world: &World) {
        let held = world.functions.iter().filter(|function| function.holds).count() as u32;
        if held != world.references {
            self.fail("references to the module that nobody holds", world);
        }
        if world.functions.iter().any(|function| function.client == Some(State::Leaving)) {
            self.fail("a failed probe that nobody settles", world);
        }
        // The unloader may be refused: then it ends as well.
        let ended = (0..THREADS).all(|thread| {
            !self.active[thread] || thread == SETTLER || thread == HOST || world.at[thread] == END
        });
        if !ended {
            self.fail("nobody can go on", world);
        }
    }

    /// One event of a function, with what the table says is to be done, under the one lock. True: idle windows are to be given back.
    fn happen(&mut self, world: &mut World, index: usize, event: Event) -> bool {
        let Some(state) = world.functions[index].client else { return false };
        let (after, mut acts) = next(state, event);
        if self.fault == Fault::Loud {
            acts &= !QUIET;
        }
        if self.fault == Fault::NoSettling && acts & SETTLE != 0 {
            acts = acts & !SETTLE | RESTORE | LEAKS | TRIM | DROP_MODULE;
        }
        let going = world.going;
        let function = &mut world.functions[index];
        function.client = Some(if self.fault == Fault::NoSettling && after == State::Leaving {
            State::Free
        } else {
            after
        });
        if acts & HOLD_MODULE != 0 && !going && !function.holds {
            function.holds = true;
            world.references += 1;
        }
        if acts & QUIET != 0 {
            function.master = false;
        }
        if acts & SERVE != 0 {
            function.ops = Ops::Ours;
        }
        if acts & REFUSE != 0 && self.fault != Fault::RawRefusal {
            function.ops = Ops::Refusing;
        }
        if acts & RESTORE != 0 {
            function.ops = Ops::Raw;
        }
        if acts & DROP_MODULE != 0 && function.holds {
            function.holds = false;
            world.references -= 1;
        }
        if acts & FORGET != 0 {
            function.client = None;
        }
        if acts & SETTLE != 0 {
            world.settling[index] = true;
        }
        if acts & TRIM != 0 {
            world.trims += 1;
        }
        acts & TRIM != 0
    }

    /// Windows go back to the host: no function may still write what its driver has left. While the DMA device is off, the host holds them back.
    fn trim(&mut self, world: &mut World) {
        world.trims -= 1;
        if world.gone {
            self.fail("windows are given back by a module that is gone", world);
        }
        if world.enabled
            && world.functions.iter().any(|function| function.present && function.master && !function.driver)
        {
            self.fail("windows are given back under a function that may write", world);
        }
    }

    /// The DMA device starts, with nothing mapped.
    fn start(&mut self, world: &mut World) {
        let stray = world
            .functions
            .iter()
            .any(|function| function.present && function.master && function.client != Some(State::Served));
        if world.dirty || stray {
            world.reset();
            world.dirty = false;
        }
        let uses = |function: &Function| function.mapped && function.ops == Ops::Ours;
        if world.functions.iter().any(uses) {
            self.fail("a new table of windows under a driver's mappings", world);
        }
        world.enabled = true;
    }

    /// The kernel tells that a driver is about to be probed.
    fn bind(&mut self, world: &mut World, index: usize) {
        if !world.listed {
            return;
        }
        world.functions[index].client.get_or_insert(State::Free);
        let mut slot = world.slot(index);
        if self.fault == Fault::BlindStart {
            slot.using = 0;
        }
        let event = match admit(slot) {
            Admission::Go => Event::Bind,
            Admission::Start => {
                self.start(world);
                Event::Bind
            }
            Admission::Closing | Admission::Foreign | Admission::Lost => Event::Denied,
        };
        self.happen(world, index, event);
    }

    /// The driver's work: it maps, and lets its device go.
    fn works(&mut self, world: &mut World, index: usize) {
        let function = &mut world.functions[index];
        // Nothing is mapped by operations that refuse everything; what a driver does then is in vain.
        function.mapped = function.ops != Ops::Refusing;
        function.master = function.ops != Ops::Refusing;
    }

    /// The kernel frees what the driver had, through the operations that are there.
    fn frees(&mut self, world: &mut World, index: usize) {
        if world.functions[index].ops != Ops::Raw && world.gone {
            self.fail("memory is freed through a module that is gone", world);
        }
        let function = &mut world.functions[index];
        if self.fault == Fault::NoSettling
            && function.mapped
            && function.ops == Ops::Raw
            && function.client.is_some()
        {
            self.fail("memory is freed through other operations than it came from", world);
        }
        world.functions[index].mapped = false;
    }

    /// One step of a thread; `false` where it has to wait or is at its end.
    fn step(&mut self, thread: usize, world: &mut World) -> bool {
        match thread {
            BINDER => self.step_driver(thread, world, 0, self.failing, false),
            OTHER => self.step_driver(thread, world, 1, false, true),
            LOADER => self.step_loader(world),
            UNLOADER => self.step_unloader(world),
            SETTLER => self.step_settler(world),
            PULLER => self.step_puller(world),
            _ => Self::step_host(world),
        }
    }

    fn lock(world: &mut World, index: usize, thread: usize) -> bool {
        let free = world.functions[index].lock.is_none();
        if free {
            world.functions[index].lock = Some(thread);
        }
        free
    }

    /// A driver comes to a function, and perhaps goes again, as the kernel does it (`really_probe`, `__device_release_driver`).
    fn step_driver(
        &mut self,
        thread: usize,
        world: &mut World,
        index: usize,
        fails: bool,
        goes: bool,
    ) -> bool {
        let at = world.at[thread];
        if at == END {
            return false;
        }
        let mut to = at + 1;
        match at {
            0 => {
                if !Self::lock(world, index, thread) {
                    return false;
                }
                if !world.functions[index].present || world.functions[index].driver {
                    world.functions[index].lock = None;
                    to = END;
                }
            }
            1 => world.functions[index].driver = true,
            2 => self.bind(world, index),
            3 => self.works(world, index),
            4 if !fails => {
                world.functions[index].lock = None;
                to = if goes { 10 } else { END };
            }
            4 => {
                self.happen(world, index, Event::Failed);
            }
            5 => self.frees(world, index),
            6 => {
                world.functions[index].driver = false;
                world.functions[index].lock = None;
                to = END;
            }
            10 => {
                if !Self::lock(world, index, thread) {
                    return false;
                }
                if !world.functions[index].driver {
                    world.functions[index].lock = None;
                    to = END;
                }
            }
            11..=14 => return self.step_release(thread, world, index, at - 11, 11),
            _ => return false,
        }
        world.at[thread] = to;
        true
    }

    /// The steps in which a driver goes; the lock is held, and is let go at the end.
    fn step_release(&mut self, thread: usize, world: &mut World, index: usize, part: u8, base: u8) -> bool {
        let mut to = base + part + 1;
        match part {
            0 => self.frees(world, index),
            1 => {
                world.functions[index].driver = false;
                if !self.happen(world, index, Event::Unbound) {
                    to += 1;
                }
            }
            // Not under the one lock.
            2 => self.trim(world),
            _ => {
                world.functions[index].lock = None;
                to = END;
            }
        }
        world.at[thread] = to;
        true
    }

    fn step_loader(&mut self, world: &mut World) -> bool {
        if world.at[LOADER] != 0 || world.gone {
            return false;
        }
        // All of it under the one lock; functions whose own lock is to be had are looked at closer.
        let mut foreign = false;
        let mut takes = true;
        for index in 0..FUNCTIONS {
            let function = world.functions[index];
            if function.present && function.driver {
                world.functions[index].client = Some(State::Free);
                self.happen(world, index, Event::Found);
                foreign = true;
                takes &= function.lock.is_none() && !function.mapped && !function.master;
            }
        }
        if foreign && takes {
            for index in 0..FUNCTIONS {
                if world.functions[index].client == Some(State::Foreign) {
                    self.happen(world, index, Event::Taken);
                }
            }
            self.start(world);
        } else if foreign {
            world.dirty = true;
        } else {
            self.start(world);
        }
        world.listed = true;
        world.at[LOADER] = END;
        true
    }

    fn step_unloader(&mut self, world: &mut World) -> bool {
        let at = world.at[UNLOADER];
        match at {
            0 => {
                if world.at[LOADER] != END {
                    return false;
                }
                // While it is used it stays.
                if world.references > 0 {
                    world.at[UNLOADER] = END;
                    return true;
                }
                world.going = true;
                world.at[UNLOADER] = 1;
            }
            1 => {
                world.closing = true;
                world.at[UNLOADER] = 2;
            }
            2 => {
                let busy = |function: &Function| {
                    matches!(function.client, Some(State::Served | State::Refused | State::Leaving))
                };
                match world.functions.iter().position(busy) {
                    Some(index) => world.at[UNLOADER] = 10 + 10 * index as u8,
                    None => {
                        if self.fault != Fault::LateReset {
                            world.reset();
                        }
                        world.listed = false;
                        world.functions.iter_mut().for_each(|function| function.client = None);
                        world.at[UNLOADER] = 3;
                    }
                }
            }
            3 => {
                // Waits for the one that settles, and for those that give windows back.
                if world.settling.iter().any(|settling| *settling) || world.trims > 0 {
                    return false;
                }
                world.reset();
                world.gone = true;
                world.at[UNLOADER] = END;
            }
            10 | 20 => {
                let index = usize::from(at / 10 - 1);
                if !Self::lock(world, index, UNLOADER) {
                    return false;
                }
                world.at[UNLOADER] = at + 1;
            }
            _ if at != END => {
                let index = usize::from(at / 10 - 1);
                let base = at / 10 * 10 + 1;
                if world.functions[index].driver || at > base {
                    self.step_release(UNLOADER, world, index, at - base, base);
                    if world.at[UNLOADER] == END {
                        world.at[UNLOADER] = 2;
                    }
                    return true;
                }
                if world.functions[index].client == Some(State::Leaving)
                    && self.happen(world, index, Event::Settled)
                {
                    self.trim(world);
                }
                world.functions[index].lock = None;
                world.at[UNLOADER] = 2;
            }
            _ => return false,
        }
        true
    }

    /// The worker behind a failed probe.
    fn step_settler(&mut self, world: &mut World) -> bool {
        let Some(index) = world.settling.iter().position(|settling| *settling) else { return false };
        if world.functions[index].lock.is_some() {
            return false;
        }
        if world.functions[index].client == Some(State::Leaving) && self.happen(world, index, Event::Settled)
        {
            self.trim(world);
        }
        world.settling[index] = false;
        true
    }

    fn step_host(world: &mut World) -> bool {
        if world.at[HOST] == END || !world.enabled {
            return false;
        }
        world.reset();
        world.at[HOST] = END;
        true
    }

    /// Function 1 is pulled: its driver goes, then itself.
    fn step_puller(&mut self, world: &mut World) -> bool {
        let at = world.at[PULLER];
        match at {
            0 => {
                if !Self::lock(world, 1, PULLER) {
                    return false;
                }
                world.at[PULLER] = if world.functions[1].driver { 1 } else { 4 };
            }
            1..=3 => {
                self.step_release(PULLER, world, 1, at - 1, 1);
            }
            4 => {
                world.functions[1].lock = None;
                world.functions[1].present = false;
                world.at[PULLER] = 5;
            }
            5 => {
                self.happen(world, 1, Event::Removed);
                world.at[PULLER] = END;
            }
            _ => return false,
        }
        true
    }
}

/// Who takes part, and whether the probe of function 0 fails.
const SCENES: [(&[usize], bool); 8] = [
    (&[BINDER, OTHER, LOADER], false),
    (&[BINDER, OTHER, LOADER], true),
    (&[BINDER, OTHER, LOADER, UNLOADER], false),
    (&[BINDER, OTHER, LOADER, UNLOADER], true),
    (&[BINDER, OTHER, LOADER, PULLER], true),
    (&[BINDER, OTHER, LOADER, UNLOADER, PULLER], true),
    (&[BINDER, OTHER, LOADER, HOST], true),
    (&[BINDER, OTHER, LOADER, UNLOADER, PULLER, HOST], true),
];

#[test]
fn no_order_of_events_leaves_dma_without_permission() {
    for (threads, failing) in SCENES {
        let violation = Checker::check(Fault::None, failing, threads);
        assert_eq!(violation, None, "{threads:?}, probes fail: {failing}");
    }
}

#[test]
fn the_walk_finds_the_faults_that_there_were() {
    for fault in [Fault::Loud, Fault::RawRefusal, Fault::NoSettling, Fault::LateReset, Fault::BlindStart] {
        let found =
            SCENES.iter().any(|(threads, failing)| Checker::check(fault, *failing, threads).is_some());
        assert!(found, "{fault:?} is not found");
    }
}

#[test]
fn windows_never_go_back_before_the_bus_master_is_off() {
    for state in [State::Free, State::Foreign, State::Served, State::Refused, State::Leaving] {
        for event in (0..8).map(Event::from_code) {
            let (_, acts) = next(state, event);
            assert!(acts & TRIM == 0 || acts & QUIET != 0, "{state:?}, {event:?}");
            assert!(
                !matches!(event, Event::Unbound | Event::Failed)
                    || state == State::Leaving
                    || acts & QUIET != 0
            );
        }
    }
}
