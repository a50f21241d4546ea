//! The block device through its driver's eyes. Survival of SIGKILL is tested in `kill`, opening of images in crates/disk-image.

mod kill;

use super::*;
use crate::testing::{Driver, RAM, RAM_BASE};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// Runs qemu-img; `None`, with a word on why, where it is not installed.
fn qemu_img(args: &[&str]) -> Option<String> {
    let Ok(output) = Command::new("qemu-img").args(args).output() else {
        eprintln!("skipped: qemu-img is not installed");
        return None;
    };
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "qemu-img {args:?}: {text}");
    Some(text)
}

fn raw_image(dir: &TempDir, len: u64) -> PathBuf {
    let path = dir.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(len).unwrap();
    path
}

/// A fresh qcow2 image, made by imago so that these tests need no QEMU.
fn qcow2_image(dir: &TempDir, name: &str, len: u64, backing: Option<(&str, &str)>) -> PathBuf {
    use imago::file::File;
    use imago::qcow2::Qcow2;
    use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
    let path = dir.path().join(name);
    let file = File::create_open(StorageCreateOptions::new().filename(&path)).unwrap();
    let mut builder: imago::qcow2::Qcow2CreateBuilder<File> = Qcow2::create_builder(file).size(len);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_owned(), format.to_owned());
    }
    builder.create().unwrap();
    path
}

fn writable(path: &Path) -> Driver {
    driver(path, DiskOptions::default(), 2)
}

fn driver(path: &Path, options: DiskOptions, vcpus: u32) -> Driver {
    let disk = Disk::open(path, &options).unwrap();
    of_disk(disk, vcpus)
}

/// For an image that names backing files, which are these.
fn over(path: &Path, backing: &[&Path]) -> Driver {
    let backing = backing.iter().map(|path| path.to_path_buf()).collect();
    driver(path, DiskOptions { backing, ..DiskOptions::default() }, 2)
}

fn of_disk(disk: Disk, vcpus: u32) -> Driver {
    let mut driver = Driver::new(Box::new(Block::new("blk0", "serial-0123456789-and-more", disk, vcpus)));
    driver.start(u64::MAX, 128);
    driver
}

/// What follows a panic of the image's code: nobody knows in which state that left the image, so nothing touches it again.
#[test]
fn a_failed_disk_answers_every_request_with_an_error() {
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, MIB);
    let disk = Disk::open(&path, &DiskOptions::default()).unwrap();
    let block = Block::new("blk0", "serial", disk, 1);
    let health = block.health().clone();
    let mut driver = Driver::new(Box::new(block));
    driver.start(u64::MAX, 128);
    assert_eq!(write(&mut driver, 0, &[1; 512]), 0);
    health.contain("blk0", || panic!("an assertion of the qcow2 layer"));
    assert_eq!(write(&mut driver, 0, &[2; 512]), 1);
    assert_eq!(send(&mut driver, 4, 0, &[]), 1);
    assert_eq!(std::fs::read(&path).unwrap()[..512], [1; 512]);
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&sector.to_le_bytes());
    header
}

/// Sends a request whose answer is only the status.
fn send(driver: &mut Driver, kind: u32, sector: u64, data: &[u8]) -> u8 {
    let out = driver.put(&[header(kind, sector), data.to_vec()].concat());
    let status = driver.put(&[0xee]);
    driver.add(0, &[(out, 16, false), (out + 16, data.len() as u32, false), (status, 1, true)]);
    driver.kick(0);
    driver.wait_used(0);
    driver.get(status, 1)[0]
}

fn write(driver: &mut Driver, sector: u64, data: &[u8]) -> u8 {
    send(driver, 1, sector, data)
}

