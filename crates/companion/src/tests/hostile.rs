//! A guest that does what it likes: the process lives, and nothing but guest RAM is ever mapped ([`super::rig::Checked`] sees to that).

use super::rig::*;
use outboard_abi as abi;
use outboard_abi::published::Layout;
use outboard_abi::{ENTRY_BYTES, Entry, Status};
use outboard_bus::Width;
use outboard_pci::{ConfigAccess, PciFunction, RootPort};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_queue_inside_its_own_mappings_and_over_itself() {
    let rig = Rig::new();
    // Entries that map the queue itself; the results fall into what is mapped.
    let own = [map(QUEUE, PAGE), map(QUEUE, PAGE), map(RAM.start, RAM.end - RAM.start)];
    let (status, done) = rig.run(&own);
    assert_eq!((status, done.len()), (Status::Ok, 3));
    // Two queues over one another: each takes what it finds when it is rung.
    let second = abi::QUEUE_FIRST + abi::QUEUE_STRIDE;
    rig.write(second, Width::B8, QUEUE + 64);
    rig.put(QUEUE, &done.iter().map(|e| unmap(e.handle)).collect::<Vec<_>>());
    rig.write(second + abi::QUEUE_DOORBELL, Width::B4, 2);
    rig.write(abi::QUEUE_FIRST + abi::QUEUE_DOORBELL, Width::B4, 3);
    assert_eq!(rig.status(), Status::NoSuchHandle);
    assert_eq!(rig.stats()[..4], [0, 0, 3, 3]);
}

#[test]
fn handles_of_another_device_name_nothing() {
    let one = Rig::new();
    let domain = outboard_host_pci::simulated::SimulatedDomain::mac(DART).unwrap();
    let config = crate::Config {
        port: 6,
        vcpus: 1,
        ram: one.ram.clone(),
        limits: outboard_host_pci::DmaDomain::limits(&*domain),
    };
    let other = crate::Companion::new(config).unwrap();
    assert!(other.attach(domain.clone(), one.slot.clone()));
    let write = |at: u32, width, value: u64| other.bar_write(0, at.into(), width, value).unwrap();
    write(abi::CONTROL, Width::B4, 1);
    write(abi::QUEUE_FIRST, Width::B8, QUEUE + 0x4000);
    let mine = one.map(RAM.start, PAGE);
    for handle in [mine.handle, mine.handle + 1, 1, 0] {
        one.put(QUEUE + 0x4000, &[unmap(handle)]);
        write(abi::QUEUE_FIRST + abi::QUEUE_DOORBELL, Width::B4, 1);
        assert_eq!(one.get(QUEUE + 0x4000, 1)[0].status, Status::NoSuchHandle.code());
    }
    assert_eq!(one.unmap(mine.handle), Status::Ok);
    other.detach(false);
}

