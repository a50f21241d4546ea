use super::*;
use crate::testing::{Desc, Driver, INDIRECT, NEXT, RAM, RAM_BASE, WRITE};
use crate::{Activation, Health, VirtioInterrupt, WorkQueue, Worker};
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use vm_memory::Bytes as _;

/// Copies what it is given into the answer. Its configuration is eight bytes that count how often it was reset.
struct Echo {
    workers: Vec<Worker<()>>,
    config: Arc<Mutex<Vec<u8>>>,
    interrupt: Arc<Mutex<Option<Arc<dyn VirtioInterrupt>>>>,
    resets: Arc<AtomicUsize>,
    health: Health,
}

/// A request that begins with this makes the device's thread panic, as an assertion of a dependency would.
const PANIC: &[u8] = b"panic, please";

impl Echo {
    fn new() -> Self {
        Self {
            workers: vec![],
            config: Arc::new(Mutex::new(vec![1, 2, 3, 4, 5, 6, 7, 8])),
            interrupt: Arc::default(),
            resets: Arc::default(),
            health: Health::default(),
        }
    }
}

impl VirtioDevice for Echo {
    fn device_id(&self) -> u16 {
        4
    }
    fn name(&self) -> &str {
        "echo0"
    }
    fn health(&self) -> &Health {
        &self.health
    }
    fn features(&self) -> u64 {
        1
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 256]
    }
    fn config(&self) -> Vec<u8> {
        self.config.lock().unwrap().clone()
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.config.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
    }
    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        *self.interrupt.lock().unwrap() = Some(Arc::clone(&activation.interrupt));
        for queue in activation.queues.into_iter().flatten() {
            let memory = activation.memory.clone();
            let interrupt = Arc::clone(&activation.interrupt);
            let wake = Arc::clone(&queue.doorbell);
            let for_failure = Arc::clone(&interrupt);
            self.workers.push(Worker::spawn(
                outboard_jail::ThreadKind::Entropy,
                "echo",
                wake,
                &self.health,
                for_failure,
                move |stop| {
                    WorkQueue::new(queue, &memory, interrupt).serve(stop, |request| {
                        let mut written = 0;
                        let mut chunk = [0; 512];
                        while written < 1 << 20 {
                            let n = request.readable.read(&mut chunk);
                            assert!(!chunk.starts_with(PANIC), "as asked");
                            let n = request.writable.write(&chunk[..n]);
                            if n == 0 {
                                break;
                            }
                            written += n as u32;
                        }
                        Ok(written)
                    });
                },
            )?);
        }
        Ok(())
    }
    fn reset(&mut self) {
        self.workers.clear();
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

fn driver() -> Driver {
    Driver::new(Box::new(Echo::new()))
}

#[test]
fn a_panic_of_a_device_thread_is_told_to_the_driver_and_can_be_reset() {
    let echo = Echo::new();
    let health = echo.health.clone();
    let mut driver = Driver::new(Box::new(echo));
    driver.start(u64::MAX, 16);
    assert_eq!(driver.request(0, b"hello", 5), b"hello");
    let generation = driver.read(0x15, Width::B1);
    driver.msis.take();
    let at = driver.alloc(64);
    driver.memory.write_slice(PANIC, vm_memory::GuestAddress(at)).unwrap();
    driver.add(0, &[(at, PANIC.len() as u32, false)]);
    driver.kick(0);
    let start = std::time::Instant::now();
    while driver.status() & status::NEEDS_RESET == 0 {
        assert!(start.elapsed().as_secs() < 20, "the driver is not told");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(health.failure().unwrap().contains("as asked"), "{health:?}");
    assert_ne!(driver.read(0x15, Width::B1), generation, "the driver reads the configuration again");
    driver.reset();
    assert_eq!(driver.status(), 0);
}

#[test]
fn identity_and_capabilities() {
    let driver = driver();
    assert_eq!(driver.config_read(0x00, Width::B4), 0x1044_1af4);
    assert_eq!(driver.config_read(0x08, Width::B4), 0x00ff_0001);
    let mut at = driver.config_read(0x34, Width::B1) as u16;
    let mut found = vec![];
    while at != 0 {
        if driver.config_read(at, Width::B1) == 0x09 {
            let kind = driver.config_read(at + 3, Width::B1);
            let place = (driver.config_read(at + 8, Width::B4), driver.config_read(at + 12, Width::B4));
            found.push((kind, place));
            assert_eq!(driver.config_read(at + 4, Width::B1), 0, "BAR");
        }
        at = driver.config_read(at + 1, Width::B1) as u16;
    }
    assert_eq!(found, [(1, (0, 0x38)), (3, (0x1000, 1)), (4, (0x2000, 8)), (2, (0x3000, 8)), (5, (0, 0))]);
}

/// What pciutils makes of the function.
#[test]
fn lspci_reads_the_config_space() {
    let driver = driver();
    let mut dump = String::from("00:01.0 device\n");
    for line in (0..0x100u16).step_by(16) {
        let bytes: Vec<String> =
            (line..line + 16).map(|at| format!("{:02x}", driver.config_read(at, Width::B1))).collect();
        dump += &format!("{line:02x}: {}\n", bytes.join(" "));
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), dump).unwrap();
    let lspci = std::process::Command::new("lspci").args(["-vvn", "-F"]).arg(file.path()).output();
    let Ok(output) = lspci else { return eprintln!("skipped: lspci (pciutils) is not installed") };
    let text = String::from_utf8_lossy(&output.stdout);
    for expected in [
        "00ff: 1af4:1044 (rev 01)",
        "Subsystem: 1af4:0044",
        "MSI-X: Enable+ Count=3 Masked-",
        "Vector table: BAR=0 offset=00004000",
        "PBA: BAR=0 offset=00006000",
        "VirtIO: CommonCfg",
        "VirtIO: Notify",
        "VirtIO: ISR",
        "VirtIO: DeviceCfg",
    ] {
        assert!(text.contains(expected), "no '{expected}' in\n{text}");
    }
}

#[test]
fn echoes_with_and_without_event_idx() {
    for mask in [u64::MAX, !feature::EVENT_IDX] {
        let mut driver = driver();
        driver.start(mask, 16);
        for round in 0..100u8 {
            assert_eq!(driver.request(1, &[round; 700], 1000), [round; 700]);
        }
        let sent = driver.msis.take();
        assert!(sent.iter().all(|vector| *vector == 2), "{sent:?}");
    }
}

#[test]
fn features_must_be_offered_and_include_version_1() {
    let driver = driver();
    assert_eq!(driver.offered(), 1 | feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX);
    for features in [0, 1, feature::VERSION_1 | 2, feature::VERSION_1 | 1 << 40] {
        driver.set_status(0);
        driver.set_status(3);
        driver.accept(features);
        driver.set_status(0xb);
        assert_eq!(driver.status(), 3, "{features:#x}");
        driver.set_status(0xf);
        assert_eq!(driver.status(), 3, "not ready without features");
    }
    driver.accept(feature::VERSION_1);
    driver.set_status(0xb);
    assert_eq!(driver.status(), 0xb);
    driver.accept(feature::VERSION_1 | 1);
    assert_eq!(driver.read(0x0c, Width::B4), 1, "word 1 is still selected");
    driver.write(0x08, Width::B4, 0);
    assert_eq!(driver.read(0x0c, Width::B4), 0, "settled");
    driver.write(0x00, Width::B4, 2);
    assert_eq!(driver.read(0x04, Width::B4), 0);
}

#[test]
fn queue_sizes_and_addresses_are_checked() {
    let mut driver = driver();
    driver.write(0x16, Width::B2, 1);
    assert_eq!(driver.read(0x18, Width::B2), 256);
    for size in [0, 3, 255, 257, 512, 0xffff] {
        driver.write(0x18, Width::B2, size);
        assert_eq!(driver.read(0x18, Width::B2), 256, "{size}");
    }
    driver.write(0x18, Width::B2, 64);
    let good = [RAM_BASE, RAM_BASE + 0x1000, RAM_BASE + 0x2000];
    let end = RAM_BASE + RAM;
    for (which, bad) in [
        (0, 0),
        (0, 8),
        (0, RAM_BASE + 8),
        (0, end - 16),
        (0, !15),
        (0, RAM_BASE - 16),
        (1, 0),
        (1, RAM_BASE + 1),
        (1, end - 2),
        (1, u64::MAX - 1),
        (2, 0),
        (2, RAM_BASE + 2),
        (2, end - 4),
        (2, u64::MAX - 3),
    ] {
        let mut addresses = good;
        addresses[which] = bad;
        for (offset, address) in [0x20, 0x28, 0x30].into_iter().zip(addresses) {
            driver.write(offset, Width::B8, address);
        }
        driver.write(0x1c, Width::B2, 1);
        assert_eq!(driver.read(0x1c, Width::B2), 0, "area {which} at {bad:#x}");
    }
    driver.write(0x16, Width::B2, 7);
    assert_eq!(driver.read(0x18, Width::B2), 0, "no such queue");
    driver.write(0x18, Width::B2, 16);
    driver.write(0x1c, Width::B2, 1);
    assert_eq!(driver.read(0x1c, Width::B2), 0);
    driver.start(u64::MAX, 16);
    assert_eq!(driver.request(0, b"still fine", 10), b"still fine");
}

/// Firecracker's CVE-2026-5747: queue registers changed after activation.
#[test]
fn an_enabled_queue_is_fixed() {
    let mut driver = driver();
    driver.start(u64::MAX, 16);
    driver.write(0x16, Width::B2, 0);
    let before: Vec<u64> = [0x20, 0x28, 0x30].into_iter().map(|o| driver.read(o, Width::B8)).collect();
    driver.write(0x18, Width::B2, 8);
    for offset in [0x20, 0x28, 0x30] {
        driver.write(offset, Width::B8, 0x1234_5670);
        driver.write(offset + 4, Width::B4, 7);
    }
    driver.write(0x1c, Width::B2, 0);
    assert_eq!(driver.read(0x18, Width::B2), 16);
    assert_eq!(driver.read(0x1c, Width::B2), 1);
    let after: Vec<u64> = [0x20, 0x28, 0x30].into_iter().map(|o| driver.read(o, Width::B8)).collect();
    assert_eq!(before, after);
    assert_eq!(driver.request(0, b"same", 4), b"same");
}

#[test]
fn vectors_beyond_the_table_are_refused() {
    let driver = driver();
    for vector in [3, 0x7ff, 0xfffe] {
        driver.write(0x10, Width::B2, vector);
        assert_eq!(driver.read(0x10, Width::B2), 0xffff);
        driver.write(0x1a, Width::B2, vector);
        assert_eq!(driver.read(0x1a, Width::B2), 0xffff);
    }
    driver.write(0x10, Width::B2, 2);
    assert_eq!(driver.read(0x10, Width::B2), 2);
}

#[test]
fn configuration_changes_with_its_generation() {
    let device = Echo::new();
    let (config, interrupt) = (Arc::clone(&device.config), Arc::clone(&device.interrupt));
    let mut driver = Driver::new(Box::new(device));
    driver.start(u64::MAX, 16);
    assert_eq!(driver.read(0x2000, Width::B8), 0x0807_0605_0403_0201);
    assert_eq!(driver.read(0x2003, Width::B2), 0x0504, "any width at any offset");
    let generation = driver.read(0x15, Width::B1);
    config.lock().unwrap()[0] = 0x99;
    assert_eq!(driver.read(0x2000, Width::B1), 1, "not before the generation moves");
    interrupt.lock().unwrap().as_ref().unwrap().config_changed();
    assert_eq!(driver.read(0x15, Width::B1), generation + 1);
    assert_eq!(driver.read(0x2000, Width::B1), 0x99);
    assert_eq!(driver.msis.take(), [0]);
    assert_eq!(driver.read(0x1000, Width::B1), 2);
    assert_eq!(driver.read(0x1000, Width::B1), 0, "reading the ISR clears it");
    driver.write(0x2006, Width::B2, 0xbbaa);
    assert_eq!(driver.read(0x2004, Width::B4), 0xbbaa_0605);
    for (offset, width) in [(0x2008, Width::B1), (0x2007, Width::B2), (0x2001, Width::B8)] {
        assert_eq!(driver.function.bar_read(0, offset, width), Err(AccessError::NoRegister));
        assert_eq!(driver.function.bar_write(0, offset, width, 0), Err(AccessError::NoRegister));
    }
}

#[test]
fn reset_stops_work_and_the_device_starts_again() {
    let device = Echo::new();
    let resets = Arc::clone(&device.resets);
    let mut driver = Driver::new(Box::new(device));
    for round in 1..=50 {
        driver.start(u64::MAX, 256);
        // In the middle of requests.
        let out = driver.put(&[7; 4096]);
        for _ in 0..20 {
            driver.add(1, &[(out, 4096, false), (out + 4096, 4096, true)]);
            driver.kick(1);
        }
        driver.reset();
        assert_eq!(resets.load(Ordering::SeqCst), round);
        assert_eq!(driver.read(0x10, Width::B2), 0xffff);
        assert_eq!(driver.read(0x1c, Width::B2), 0);
    }
    driver.start(u64::MAX, 16);
    assert_eq!(driver.request(0, b"again", 5), b"again");
    driver.function.reset();
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.config_read(0x04, Width::B2), 0);
}