/// Reads `len` bytes; data and status.
fn read(driver: &mut Driver, sector: u64, len: u32) -> (Vec<u8>, u8) {
    let out = driver.put(&header(0, sector));
    let answer = driver.put(&vec![0xee; len as usize + 1]);
    driver.add(0, &[(out, 16, false), (answer, len + 1, true)]);
    driver.kick(0);
    let (_, written) = driver.wait_used(0);
    let mut data = driver.get(answer, len as usize + 1);
    let status = data.pop().unwrap();
    assert!(status != 0 || written == len + 1);
    (data, status)
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed) >> 13) as u8).collect()
}

fn both(test: impl Fn(&Path)) {
    both_of(8 * MIB, test);
}

fn both_of(len: u64, test: impl Fn(&Path)) {
    let dir = TempDir::new().unwrap();
    test(&raw_image(&dir, len));
    test(&qcow2_image(&dir, "disk.qcow2", len, None));
}

#[test]
fn configuration() {
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, 8 * MIB);
    let d = driver(&path, DiskOptions::default(), 9);
    assert_eq!(d.config_read(0, outboard_bus::Width::B4), 0x1042_1af4);
    let field = |offset: u64, width| d.read(0x2000 + offset, width);
    use outboard_bus::Width::{B1, B2, B4, B8};
    assert_eq!(field(0, B8), 8 * MIB / 512);
    assert_eq!(field(12, B4), 254);
    assert_eq!(field(20, B4), 512);
    assert_eq!(field(34, B2), 4, "queues are at most four");
    assert_eq!(field(36, B4), 131_072);
    assert_eq!(field(56, B1), 1);
    assert_eq!(d.offered() & feature::RO, 0);
    drop(d);
    let d = driver(&path, DiskOptions { read_only: true, ..DiskOptions::default() }, 1);
    let rw = feature::RO | feature::DISCARD | feature::WRITE_ZEROES;
    assert_eq!(d.offered() & rw, feature::RO);
    assert_eq!(d.read(0x2022, B2), 1);
}

#[test]
fn what_is_written_is_read_back() {
    both(|path| {
        let mut d = writable(path);
        for (sector, len) in [(0u64, 512usize), (1, 4096), (100, 65536 + 512), (8 * MIB / 512 - 2, 1024)] {
            let data = pattern(sector, len);
            assert_eq!(write(&mut d, sector, &data), 0);
            assert_eq!(read(&mut d, sector, len as u32), (data, 0));
        }
        assert_eq!(read(&mut d, 1000, 512), (vec![0; 512], 0));
        assert_eq!(send(&mut d, 4, 0, &[]), 0);
        drop(d);
        let mut d = writable(path);
        assert_eq!(read(&mut d, 100, 66048), (pattern(100, 66048), 0), "after a flush and a new start");
    });
}

#[test]
fn buffers_in_many_pieces() {
    both(|path| {
        let mut d = writable(path);
        let data = pattern(5, 100 * 512);
        let (out, at, status) = (d.put(&header(1, 7)), d.put(&data), d.put(&[9]));
        // Header in two pieces, data in pieces that are no sectors.
        let mut buffers = vec![(out, 5, false), (out + 5, 11, false)];
        buffers.extend((0..100).map(|i| (at + 512 * i, 512, false)));
        buffers.push((status, 1, true));
        d.add(0, &buffers);
        d.kick(0);
        d.wait_used(0);
        assert_eq!(d.get(status, 1), [0]);
        let (out, at) = (d.put(&header(0, 7)), d.alloc(51201));
        d.add(0, &[(out, 16, false), (at, 100, true), (at + 100, 51000, true), (at + 51100, 101, true)]);
        d.kick(0);
        assert_eq!(d.wait_used(0).1, 51201);
        assert_eq!(d.get(at, 51200), data);
    });
}

#[test]
fn serial_number() {
    both(|path| {
        let mut d = writable(path);
        let mut answer = d.request(0, &header(8, 0), 21);
        assert_eq!(answer.pop(), Some(0));
        assert_eq!(answer, b"serial-0123456789-an");
        assert_eq!(d.request(0, &header(8, 0), 4).len(), 4, "a short buffer gets what fits");
    });
}

