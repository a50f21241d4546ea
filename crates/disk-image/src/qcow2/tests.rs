//! Images with random damage: each is refused, or works and is no worse afterwards.

#[path = "../../tests/common/mod.rs"]
mod common;

use super::check;
use super::header::{Header, u64_at};
use crate::{Disk, DiskOptions};
use common::*;
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// SplitMix64: the same numbers from the same seed, everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// An image to damage.
struct Original {
    name: String,
    bytes: Vec<u8>,
    /// Names in the folder, as the user would give them.
    backing: Vec<PathBuf>,
    /// Tables: where the damage is most telling.
    tables: Vec<(u64, u64)>,
    cluster: u64,
}

impl Original {
    fn new(path: &Path, backing: &[&Path]) -> Self {
        let bytes = fs::read(path).unwrap();
        let header = Header::read(&File::open(path).unwrap());
        let mut tables = vec![(0, 120), (0, 512)];
        let mut cluster = 4096;
        if let Ok(header) = header {
            cluster = header.cluster();
            tables.push((header.l1_offset, header.l1_entries * 8));
            tables.push((header.refcount_table_offset, 16));
            for at in [header.refcount_table_offset, header.l1_offset] {
                let entry = bytes.get(at as usize..at as usize + 8).map_or(0, |entry| u64_at(entry, 0));
                // The first words count the first clusters, or map the beginning of the disk.
                tables.push((entry & 0x00ff_ffff_ffff_fe00, 128));
                tables.push((entry & 0x00ff_ffff_ffff_fe00, cluster));
            }
            if header.snapshots > 0 {
                tables.push((header.snapshots_offset, 96));
            }
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let backing = backing.iter().map(|path| path.to_path_buf()).collect();
        Self { name, bytes, backing, tables, cluster }
    }

    /// A copy with one to four faults.
    fn damaged(&self, random: &mut Random) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for _ in 0..1 + random.below(4) {
            self.damage(&mut bytes, random);
        }
        bytes
    }

    fn damage(&self, bytes: &mut Vec<u8>, random: &mut Random) {
        let len = bytes.len() as u64;
        let (start, room) = match random.below(10) {
            0 => (0, len),
            _ => self.tables[random.below(self.tables.len() as u64) as usize],
        };
        let at = (start + random.below(room)).min(len.saturating_sub(1));
        let word = (at & !7) as usize;
        let entry = |value: u64| value.to_be_bytes();
        let somewhere = random.below(len / self.cluster + 2) * self.cluster;
        match random.below(10) {
            0 => bytes[at as usize] = random.next() as u8,
            1 | 2 => bytes[at as usize] ^= 1 << random.below(8),
            3 => put(bytes, word, &entry(0)),
            4 => put(bytes, word, &entry(somewhere)),
            5 => put(bytes, word, &entry(somewhere | 1 << 63)),
            6 => put(bytes, word, &entry(somewhere | 1 << 62 | random.below(4) << 50)),
            7 => {
                let from = (start + random.below(room)) as usize & !7;
                if let Some(other) = bytes.get(from..from + 8) {
                    let other = other.to_vec();
                    put(bytes, word, &other);
                }
            }
            8 => put(bytes, at as usize, &vec![0; random.below(64) as usize]),
            _ if random.below(4) == 0 => bytes.truncate(random.below(len).max(1) as usize),
            _ => put(bytes, word, &entry(random.next())),
        }
    }
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(new) {
        *to = *from;
    }
}

