//! Every image that cannot be opened says what is wrong and what to do.

#![allow(clippy::print_stderr)] // A test that cannot run says why.

mod common;

use common::*;
use outboard_disk_image::{Disk, DiskError, DiskFormat, DiskOptions, MAX_BACKING_FILES};
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

#[test]
fn things_that_are_no_images() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    assert!(matches!(refusal(&at("none.img"), &rw()), DiskError::NotFound(_)));
    assert!(matches!(refusal(dir.path(), &rw()), DiskError::IsDirectory(_)));
    assert!(matches!(refusal(Path::new("/dev/null"), &rw()), DiskError::NotADisk(_)));
    fs::write(at("empty.img"), []).unwrap();
    assert!(matches!(refusal(&at("empty.img"), &rw()), DiskError::Empty(_)));
    fs::write(at("disk.vmdk"), [0; 1024]).unwrap();
    assert!(matches!(refusal(&at("disk.vmdk"), &rw()), DiskError::UnknownFormat { .. }));
}

#[test]
fn read_only_files_are_not_opened_for_writing() {
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, MIB);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    let error = refusal(&path, &rw());
    assert!(matches!(error, DiskError::ReadOnly(_)));
    assert!(error.to_string().contains(":ro"), "{error}");
    Disk::open(&path, &ro()).unwrap();
}

#[test]
fn one_writer_or_many_readers() {
    let dir = TempDir::new().unwrap();
    for path in [raw_image(&dir, MIB), qcow2_image(&dir, "disk.qcow2", MIB, None)] {
        let writer = Disk::open(&path, &rw()).unwrap();
        assert!(matches!(refusal(&path, &rw()), DiskError::InUse { .. }));
        assert!(matches!(refusal(&path, &ro()), DiskError::InUse { .. }));
        drop(writer);
        let readers = (Disk::open(&path, &ro()).unwrap(), Disk::open(&path, &ro()).unwrap());
        assert!(matches!(refusal(&path, &rw()), DiskError::InUse { .. }));
        drop(readers);
        Disk::open(&path, &rw()).unwrap();
    }
}

#[test]
fn a_backing_file_is_locked_too() {
    let dir = TempDir::new().unwrap();
    let base = raw_image(&dir, MIB);
    let top = qcow2_image(&dir, "top.qcow2", MIB, Some(("disk.img", "raw")));
    let other = qcow2_image(&dir, "other.qcow2", MIB, Some(("disk.img", "raw")));
    let options = over(&[&base]);
    let open = (Disk::open(&top, &options).unwrap(), Disk::open(&other, &options).unwrap());
    assert!(matches!(refusal(&base, &rw()), DiskError::InUse { .. }));
    drop(open);
    let _writer = Disk::open(&base, &rw()).unwrap();
    assert!(matches!(refusal(&top, &options), DiskError::InUse { path, .. } if path == base));
}

#[test]
fn formats_are_not_guessed_from_what_a_guest_wrote() {
    let dir = TempDir::new().unwrap();
    let image = qcow2_image(&dir, "disk.qcow2", MIB, None);
    let renamed = dir.path().join("disk.raw");
    fs::copy(&image, &renamed).unwrap();
    assert!(matches!(refusal(&renamed, &rw()), DiskError::LooksLikeQcow2(_)));
    let as_raw = Disk::open(&renamed, &DiskOptions { format: DiskFormat::Raw, ..rw() }).unwrap();
    assert_eq!(as_raw.len(), fs::metadata(&renamed).unwrap().len());
    drop(as_raw);
    let as_qcow2 = Disk::open(&renamed, &DiskOptions { format: DiskFormat::Qcow2, ..rw() }).unwrap();
    assert_eq!(as_qcow2.len(), MIB);
    fs::write(dir.path().join("zeros.qcow2"), [0; 4096]).unwrap();
    assert!(matches!(refusal(&dir.path().join("zeros.qcow2"), &rw()), DiskError::NotQcow2(_)));
}