/// Counts a thread out, also when it panics.
struct Ends<'a>(&'a AtomicU64);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All vCPUs ring all bells, switch the device on and off, and write into the entries while they are read.
#[test]
fn a_storm_of_doorbells_with_entries_that_change() {
    let rig = Rig::new();
    let function = rig.companion.published(Layout::A, Arc::new(RootPort::new(5)));
    for queue in 0..4 {
        let base = abi::QUEUE_FIRST + queue * abi::QUEUE_STRIDE;
        rig.write(base, Width::B8, QUEUE + u64::from(queue % 2) * 0x4000);
    }
    let running = AtomicU64::new(4);
    let (rig, function, running) = (&rig, &function, &running);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The other vCPU's thread that changes what was checked.
            let mut value = 1u64;
            while running.load(Ordering::Relaxed) > 0 {
                value = value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = QUEUE + value % 0x8000 / 8 * 8;
                let word =
                    [value, RAM.start + value % 64 * PAGE, PAGE, 1, 2, u64::MAX][(value >> 60) as usize % 6];
                rig.ram.write_obj(word, GuestAddress(at)).unwrap();
            }
        });
        for vcpu in 0..4u32 {
            scope.spawn(move || {
                let _ends = Ends(running);
                for round in 0..400u32 {
                    let mine = abi::QUEUE_FIRST + (vcpu + round) % 4 * abi::QUEUE_STRIDE;
                    rig.put(
                        QUEUE + u64::from(vcpu % 2) * 0x4000,
                        &[map(RAM.start + u64::from(vcpu) * PAGE, PAGE)],
                    );
                    let later = if round % 3 == 0 { abi::QUEUE_DOORBELL_LATER } else { abi::QUEUE_DOORBELL };
                    rig.write(mine + later, Width::B4, u64::from(round % 258));
                    if round % 50 == 49 {
                        rig.write(abi::CONTROL, Width::B4, u64::from(vcpu % 2 + 1));
                        rig.write(abi::CONTROL, Width::B4, 1);
                        rig.write(mine, Width::B8, QUEUE);
                    }
                    let command = QUEUE + u64::from(round % 256) * 32;
                    function.bar_write(0, 0x10, Width::B4, command).unwrap();
                    function.bar_write(0, 0x18, Width::B4, 1).unwrap();
                }
            });
        }
    });
    rig.write(abi::CONTROL, Width::B4, abi::CONTROL_RESET.into());
    assert_eq!((rig.domain.mapped(), rig.stats()[0], rig.stats()[1]), ((0, 0), 0, 0));
    let stats = rig.stats();
    assert!(stats[2] > 0 && stats[2] == stats[3], "{stats:?}");
    rig.no_mistakes();
}

/// Three vCPUs ring without end for batches that nobody waits for. The fourth goes on beside them: its registers answer, its batches are done, and
/// the machine's own thread empties the slot and fills it. No doorbell gets more work done than one batch.
#[test]
fn an_endless_storm_holds_nobody_up() {
    let rig = Rig::new();
    let entries: Vec<Entry> = (0..256).map(unmap).collect();
    rig.put(QUEUE + 0x4000, &entries);
    let storming = [1, 2, 3].map(|queue| abi::QUEUE_FIRST + queue * abi::QUEUE_STRIDE);
    storming.iter().for_each(|queue| rig.write(*queue, Width::B8, QUEUE + 0x4000));
    let (running, mut own) = (AtomicU64::new(1), 0);
    std::thread::scope(|scope| {
        for queue in storming {
            let (rig, running) = (&rig, &running);
            scope.spawn(move || {
                while running.load(Ordering::Relaxed) > 0 {
                    rig.write(queue + abi::QUEUE_DOORBELL_LATER, Width::B4, 256);
                }
            });
        }
        let _ends = Ends(&running);
        for round in 0..60 {
            // Registers are read all the time; and the storm is going on.
            let begun = rig.stats()[5];
            while rig.stats()[5] < begun + 3 {
                std::thread::yield_now();
            }
            let mapped = rig.map(RAM.start + round * PAGE, PAGE);
            assert_eq!(mapped.status, Status::Ok.code(), "round {round}");
            assert!(rig.dma(mapped.bus));
            assert_eq!(rig.unmap(mapped.handle), Status::Ok);
            own += 2;
            if round % 3 == 0 {
                rig.slot.host.set_bus_master(false).unwrap();
                rig.companion.detach(false);
                assert!(rig.companion.attach(rig.checked.clone(), rig.slot.clone()));
                rig.write(abi::CONTROL, Width::B4, abi::CONTROL_ENABLE.into());
            }
        }
    });
    let busy = |queue: &u32| rig.read(queue + abi::QUEUE_STATUS) == u64::from(Status::Busy.code());
    while storming.iter().any(busy) {
        std::thread::yield_now();
    }
    let [.., refused, batches] = rig.stats();
    assert_eq!(
        refused,
        256 * (batches - own),
        "each batch of the storm was worked off once, and none of it twice"
    );
    rig.no_mistakes();
}