/// Twenty images of all kinds, with what they need beside them in `dir`.
fn originals(dir: &TempDir) -> Vec<Original> {
    let mut all = Vec::new();
    let raw = dir.path().join("data.raw");
    fs::write(&raw, sample_data()).unwrap();
    for name in [
        "cluster-512",
        "compressed-zlib",
        "compressed-zstd",
        "data-file",
        "dirty",
        "json-backing",
        "no-refcount-table",
        "odd-size",
        "snapshots",
        "truncated",
    ] {
        all.push(Original::new(&sample(dir, &format!("{name}.qcow2")), &[]));
    }
    all.push(Original::new(&sample(dir, "v2-backing.qcow2"), &[&raw]));
    all.push(Original::new(&sample(dir, "absolute-backing.qcow2"), &[]));
    for (index, cluster) in [512, 1024, 4096, 16384, 65536].into_iter().enumerate() {
        let path = clustered_image(dir, &format!("own-{cluster}.qcow2"), 512 << 10, cluster, None);
        let disk = Disk::open(&path, &rw()).unwrap();
        for i in 0..24u64 {
            write(&disk, (i * 7 + index as u64) % 32 * 16384, &pattern(i, 8192)).unwrap();
        }
        disk.write_zeroes(65536, 40000 & !511, true).unwrap();
        drop(disk);
        all.push(Original::new(&path, &[]));
    }
    let base = dir.path().join("own-4096.qcow2");
    for (name, backing, format) in [("over-raw.qcow2", &raw, "raw"), ("over-qcow2.qcow2", &base, "qcow2")] {
        let beside = backing.file_name().unwrap().to_str().unwrap();
        let path = clustered_image(dir, name, 256 << 10, 1024, Some((beside, format)));
        let options = over(&[backing]);
        write(&Disk::open(&path, &options).unwrap(), 5000 & !511, &[4; 5120]).unwrap();
        all.push(Original::new(&path, &[backing]));
    }
    let path = clustered_image(dir, "empty.qcow2", MIB, 512, None);
    all.push(Original::new(&path, &[]));
    assert_eq!(all.len(), 20);
    all
}

/// Clusters that are counted too often, of an image that is sound; `None` of one that is not.
fn leaks(path: &Path) -> Option<u64> {
    let file = File::open(path).unwrap();
    let header = Header::read(&file).ok()?;
    check::soundness(&file, &header, file.metadata().unwrap().len()).ok()
}

/// Corruptions and leaks that `qemu-img check` finds; `None` where it is not installed or cannot open the image.
fn qemu_check(path: &Path) -> Option<(u64, u64)> {
    let (_, said) = try_qemu("qemu-img", &["check", "-f", "qcow2", "--output=json", text(path)])?;
    let number = |key: &str| {
        let Some((_, rest)) = said.split_once(&format!("\"{key}\": ")) else { return 0 };
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default().parse().unwrap_or(0)
    };
    said.contains("image-end-offset").then(|| (number("corruptions"), number("leaks")))
}

/// What was written, by sector, and what was seen there before.
struct Model {
    sectors: HashMap<u64, Vec<u8>>,
}

impl Model {
    /// Looks at some sectors of the disk that nothing will have been written to.
    fn new(disk: &Disk, random: &mut Random) -> Self {
        let mut sectors = HashMap::new();
        for _ in 0..24 {
            let sector = random.below((disk.len() / 512).min(4096));
            if let Ok(data) = read(disk, sector * 512, 512) {
                sectors.insert(sector, data);
            }
        }
        Self { sectors }
    }

    fn written(&mut self, sector: u64, data: &[u8]) {
        for (sector, data) in (sector..).zip(data.chunks_exact(512)) {
            self.sectors.insert(sector, data.to_vec());
        }
    }

    /// A write that failed may have happened or not.
    fn forget(&mut self, sector: u64, count: u64) {
        (sector..sector + count).for_each(|sector| drop(self.sectors.remove(&sector)));
    }

    fn compare(&self, disk: &Disk, when: &str) {
        for (sector, data) in &self.sectors {
            let now = read(disk, sector * 512, 512);
            assert!(now.as_ref().is_ok_and(|now| now == data), "sector {sector} {when}: {:?}", now.err());
        }
    }
}

fn work(disk: &Disk, model: &mut Model, random: &mut Random) {
    // Where the data are, and now and then anywhere.
    let sectors = disk.len() / 512;
    for _ in 0..1 + random.below(12) {
        let near = if random.below(8) == 0 { sectors } else { sectors.min(1024) };
        let sector = random.below(near);
        let count = (1 + random.below(24)).min(sectors - sector);
        let done = match random.below(8) {
            0 => disk
                .write_zeroes(sector * 512, count * 512, random.below(2) == 0)
                .map(|()| vec![0; count as usize * 512]),
            1 => {
                let _ = disk.discard(sector * 512, count * 512);
                model.forget(sector, count);
                continue;
            }
            2 => {
                let _ = disk.flush();
                continue;
            }
            _ => {
                let data = pattern(random.next(), count as usize * 512);
                write(disk, sector * 512, &data).map(|()| data)
            }
        };
        match done {
            Ok(data) => model.written(sector, &data),
            Err(_) => model.forget(sector, count),
        }
    }
}

