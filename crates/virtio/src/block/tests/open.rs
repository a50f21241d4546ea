//! Every image that cannot be opened says what is wrong and what to do.

use super::*;
use std::fs;
use std::os::unix::fs::PermissionsExt;

fn refusal(path: &Path, options: DiskOptions) -> DiskError {
    Disk::open(path, options).expect_err("opened what it should refuse")
}

const RW: DiskOptions = DiskOptions { read_only: false, format: DiskFormat::Auto };
const RO: DiskOptions = DiskOptions { read_only: true, format: DiskFormat::Auto };

#[test]
fn things_that_are_no_images() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    assert!(matches!(refusal(&at("none.img"), RW), DiskError::NotFound(_)));
    assert!(matches!(refusal(dir.path(), RW), DiskError::IsDirectory(_)));
    assert!(matches!(refusal(Path::new("/dev/null"), RW), DiskError::NotADisk(_)));
    fs::write(at("empty.img"), []).unwrap();
    assert!(matches!(refusal(&at("empty.img"), RW), DiskError::Empty(_)));
    fs::write(at("odd.img"), [0; 1000]).unwrap();
    assert!(matches!(refusal(&at("odd.img"), RW), DiskError::BadSize { len: 1000, .. }));
    fs::write(at("disk.vmdk"), [0; 1024]).unwrap();
    assert!(matches!(refusal(&at("disk.vmdk"), RW), DiskError::UnknownFormat(_)));
}

#[test]
fn read_only_files_are_not_opened_for_writing() {
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, MIB);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    let error = refusal(&path, RW);
    assert!(matches!(error, DiskError::ReadOnly(_)));
    assert!(error.to_string().contains(":ro"), "{error}");
    Disk::open(&path, RO).unwrap();
}

#[test]
fn one_writer_or_many_readers() {
    let dir = TempDir::new().unwrap();
    for path in [raw_image(&dir, MIB), qcow2_image(&dir, "disk.qcow2", MIB, None)] {
        let writer = Disk::open(&path, RW).unwrap();
        assert!(matches!(refusal(&path, RW), DiskError::InUse(_)));
        assert!(matches!(refusal(&path, RO), DiskError::InUse(_)));
        drop(writer);
        let readers = (Disk::open(&path, RO).unwrap(), Disk::open(&path, RO).unwrap());
        assert!(matches!(refusal(&path, RW), DiskError::InUse(_)));
        drop(readers);
        Disk::open(&path, RW).unwrap();
    }
}

#[test]
fn a_backing_file_is_locked_too() {
    let dir = TempDir::new().unwrap();
    let base = raw_image(&dir, MIB);
    let top = qcow2_image(&dir, "top.qcow2", MIB, Some(("disk.img", "raw")));
    let other = qcow2_image(&dir, "other.qcow2", MIB, Some(("disk.img", "raw")));
    let open = (Disk::open(&top, RW).unwrap(), Disk::open(&other, RW).unwrap());
    assert!(matches!(refusal(&base, RW), DiskError::InUse(_)));
    drop(open);
    let _writer = Disk::open(&base, RW).unwrap();
    assert!(matches!(refusal(&top, RW), DiskError::InUse(path) if path == base));
}

#[test]
fn formats_are_not_guessed_from_what_a_guest_wrote() {
    let dir = TempDir::new().unwrap();
    let image = qcow2_image(&dir, "disk.qcow2", MIB, None);
    let renamed = dir.path().join("disk.raw");
    fs::copy(&image, &renamed).unwrap();
    assert!(matches!(refusal(&renamed, RW), DiskError::LooksLikeQcow2(_)));
    let as_raw = Disk::open(&renamed, DiskOptions { format: DiskFormat::Raw, ..RW }).unwrap();
    assert_eq!(as_raw.len(), fs::metadata(&renamed).unwrap().len());
    drop(as_raw);
    let as_qcow2 = Disk::open(&renamed, DiskOptions { format: DiskFormat::Qcow2, ..RW }).unwrap();
    assert_eq!(as_qcow2.len(), MIB);
    fs::write(dir.path().join("zeros.qcow2"), [0; 4096]).unwrap();
    assert!(matches!(refusal(&dir.path().join("zeros.qcow2"), RW), DiskError::NotQcow2(_)));
}