#[test]
fn doorbells_before_ready_and_of_no_queue_do_nothing() {
    let mut driver = driver();
    driver.kick(0);
    assert_eq!(driver.function.bar_write(0, 0x3008, Width::B2, 0), Err(AccessError::NoRegister));
    assert_eq!(driver.function.bar_write(0, 0x3002, Width::B2, 0), Err(AccessError::BadWidth));
    driver.start(u64::MAX, 16);
    assert_eq!(driver.request(0, b"x", 1), b"x");
}

#[test]
fn the_config_window_reaches_the_bar() {
    let driver = driver();
    let window = 0x40 + 12 + 3 * 16 + 20;
    assert_eq!(driver.config_read(window + 3, Width::B1), 5);
    let aim = |offset, len| {
        driver.config_write(window + 4, Width::B1, 0);
        driver.config_write(window + 8, Width::B4, offset);
        driver.config_write(window + 12, Width::B4, len);
    };
    aim(0x14, 1);
    driver.config_write(window + 16, Width::B1, 3);
    assert_eq!(driver.status(), 3);
    assert_eq!(driver.config_read(window + 16, Width::B1), 3);
    aim(0x2002, 2);
    assert_eq!(driver.config_read(window + 16, Width::B2), 0x0403);
    for (offset, len) in [(0x8000, 4), (0x7ffe, 4), (0xffff_fffc, 4), (0, 8), (0, 0), (0, u32::MAX)] {
        aim(offset, len);
        driver.config_read(window + 16, Width::B4);
        driver.config_write(window + 16, Width::B4, u32::MAX);
    }
    driver.config_write(window + 4, Width::B1, 3);
    driver.config_write(window + 16, Width::B4, u32::MAX);
    assert_eq!(driver.status(), 3);
}