#[test]
fn missing_and_cyclic_backing_files() {
    let dir = TempDir::new().unwrap();
    let orphan = qcow2_image(&dir, "orphan.qcow2", MIB, Some(("gone.qcow2", "qcow2")));
    assert!(
        matches!(refusal(&orphan, &rw()), DiskError::BackingNotAllowed { backing, .. } if backing.ends_with("gone.qcow2"))
    );
    let gone = over(&[&dir.path().join("gone.qcow2")]);
    assert!(
        matches!(refusal(&orphan, &gone), DiskError::BackingNotFound { backing, .. } if backing.ends_with("gone.qcow2"))
    );
    let own = qcow2_image(&dir, "own.qcow2", MIB, Some(("own.qcow2", "qcow2")));
    assert!(matches!(refusal(&own, &rw()), DiskError::BackingCycle { .. }));
    let a = qcow2_image(&dir, "a.qcow2", MIB, Some(("b.qcow2", "qcow2")));
    qcow2_image(&dir, "b.qcow2", MIB, Some(("./a.qcow2", "qcow2")));
    let b = dir.path().join("b.qcow2");
    assert!(matches!(refusal(&a, &over(&[&b, &a])), DiskError::BackingCycle { .. }));
    let read_only = DiskOptions { read_only: true, ..over(&[&b]) };
    assert!(matches!(refusal(&a, &read_only), DiskError::BackingCycle { .. }));
    let into_raw = qcow2_image(&dir, "c.qcow2", MIB, Some(("c.qcow2", "raw")));
    assert!(matches!(refusal(&into_raw, &ro()), DiskError::BackingCycle { .. }));
    let folder = qcow2_image(&dir, "d.qcow2", MIB, Some((".", "qcow2")));
    assert!(matches!(refusal(&folder, &over(&[dir.path()])), DiskError::IsDirectory(_)));
}

#[test]
fn long_chains_end() {
    let dir = TempDir::new().unwrap();
    qcow2_image(&dir, "0.qcow2", MIB, None);
    for i in 1..=MAX_BACKING_FILES + 1 {
        qcow2_image(&dir, &format!("{i}.qcow2"), MIB, Some((&format!("{}.qcow2", i - 1), "qcow2")));
    }
    let below = |top: usize| DiskOptions {
        backing: (0..top).rev().map(|i| dir.path().join(format!("{i}.qcow2"))).collect(),
        ..rw()
    };
    let path = |i: usize| dir.path().join(format!("{i}.qcow2"));
    let disk = Disk::open(&path(MAX_BACKING_FILES), &below(MAX_BACKING_FILES)).unwrap();
    assert_eq!(contents(&disk), vec![0; MIB as usize]);
    drop(disk);
    let most = MAX_BACKING_FILES + 1;
    assert!(matches!(refusal(&path(most), &below(most)), DiskError::BackingTooDeep(_)));
}

#[test]
fn backing_formats_must_be_recorded() {
    let dir = TempDir::new().unwrap();
    let options = over(&[&raw_image(&dir, MIB)]);
    for foreign in ["vmdk", "vdi", "vhdx", "vpc", "qed"] {
        let path = qcow2_image(&dir, &format!("{foreign}.qcow2"), MIB, Some(("disk.img", foreign)));
        let error = refusal(&path, &options);
        assert!(matches!(&error, DiskError::BackingFormat { format, .. } if format == foreign));
        assert!(error.to_string().contains("qemu-img convert"), "{error}");
    }
    let path = qcow2_image(&dir, "none.qcow2", MIB, None);
    // The name at the end of the first cluster, and no extension about the format.
    patch(&path, 8, &[&4096u64.to_be_bytes()[..], &8u32.to_be_bytes()].concat());
    patch(&path, 4096, b"disk.img");
    assert!(matches!(refusal(&path, &options), DiskError::BackingFormatMissing(_)));
}

/// A base in the middle of a folder, and an overlay that names it by `name`.
fn overlay(dir: &TempDir, name: &str) -> (PathBuf, PathBuf) {
    let base = raw_image(dir, MIB);
    fs::write(&base, pattern(1, MIB as usize)).unwrap();
    (base, qcow2_image(dir, "top.qcow2", MIB, Some((name, "raw"))))
}