#[test]
fn bad_requests_fail_alone() {
    both(|path| {
        let end = 8 * MIB / 512;
        let mut d = writable(path);
        assert_eq!(write(&mut d, 0, &[1; 512]), 0);
        assert_eq!(read(&mut d, end, 512).1, 1);
        assert_eq!(read(&mut d, end - 1, 1024).1, 1);
        assert_eq!(read(&mut d, u64::MAX, 512).1, 1);
        assert_eq!(read(&mut d, u64::MAX / 512, 1024).1, 1);
        assert_eq!(read(&mut d, 0, 511).1, 1, "half a sector");
        assert_eq!(write(&mut d, end, &[1; 512]), 1);
        assert_eq!(write(&mut d, 0, &[1; 100]), 1);
        for kind in [2, 3, 5, 0x8000_0000, u32::MAX] {
            assert_eq!(send(&mut d, kind, 0, &[]), 2, "type {kind}");
        }
        for kind in [11, 13] {
            assert_eq!(send(&mut d, kind, 0, &range(end, 1, 0)), 1);
            assert_eq!(send(&mut d, kind, 0, &range(u64::MAX, u32::MAX, 0)), 1);
            assert_eq!(send(&mut d, kind, 0, &range(0, 8, 2)), 2, "unknown flag");
            assert_eq!(send(&mut d, kind, 0, &range(0, 8, 0)[..15]), 1);
            assert_eq!(send(&mut d, kind, 0, &[]), 1);
            assert_eq!(send(&mut d, kind, 0, &range(0, 0, 0).repeat(17)), 1, "too many ranges");
            assert_eq!(send(&mut d, kind, 0, &range(0, 0, 0)), 0);
        }
        assert_eq!(send(&mut d, 11, 0, &range(0, 8, 1)), 2, "unmap is for write-zeroes");
        assert_eq!(read(&mut d, 0, 512), (vec![1; 512], 0));
        assert!(!d.is_broken());
    });
}

#[test]
fn requests_without_room_for_header_or_status_break_the_device() {
    both(|path| {
        let mut d = writable(path);
        for buffers in [
            vec![(RAM_BASE, 15, false), (RAM_BASE, 1, true)],
            vec![(RAM_BASE, 16, false)],
            vec![(RAM_BASE, 16, true)],
        ] {
            d.add(0, &buffers);
            d.kick(0);
            d.wait_broken();
            d.reset();
            d.start(u64::MAX, 128);
        }
        assert_eq!(write(&mut d, 0, &[1; 512]), 0);
    });
}

#[test]
fn discarded_and_zeroed_ranges() {
    both(|path| {
        let mut d = writable(path);
        let data = pattern(1, MIB as usize);
        for (kind, flags) in [(13, 0), (13, 1), (11, 0)] {
            assert_eq!(write(&mut d, 0, &data), 0);
            // 4 KiB units in the middle, then across the borders of a qcow2 cluster.
            let ranges = [range(16, 8, flags), range(100, 700, flags)].concat();
            assert_eq!(send(&mut d, kind, 0, &ranges), 0, "type {kind}");
            let (now, status) = read(&mut d, 0, MIB as u32);
            assert_eq!(status, 0);
            assert_eq!(now[..16 * 512], data[..16 * 512]);
            assert_eq!(now[24 * 512..100 * 512], data[24 * 512..100 * 512]);
            assert_eq!(now[800 * 512..], data[800 * 512..]);
            if kind == 13 {
                assert!(now[16 * 512..24 * 512].iter().chain(&now[100 * 512..800 * 512]).all(|b| *b == 0));
            }
            d.reset();
            d.start(u64::MAX, 128);
        }
    });
}

#[test]
fn discard_gives_room_back() {
    use std::os::unix::fs::MetadataExt;
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, 8 * MIB);
    let mut d = writable(&path);
    assert_eq!(write(&mut d, 0, &pattern(3, MIB as usize)), 0);
    assert_eq!(send(&mut d, 4, 0, &[]), 0);
    let before = std::fs::metadata(&path).unwrap().blocks();
    assert_eq!(send(&mut d, 11, 0, &range(0, 2048, 0)), 0);
    let after = std::fs::metadata(&path).unwrap();
    assert!(after.blocks() < before, "{before} blocks before, {} after", after.blocks());
    assert_eq!(after.len(), 8 * MIB);
}