#[test]
fn missing_and_cyclic_backing_files() {
    let dir = TempDir::new().unwrap();
    let orphan = qcow2_image(&dir, "orphan.qcow2", MIB, Some(("gone.qcow2", "qcow2")));
    assert!(
        matches!(refusal(&orphan, RW), DiskError::BackingNotFound { backing, .. } if backing.ends_with("gone.qcow2"))
    );
    let own = qcow2_image(&dir, "own.qcow2", MIB, Some(("own.qcow2", "qcow2")));
    assert!(matches!(refusal(&own, RW), DiskError::BackingCycle { .. }));
    let a = qcow2_image(&dir, "a.qcow2", MIB, Some(("b.qcow2", "qcow2")));
    qcow2_image(&dir, "b.qcow2", MIB, Some(("./a.qcow2", "qcow2")));
    assert!(matches!(refusal(&a, RW), DiskError::BackingCycle { .. }));
    assert!(matches!(refusal(&a, RO), DiskError::BackingCycle { .. }));
    let into_raw = qcow2_image(&dir, "c.qcow2", MIB, Some(("c.qcow2", "raw")));
    assert!(matches!(refusal(&into_raw, RO), DiskError::BackingCycle { .. }));
    let folder = qcow2_image(&dir, "d.qcow2", MIB, Some((".", "qcow2")));
    assert!(matches!(refusal(&folder, RW), DiskError::IsDirectory(_)));
}

#[test]
fn long_chains_end() {
    let dir = TempDir::new().unwrap();
    qcow2_image(&dir, "0.qcow2", MIB, None);
    for i in 1..=MAX_BACKING_FILES + 1 {
        qcow2_image(&dir, &format!("{i}.qcow2"), MIB, Some((&format!("{}.qcow2", i - 1), "qcow2")));
    }
    Disk::open(&dir.path().join(format!("{MAX_BACKING_FILES}.qcow2")), RW).unwrap();
    let path = dir.path().join(format!("{}.qcow2", MAX_BACKING_FILES + 1));
    assert!(matches!(refusal(&path, RW), DiskError::BackingTooDeep(_)));
}

#[test]
fn backing_formats_must_be_recorded() {
    let dir = TempDir::new().unwrap();
    raw_image(&dir, MIB);
    let path = qcow2_image(&dir, "vmdk.qcow2", MIB, Some(("disk.img", "vmdk")));
    assert!(matches!(refusal(&path, RW), DiskError::BackingFormat { format, .. } if format == "vmdk"));
}

#[test]
fn truncated_and_garbled_qcow2() {
    let dir = TempDir::new().unwrap();
    let path = qcow2_image(&dir, "disk.qcow2", 64 * MIB, None);
    let mut d = writable(&path);
    for i in 0..8u64 {
        assert_eq!(write(&mut d, i * 16000, &pattern(i, 65536)), 0);
    }
    drop(d);
    let whole = fs::read(&path).unwrap();
    // Up to the tables' end a cut shows; what is cut from the data at the end only QEMU's check would find.
    for len in [8, 71, 103, 512, 65536, 3 * 65536] {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(refusal(&path, RW), DiskError::BadQcow2 { .. }), "cut to {len}");
    }
    for (at, value) in
        [(4, 9), (20, 60), (32, 1), (36, 0xff), (40, 0x7f), (48, 0x7f), (56, 0xff), (72, 0xff), (108, 0x81)]
    {
        let mut garbled = whole.clone();
        garbled[at..at + 4].fill(value);
        fs::write(&path, garbled).unwrap();
        let error = refusal(&path, RW);
        assert!(matches!(error, DiskError::BadQcow2 { .. } | DiskError::ExternalData(_)), "{at}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random bytes in the header: an error or a disk, never a panic or an endless loop.
    #[test]
    fn random_headers(bytes in prop::collection::vec((4usize..120, any::<u8>()), 1..12)) {
        let dir = TempDir::new().unwrap();
        let path = qcow2_image(&dir, "disk.qcow2", MIB, None);
        let mut image = fs::read(&path).unwrap();
        for (at, value) in bytes {
            image[at] = value;
        }
        fs::write(&path, image).unwrap();
        let _ = Disk::open(&path, RW).map(|disk| disk.len());
    }
}