#[derive(Default)]
struct Binder(Mutex<Vec<(bool, u64, u8)>>);

impl DoorbellBinder for Binder {
    fn bind(&self, ipa: u64, width: u8, _: Option<u32>, _: &Event) {
        self.0.lock().unwrap().push((true, ipa, width));
    }
    fn unbind(&self, ipa: u64, width: u8, _: Option<u32>, _: &Event) {
        self.0.lock().unwrap().push((false, ipa, width));
    }
}

#[test]
fn doorbells_follow_the_bar() {
    let memory = GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 0x1000)]).unwrap();
    let binder = Arc::new(Binder::default());
    let as_dyn = Arc::clone(&binder) as Arc<dyn DoorbellBinder>;
    let msi = Arc::new(crate::testing::Msis::default());
    let function = VirtioPci::new(Box::new(Echo::new()), memory, msi, Some(as_dyn)).unwrap();
    function.bar_mapped(0, Some(0x1000_0000));
    function.bar_mapped(0, None);
    function.bar_mapped(0, Some(0x2000_0000));
    let calls = std::mem::take(&mut *binder.0.lock().unwrap());
    let expected = [
        (true, 0x1000_3000, 2),
        (true, 0x1000_3004, 2),
        (false, 0x1000_3000, 2),
        (false, 0x1000_3004, 2),
        (true, 0x2000_3000, 2),
        (true, 0x2000_3004, 2),
    ];
    assert_eq!(calls, expected);
}