#[test]
fn read_only_disks_are_not_written() {
    let dir = TempDir::new().unwrap();
    for path in [raw_image(&dir, MIB), qcow2_image(&dir, "disk.qcow2", MIB, None)] {
        let before = std::fs::read(&path).unwrap();
        let mut d = driver(&path, DiskOptions { read_only: true, ..DiskOptions::default() }, 1);
        assert_eq!(write(&mut d, 0, &[1; 512]), 1);
        assert_eq!(send(&mut d, 11, 0, &range(0, 8, 0)), 1);
        assert_eq!(send(&mut d, 13, 0, &range(0, 8, 1)), 1);
        assert_eq!(send(&mut d, 4, 0, &[]), 0);
        assert_eq!(read(&mut d, 0, 512), (vec![0; 512], 0));
        drop(d);
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}

#[test]
fn backing_files_show_through_and_stay() {
    let dir = TempDir::new().unwrap();
    let raw = raw_image(&dir, 4 * MIB);
    std::fs::write(&raw, pattern(1, 4 * MIB as usize)).unwrap();
    qcow2_image(&dir, "middle.qcow2", 4 * MIB, Some(("disk.img", "raw")));
    let middle = dir.path().join("middle.qcow2");
    let mut d = over(&middle, &[&raw]);
    assert_eq!(write(&mut d, 8, &[0x11; 4096]), 0);
    drop(d);
    let top = qcow2_image(&dir, "top.qcow2", 4 * MIB, Some(("middle.qcow2", "qcow2")));
    let mut d = over(&top, &[&middle, &raw]);
    assert_eq!(write(&mut d, 4, &[0x22; 512]), 0);
    let mut expected = pattern(1, 64 * 512);
    expected[4096..8192].fill(0x11);
    expected[2048..2560].fill(0x22);
    assert_eq!(read(&mut d, 0, 64 * 512), (expected, 0));
    drop(d);
    assert_eq!(std::fs::read(&raw).unwrap(), pattern(1, 4 * MIB as usize));
    for name in ["middle.qcow2", "top.qcow2"] {
        qemu_img(&["check", "-q", dir.path().join(name).to_str().unwrap()]);
    }
}

/// QEMU reads what we wrote, and we what QEMU wrote.
#[test]
fn qemu_agrees_about_the_content() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    if qemu_img(&["create", "-q", "-f", "qcow2", name, "64M"]).is_none() {
        return;
    }
    let mut d = writable(&path);
    for i in 0..100u64 {
        assert_eq!(write(&mut d, i * 1300 + 3, &pattern(i, 5 * 512)), 0);
        if i % 7 == 0 {
            d.reset();
            d.start(u64::MAX, 128);
        }
    }
    drop(d);
    let flat = dir.path().join("flat.img");
    qemu_img(&["check", "-q", name]);
    qemu_img(&["convert", "-O", "raw", name, flat.to_str().unwrap()]);
    let (mut ours, mut flat) = (writable(&path), writable(&flat));
    for sector in (0..100 * 1300).step_by(1300) {
        assert_eq!(read(&mut ours, sector, 16384), read(&mut flat, sector, 16384));
        ours.reset();
        ours.start(u64::MAX, 128);
        flat.reset();
        flat.start(u64::MAX, 128);
    }
}

#[test]
fn without_flush_every_write_is_durable() {
    let dir = TempDir::new().unwrap();
    let path = qcow2_image(&dir, "disk.qcow2", MIB, None);
    let disk = Disk::open(&path, &DiskOptions::default()).unwrap();
    let mut d = Driver::new(Box::new(Block::new("blk0", "", disk, 1)));
    d.start(!feature::FLUSH, 16);
    assert_eq!(write(&mut d, 0, &[7; 512]), 0);
    // The tables are in the file already: a second look at it, as after a crash, finds the data.
    let copy = dir.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    assert_eq!(read(&mut writable(&copy), 0, 512), (vec![7; 512], 0));
}