#[derive(Clone, Debug)]
enum Step {
    Entry {
        at: u8,
        entry: Entry,
    },
    /// A batch as a guest in its right mind makes one, but for what is in it.
    Batch {
        queue: u8,
        entries: Vec<Entry>,
        later: bool,
    },
    /// The same by the published protocol: kind and requests.
    Command {
        kind: u32,
        ranges: Vec<(u64, u64)>,
    },
    Raw {
        at: u16,
        value: u64,
    },
    Write {
        at: u16,
        width: u8,
        value: u64,
    },
    Read {
        at: u16,
        width: u8,
    },
    Published {
        at: u16,
        width: u8,
        value: u64,
    },
    Config {
        at: u16,
        value: u32,
    },
}

/// Addresses that mean something, and any.
fn address() -> impl Strategy<Value = u64> {
    let granule = prop_oneof![Just(RAM.start), Just(RAM.end), Just(HIGH.start), Just(HIGH.end)]
        .prop_flat_map(|base| (-4i64..4).prop_map(move |n| base.wrapping_add_signed(n * PAGE as i64)));
    let known = prop_oneof![
        Just(0),
        Just(QUEUE),
        Just(u64::MAX),
        Just(!(PAGE - 1)),
        Just(0x0800_0000),
        Just(QUEUE + 64)
    ];
    prop_oneof![4 => granule, 2 => known, 1 => any::<u64>()]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![6 => (0u64..8).prop_map(|n| n * PAGE), 1 => Just(!(PAGE - 1)), 1 => any::<u64>()]
}

fn entry() -> impl Strategy<Value = Entry> {
    let handle = prop_oneof![(0u64..64).prop_map(|n| 5 << 48 | n), any::<u64>()];
    let flags = prop_oneof![9 => Just(0), 1 => any::<u32>()];
    (0u32..4, flags, address(), length(), handle).prop_map(|(op, flags, address, len, handle)| Entry {
        op,
        flags,
        address,
        len,
        handle,
        ..Entry::default()
    })
}

fn step() -> impl Strategy<Value = Step> {
    let register = prop_oneof![
        Just(abi::CONTROL as u16),
        (0u16..4, 0u16..6).prop_map(|(queue, word)| 0x400 + queue * 0x20 + word * 4),
        0u16..0x1000
    ];
    let value = prop_oneof![0u64..4, 0u64..260, address(), any::<u64>()];
    let kind = prop_oneof![4 => Just(1u32), 4 => Just(2), 1 => any::<u32>()];
    prop_oneof![
        6 => (0u8..4, prop::collection::vec(entry(), 1..12), any::<bool>())
            .prop_map(|(queue, entries, later)| Step::Batch { queue, entries, later }),
        4 => (kind, prop::collection::vec((address(), length()), 1..12))
            .prop_map(|(kind, ranges)| Step::Command { kind, ranges }),
        4 => (any::<u8>(), entry()).prop_map(|(at, entry)| Step::Entry { at, entry }),
        1 => (any::<u16>(), prop_oneof![address(), 0u64..5000]).prop_map(|(at, value)| Step::Raw { at, value }),
        6 => (register, 2u8..4, value.clone()).prop_map(|(at, width, value)| Step::Write { at, width, value }),
        1 => (0u16..0x1000, 0u8..4).prop_map(|(at, width)| Step::Read { at, width }),
        3 => (prop_oneof![Just(0x10u16), Just(0x14), Just(0x18), 0u16..0x1000], 0u8..4, value)
            .prop_map(|(at, width, value)| Step::Published { at, width, value }),
        1 => (0u16..0x100, any::<u32>()).prop_map(|(at, value)| Step::Config { at: at & !3, value }),
    ]
}

fn width(selector: u8) -> Width {
    [Width::B1, Width::B2, Width::B4, Width::B8][usize::from(selector % 4)]
}