/// One damaged image; it was accepted for writing.
fn try_one(original: &Original, path: &Path, seed: u64, ask_qemu: bool) -> bool {
    let mut random = Random(seed);
    let damaged = original.damaged(&mut random);
    fs::write(path, &damaged).unwrap();
    let options = DiskOptions { backing: original.backing.clone(), ..rw() };
    if let Ok(disk) = Disk::open(path, &DiskOptions { read_only: true, ..options.clone() }) {
        for _ in 0..4 {
            let _ = read(&disk, random.below(disk.len() / 512) * 512, 512);
        }
    }
    assert!(fs::read(path).unwrap() == damaged, "an image that was only read was written to");
    let disk = match Disk::open(path, &options) {
        Ok(disk) => disk,
        Err(_) => {
            assert!(fs::read(path).unwrap() == damaged, "a refused image was written to");
            return false;
        }
    };
    let before = leaks(path).expect("an image that was accepted");
    let qemu_before = if ask_qemu { qemu_check(path) } else { None };
    assert!(
        qemu_before.is_none_or(|(corruptions, _)| corruptions == 0),
        "QEMU finds {qemu_before:?} in what was accepted"
    );
    let mut model = Model::new(&disk, &mut random);
    work(&disk, &mut model, &mut random);
    model.compare(&disk, "before the image was closed");
    drop(disk);
    let after = leaks(path).expect("the image is damaged afterwards");
    assert!(after <= before, "{before} clusters were lost before, {after} afterwards");
    if let (true, Some(before)) = (ask_qemu, qemu_before) {
        let after = qemu_check(path).expect("QEMU does not open the image any more");
        assert!(after.0 == 0 && after.1 <= before.1, "QEMU found {before:?} before, {after:?} afterwards");
    }
    let disk = Disk::open(path, &options).expect("the image is refused afterwards");
    model.compare(&disk, "after the image was opened again");
    true
}

/// Damages images `count` times from number `first` on; QEMU is asked about every `qemu_every`th of those that are accepted.
fn mutations(first: u64, count: u64, qemu_every: u64) {
    let dir = TempDir::new().unwrap();
    let originals = originals(&dir);
    let path = dir.path().join("mutation.qcow2");
    let current = AtomicU64::new(first);
    let accepted = std::thread::scope(|scope| {
        let (end, seen) = std::sync::mpsc::channel::<()>();
        scope.spawn(|| watch(&current, seen));
        let mut accepted = 0;
        for number in first..first + count {
            current.store(number, Ordering::Relaxed);
            let original = &originals[(number % 20) as usize];
            let ask_qemu = number / 20 % qemu_every == 0;
            let done = std::panic::catch_unwind(|| try_one(original, &path, number, ask_qemu));
            match done {
                Ok(was_accepted) => accepted += u64::from(was_accepted),
                Err(panic) => {
                    eprintln!("mutation {number} of {}", original.name);
                    drop(end);
                    std::panic::resume_unwind(panic);
                }
            }
            if count > 5000 && number % 5000 == 4999 {
                eprintln!("{} mutations, {accepted} accepted", number + 1 - first);
            }
        }
        drop(end);
        accepted
    });
    println!("{count} mutations, {accepted} accepted for writing, the others refused");
    assert!(accepted > count / 50 && accepted < count, "{accepted} of {count} were accepted");
}

/// Ends the process if one image takes minutes.
fn watch(current: &AtomicU64, end: std::sync::mpsc::Receiver<()>) {
    let mut last = u64::MAX;
    while end.recv_timeout(Duration::from_secs(120)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
        let now = current.load(Ordering::Relaxed);
        if now == last {
            eprintln!("mutation {now} hangs");
            std::process::abort();
        }
        last = now;
    }
}

#[test]
fn damaged_images() {
    mutations(0, 600, 5);
}

/// As many as `MUTATIONS` says, from `FIRST` on; QEMU is asked about every `QEMU_EVERY`th.
///
///     MUTATIONS=100000 cargo test --release -p outboard-disk-image many_damaged_images -- --ignored --nocapture
#[test]
#[ignore = "an hour for 100,000"]
fn many_damaged_images() {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    mutations(number("FIRST", 0), number("MUTATIONS", 100_000), number("QEMU_EVERY", 10));
}