#[test]
fn a_backing_file_is_followed_only_if_the_user_named_it() {
    use std::os::fd::AsRawFd;
    let held = TempDir::new().unwrap();
    let held = fs::File::open(raw_image(&held, MIB)).unwrap();
    let (mut names, absolute) =
        (vec!["disk.img".to_owned(), "./disk.img".into(), "file:disk.img".into()], TempDir::new().unwrap());
    names.push(text(&absolute.path().join("disk.img")).into());
    names.push("link.img".into());
    names.push("../../../../../../../../etc/hostname".into());
    names.push("/etc/hostname".into());
    names.push(format!("/proc/self/fd/{}", held.as_raw_fd()));
    for name in names {
        let dir = TempDir::new().unwrap();
        let (base, top) = overlay(&dir, &name);
        std::os::unix::fs::symlink("disk.img", dir.path().join("link.img")).unwrap();
        fs::write(absolute.path().join("disk.img"), pattern(1, MIB as usize)).unwrap();
        for options in [rw(), ro()] {
            let error = refusal(&top, &options);
            assert!(matches!(error, DiskError::BackingNotAllowed { .. }), "{name}: {error}");
        }
        // The user named another file than the image does.
        let other = dir.path().join("other.img");
        fs::write(&other, [0; 4096]).unwrap();
        let error = refusal(&top, &over(&[&other]));
        assert!(matches!(error, DiskError::BackingDiffers { .. }), "{name}: {error}");
        let base =
            if name.starts_with(text(absolute.path())) { absolute.path().join("disk.img") } else { base };
        let opened = Disk::open(&top, &over(&[&base]));
        if name.contains("hostname") || name.contains("fd") {
            assert!(matches!(opened, Err(DiskError::BackingDiffers { .. })), "{name}");
        } else {
            assert!(contents(&opened.unwrap()) == pattern(1, MIB as usize), "{name}");
        }
    }
}

#[test]
fn a_named_file_that_no_image_wants_is_an_error() {
    let dir = TempDir::new().unwrap();
    let raw = raw_image(&dir, MIB);
    let image = qcow2_image(&dir, "disk.qcow2", MIB, None);
    for path in [&raw, &image] {
        let error = refusal(path, &over(&[Path::new("/etc/hostname")]));
        assert!(matches!(error, DiskError::NoBacking { .. }), "{error}");
    }
}

/// What is opened is the user's file, whatever the image's name leads to from one moment to the next.
#[test]
fn a_backing_file_that_is_changed_while_it_is_opened() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let dir = TempDir::new().unwrap();
    let (base, top) = overlay(&dir, "link.img");
    let secret = dir.path().join("secret");
    fs::write(&secret, [0x5e; 4096]).unwrap();
    let (link, new) = (dir.path().join("link.img"), dir.path().join("new"));
    std::os::unix::fs::symlink(&base, &link).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for target in [&secret, &base] {
                    std::os::unix::fs::symlink(target, &new).unwrap();
                    fs::rename(&new, &link).unwrap();
                }
            }
        });
        for _ in 0..300 {
            match Disk::open(&top, &over(&[&base])) {
                Ok(disk) => assert!(read(&disk, 0, 4096).unwrap() == pattern(1, 4096)),
                Err(DiskError::BackingDiffers { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn truncated_and_garbled_qcow2() {
    let dir = TempDir::new().unwrap();
    let path = qcow2_image(&dir, "disk.qcow2", 64 * MIB, None);
    let disk = Disk::open(&path, &rw()).unwrap();
    for i in 0..8u64 {
        write(&disk, i * 8_192_000, &pattern(i, 65536)).unwrap();
    }
    drop(disk);
    let whole = fs::read(&path).unwrap();
    for len in [8, 71, 103, 512, 65536, 3 * 65536, whole.len() - 65536] {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(refusal(&path, &rw()), DiskError::Damaged { .. }), "cut to {len}");
    }
    for (at, value) in
        [(4, 9), (20, 60), (32, 1), (36, 0xff), (40, 0x7f), (48, 0x7f), (56, 0xff), (72, 0xff), (108, 0x81)]
    {
        let mut garbled = whole.clone();
        garbled[at..at + 4].fill(value);
        fs::write(&path, garbled).unwrap();
        use DiskError::{Damaged, ExternalData, MarkedCorrupt, Unsound, Unsupported};
        let error = refusal(&path, &rw());
        let right = matches!(
            error,
            Damaged { .. } | ExternalData { .. } | Unsound { .. } | Unsupported { .. } | MarkedCorrupt(_)
        );
        assert!(right, "{at}: {error}");
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
        let _ = Disk::open(&path, &rw()).map(|disk| disk.len());
    }
}