#[test]
fn queues_work_side_by_side() {
    both(|path| {
        let mut d = driver(path, DiskOptions::default(), 4);
        assert_eq!(d.queues.len(), 4);
        let data: Vec<_> = (0..4u64).map(|q| pattern(q, 4096)).collect();
        let mut status = vec![];
        for round in 0..20u64 {
            for queue in 0..4 {
                let out =
                    d.put(&[header(1, (round * 4 + queue) * 64), data[queue as usize].clone()].concat());
                let at = d.put(&[9]);
                d.add(queue as usize, &[(out, 4112, false), (at, 1, true)]);
                d.kick(queue as usize);
                status.push(at);
            }
        }
        for _ in 0..20 {
            for queue in 0..4 {
                d.wait_used(queue);
            }
        }
        assert!(status.iter().all(|at| d.get(*at, 1) == [0]));
        for slot in 0..80u64 {
            assert_eq!(read(&mut d, slot * 64, 4096), (data[slot as usize % 4].clone(), 0));
        }
    });
}

/// Resets with requests of every kind in flight; afterwards no thread of the device touches RAM.
#[test]
fn resets_in_the_middle_of_requests() {
    both(|path| {
        let mut d = writable(path);
        for round in 0..30u64 {
            let data = d.put(&vec![round as u8; 65536]);
            for i in 0..30u64 {
                let out = d.put(&header((i % 3 == 0) as u32, i * 128));
                let status = d.put(&[9]);
                d.add((i % 2) as usize, &[(out, 16, false), (data, 65536, i % 3 != 0), (status, 1, true)]);
                d.kick((i % 2) as usize);
            }
            d.reset();
            let before = d.get(RAM_BASE, RAM as usize);
            std::thread::yield_now();
            assert!(before == d.get(RAM_BASE, RAM as usize), "RAM changed after the reset");
            d.start(u64::MAX, 128);
        }
        assert_eq!(write(&mut d, 0, &[1; 512]), 0);
    });
}

/// A damaged image: its header says that there is no refcount table. QEMU refuses it; a write must neither crash nor land in the header.
#[test]
fn an_image_without_a_refcount_table_is_refused_or_left_whole() {
    use std::os::unix::fs::FileExt;
    let dir = TempDir::new().unwrap();
    let path = qcow2_image(&dir, "disk.qcow2", 8 * MIB, None);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    // refcount_table_clusters
    file.write_all_at(&[0; 4], 56).unwrap();
    let mut before = [0; 72];
    file.read_exact_at(&mut before, 0).unwrap();
    if let Ok(disk) = Disk::open(&path, &DiskOptions::default()) {
        let mut driver = of_disk(disk, 1);
        write(&mut driver, 0, &[0x55; 4096]);
        send(&mut driver, 4, 0, &[]);
    }
    let mut after = [0; 72];
    file.read_exact_at(&mut after, 0).unwrap();
    assert_eq!(after[..56], before[..56], "the guest's data went over the header");
}

/// A request of almost 1 GiB, made of one buffer again and again, does not hold up a reset.
#[test]
fn a_reset_does_not_wait_for_the_whole_of_a_large_request() {
    both_of(1 << 30, |path| {
        for kind in [0, 1] {
            let mut d = driver(path, DiskOptions::default(), 1);
            let at = d.put(&vec![1; 8 << 20]);
            let (out, status) = (d.put(&header(kind, 0)), d.put(&[0xee]));
            let mut buffers = vec![(out, 16, false)];
            buffers.extend((0..120).map(|_| (at, 8 << 20, kind == 0)));
            buffers.push((status, 1, true));
            d.add(0, &buffers);
            d.kick(0);
            std::thread::sleep(std::time::Duration::from_millis(2));
            d.reset();
            assert_ne!(d.get(status, 1), [0], "all of it was done before the reset");
            d.start(u64::MAX, 128);
            assert_eq!(write(&mut d, 0, &[1; 512]), 0);
        }
    });
}