/// Each broken chain makes the device ask for a reset, after which it works again.
#[test]
fn broken_chains_break_the_device_until_reset() {
    let buffer = RAM_BASE + 0x8_0000;
    let table = RAM_BASE + 0x9_0000;
    let read = |len, next| Desc { address: buffer, len, flags: NEXT, next };
    let direct: [(&str, Vec<Desc>); 8] = [
        ("loop to itself", vec![read(1, 0)]),
        ("loop of two", vec![read(1, 1), read(1, 0)]),
        ("next outside the table", vec![read(1, 16)]),
        ("address 0", vec![Desc { address: 0, len: 16, flags: 0, next: 0 }]),
        ("end of RAM", vec![Desc { address: RAM_BASE + RAM - 8, len: 16, flags: WRITE, next: 0 }]),
        ("4 GiB - 1", vec![Desc { address: buffer, len: u32::MAX, flags: WRITE, next: 0 }]),
        ("wraps", vec![Desc { address: u64::MAX - 3, len: 16, flags: 0, next: 0 }]),
        (
            "readable after writable",
            vec![Desc { flags: NEXT | WRITE, ..read(1, 1) }, Desc { flags: 0, ..read(1, 0) }],
        ),
    ];
    let indirect: [(&str, u32, Vec<Desc>); 5] = [
        ("odd table length", 17, vec![Desc { flags: 0, ..read(1, 0) }]),
        ("empty table", 0, vec![]),
        ("nested", 16, vec![Desc { address: table, len: 16, flags: INDIRECT, next: 0 }]),
        ("loop in the table", 32, vec![read(1, 1), read(1, 0)]),
        ("longer than the queue", 16 * 300, (1..300).map(|i| read(1, i)).collect()),
    ];
    let mut driver = driver();
    let mut check = |what: &str, descs: &[(u64, Vec<Desc>)]| {
        driver.start(u64::MAX, 16);
        let queue_table = driver.queues[0].desc;
        for (place, list) in descs {
            for (i, desc) in (0..).zip(list) {
                driver.write_desc(if *place == 0 { queue_table } else { *place }, i, *desc);
            }
        }
        driver.publish(0, 0);
        driver.kick(0);
        driver.wait_broken();
        assert_eq!(driver.poll_used(0), None, "{what}");
        assert!(driver.msis.take().contains(&0), "{what}: configuration interrupt");
        driver.reset();
        driver.start(u64::MAX, 16);
        assert_eq!(driver.request(0, b"ok", 2), b"ok", "{what}");
        driver.reset();
    };
    for (what, descs) in direct {
        check(what, &[(0, descs)]);
    }
    for (what, len, descs) in indirect {
        let pointer = Desc { address: table, len, flags: INDIRECT, next: 0 };
        check(what, &[(0, vec![pointer]), (table, descs)]);
    }
    check(
        "indirect table outside RAM",
        &[(0, vec![Desc { address: 0x10, len: 16, flags: INDIRECT, next: 0 }])],
    );
}