fn run(rig: &Rig, function: &crate::Published, step: &Step) {
    // A page's worth of memory that queues, commands and arrays share.
    let spot = |at: u64| GuestAddress(QUEUE + at % 0x4000 / 8 * 8);
    match step {
        Step::Entry { at, entry } => {
            rig.ram
                .write_slice(&entry.bytes(), GuestAddress(QUEUE + u64::from(*at) * u64::from(ENTRY_BYTES)))
                .unwrap();
        }
        Step::Batch { queue, entries, later } => {
            let registers = abi::QUEUE_FIRST + u32::from(*queue) * abi::QUEUE_STRIDE;
            rig.put(QUEUE + 0x1_0000, entries);
            rig.write(registers, Width::B8, QUEUE + 0x1_0000);
            let bell = if *later { abi::QUEUE_DOORBELL_LATER } else { abi::QUEUE_DOORBELL };
            rig.write(registers + bell, Width::B4, entries.len() as u64);
        }
        Step::Command { kind, ranges } => {
            let (page, requests) = (QUEUE + 0x2_0000, QUEUE + 0x2_1000);
            let words = [u64::from(*kind) | (ranges.len() as u64) << 32, 0, requests, requests + 0x1000];
            let words = words.into_iter().zip((page..).step_by(8));
            words.for_each(|(word, at)| rig.ram.write_obj(word, GuestAddress(at)).unwrap());
            for (at, (address, len)) in (requests..).step_by(16).zip(ranges) {
                rig.ram.write_obj([*address, *len], GuestAddress(at)).unwrap();
            }
            function.bar_write(0, 0x10, Width::B4, page).unwrap();
            function.bar_write(0, 0x14, Width::B4, 0).unwrap();
            function.bar_write(0, 0x18, Width::B4, 1).unwrap();
        }
        Step::Raw { at, value } => rig.ram.write_obj(*value, spot(u64::from(*at))).unwrap(),
        Step::Write { at, width: w, value } => {
            let value = if width(*w) == Width::B4 { value & 0xffff_ffff } else { *value };
            let _ = rig.companion.bar_write(0, u64::from(*at), width(*w), value);
        }
        Step::Read { at, width: w } => {
            let _ = rig.companion.bar_read(0, u64::from(*at), width(*w));
            let _ = function.bar_read(0, u64::from(*at), width(*w));
        }
        Step::Published { at, width: w, value } => {
            let _ = function.bar_write(0, u64::from(*at), width(*w), *value);
        }
        Step::Config { at, value } => {
            if let Some(access) = ConfigAccess::new(*at, Width::B4) {
                rig.companion.config_write(access, *value);
                function.config_write(access, *value);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// What is mapped is always what the statistics say, lies in RAM (the domain checks that), and goes with a reset.
    #[test]
    fn whatever_a_guest_does(on: bool, layout: bool, steps in prop::collection::vec(step(), 1..120)) {
        let rig = if on { Rig::new() } else { Rig::off(DART) };
        let layout = if layout { Layout::A } else { Layout::B };
        let function = rig.companion.published(layout, Arc::new(RootPort::new(5)));
        for step in &steps {
            run(&rig, &function, step);
        }
        while (0..4).any(|q| rig.read(abi::QUEUE_FIRST + q * 0x20 + abi::QUEUE_STATUS) == u64::from(Status::Busy.code())) {
            std::thread::yield_now();
        }
        let (entries, bytes) = rig.domain.mapped();
        prop_assert_eq!((rig.stats()[0], rig.stats()[1]), (bytes, entries as u64));
        rig.write(abi::CONTROL, Width::B4, abi::CONTROL_RESET.into());
        prop_assert_eq!(rig.domain.mapped().0, 0);
        let usage = rig.companion.usage();
        prop_assert_eq!((usage.mistakes, usage.first_mistake), (0, None));
    }
}