/// A queue of requests with any kind, place and buffers; what the device must not do is panic or hang, and afterwards it works.
#[test]
fn descriptors_at_random() {
    for qcow2 in [false, true] {
        let dir = TempDir::new().unwrap();
        let path = if qcow2 { qcow2_image(&dir, "d.qcow2", MIB, None) } else { raw_image(&dir, MIB) };
        // SplitMix64, with the same seed always.
        let mut state = 2026_u64;
        let mut below = move |limit: u64| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) % limit
        };
        let mut d = writable(&path);
        for _ in 0..400 {
            for _ in 0..1 + below(4) {
                let kind = [0, 1, 4, 8, 11, 13, below(20) as u32][below(7) as usize];
                let sector = if below(8) == 0 { below(u64::MAX) } else { below(2100) };
                let ranges = range(below(2100), below(300) as u32, below(3) as u32);
                let out = d.put(&[header(kind, sector), ranges].concat());
                let head = if kind > 8 { 32 } else { 16 };
                let mut buffers = vec![(out, if below(20) == 0 { below(40) as u32 } else { head }, false)];
                for _ in 0..below(5) {
                    let len = if below(6) == 0 { below(5000) } else { below(20) * 512 } as u32;
                    let outside = below(60) == 0;
                    let at =
                        if outside { RAM_BASE + RAM - 256 } else { RAM_BASE + (8 << 20) + below(1 << 20) };
                    buffers.push((at, len, below(2) == 0));
                }
                // Readable ones first, mostly.
                if below(10) != 0 {
                    buffers.sort_by_key(|buffer| buffer.2);
                }
                buffers.push((d.put(&[9]), 1, below(30) != 0));
                d.add(below(2) as usize, &buffers);
            }
            d.kick(0);
            d.kick(1);
            if below(3) == 0 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(std::time::Duration::from_micros(below(300)));
            }
            d.reset();
            d.start(u64::MAX, 128);
        }
        assert_eq!(write(&mut d, 0, &[1; 512]), 0);
        assert_eq!(read(&mut d, 0, 512), (vec![1; 512], 0));
        drop(d);
        // Its checks are those that a damaged image would fail.
        drop(writable(&path));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Random reads, writes, discards and flushes against a plain model of the disk.
    #[test]
    fn behaves_as_bytes(
        qcow2 in any::<bool>(),
        steps in prop::collection::vec((0u32..5, 0u64..2048, 1u32..300, any::<u64>()), 1..40),
    ) {
        let dir = TempDir::new().unwrap();
        let path = if qcow2 { qcow2_image(&dir, "d.qcow2", MIB, None) } else { raw_image(&dir, MIB) };
        let mut d = writable(&path);
        let mut model = vec![0u8; MIB as usize];
        for (kind, sector, sectors, seed) in steps {
            let sectors = sectors.min(2048 - sector as u32).max(1);
            let (from, to) = (sector as usize * 512, (sector as usize + sectors as usize) * 512);
            match kind {
                0 => prop_assert_eq!(read(&mut d, sector, sectors * 512), (model[from..to].to_vec(), 0)),
                1 => {
                    let data = pattern(seed, to - from);
                    prop_assert_eq!(write(&mut d, sector, &data), 0);
                    model[from..to].copy_from_slice(&data);
                }
                2 | 3 => {
                    prop_assert_eq!(send(&mut d, 13, 0, &range(sector, sectors, kind - 2)), 0);
                    model[from..to].fill(0);
                }
                _ => prop_assert_eq!(send(&mut d, 4, 0, &[]), 0),
            }
            d.reset();
            d.start(u64::MAX, 128);
        }
        prop_assert_eq!(read(&mut d, 0, MIB as u32), (model, 0));
    }
}