#[test]
fn a_head_or_index_out_of_range_breaks_the_device() {
    for (head, index) in [(16, 1), (0xffff, 1), (0, 17), (0, 0x8000), (0, 0xffff)] {
        let mut driver = driver();
        driver.start(u64::MAX, 16);
        driver.publish(0, head);
        driver.set_avail_index(0, index);
        driver.kick(0);
        driver.wait_broken();
    }
}

#[test]
fn zero_length_buffers_are_nothing() {
    let mut driver = driver();
    driver.start(u64::MAX, 16);
    let at = driver.put(b"abc");
    driver.add(0, &[(at, 0, false), (at, 3, false), (at + 64, 0, true), (at + 64, 3, true)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 3);
    assert_eq!(driver.get(at + 64, 3), b"abc");
    driver.add(0, &[(at, 0, false)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 0);
}

/// Every offset of config space and BAR, every width, all ones, zeros and a pattern.
#[test]
fn abuse_of_config_space_and_bar() {
    let mut driver = driver();
    for value in [u64::MAX, 0, 0x5a5a_0f0f_a5a5_3c3c] {
        for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
            for offset in 0..0x100 {
                if let Some(access) = ConfigAccess::new(offset, width) {
                    driver.function.config_read(access);
                    driver.function.config_write(access, value as u32);
                }
            }
            for offset in 0..=BAR_LEN - width.bytes() {
                let _ = driver.function.bar_read(0, offset, width);
                let _ = driver.function.bar_write(0, offset, width, value);
            }
        }
    }
    driver.function.reset();
    driver.enable_interrupts();
    driver.start(u64::MAX, 16);
    assert_eq!(driver.request(1, b"alive", 5), b"alive");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random rings: whatever they hold, the device ends every request or asks for a reset, and works after one.
    #[test]
    fn random_rings(
        descs in prop::collection::vec((0u64..8, any::<u32>(), 0u16..8, 0u16..20), 16),
        heads in prop::collection::vec(0u16..18, 16),
        index in 0u16..20,
        table in prop::collection::vec((0u64..8, 0u32..64, 0u16..8, 0u16..10), 8),
    ) {
        let mut driver = driver();
        driver.start(u64::MAX, 16);
        let indirect = driver.alloc(16 * 8);
        let address = |choice| match choice {
            0 => 0,
            1 => RAM_BASE + RAM - 16,
            2 => u64::MAX - 7,
            3 | 4 => indirect,
            n => RAM_BASE + 0x10_0000 * n,
        };
        let rings = driver.queues[0].desc;
        for (i, (place, len, flags, next)) in (0..).zip(&descs) {
            // Half of the lengths are small.
            let len = if len % 2 == 0 { len % 4096 } else { *len };
            let len = if flags & INDIRECT != 0 { len % 9 * 16 } else { len };
            driver.write_desc(rings, i, Desc { address: address(*place), len, flags: *flags, next: *next });
        }
        for (i, (place, len, flags, next)) in (0..).zip(&table) {
            driver.write_desc(indirect, i, Desc { address: address(*place), len: *len, flags: *flags, next: *next });
        }
        for head in &heads {
            driver.publish(0, *head);
        }
        driver.set_avail_index(0, index);
        driver.kick(0);
        for _ in 0..index {
            let mut tries = 0;
            while !driver.is_broken() && driver.poll_used(0).is_none() {
                tries += 1;
                prop_assert!(tries < 20_000, "neither done nor broken");
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
        }
        driver.reset();
        driver.start(u64::MAX, 16);
        prop_assert_eq!(driver.request(0, b"fine", 4), b"fine");
    }
}
