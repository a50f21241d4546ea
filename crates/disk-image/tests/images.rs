//! Images from bug reports, each with its right outcome.

#![allow(clippy::print_stderr)] // A test that cannot run says why.

mod common;

use common::*;
use outboard_disk_image::{Disk, DiskError};
use std::path::Path;
use tempfile::TempDir;

/// Opens a copy of a sample and compares the data; writes, opens it again, and compares once more.
fn works(name: &str) {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, name);
    let mut expected = sample_data();
    let disk = Disk::open(&path, &rw()).unwrap();
    assert!(contents(&disk) == expected, "{name}");
    // A part of a cluster, whole clusters, across a border, the end.
    for (offset, len) in [
        (512usize, 512usize),
        (8192, 4096),
        (11 << 10, 9 << 10),
        (100 << 10, 3 << 10),
        ((128 << 10) - 512, 512),
    ] {
        let data = pattern(offset as u64, len);
        write(&disk, offset as u64, &data).unwrap();
        expected[offset..offset + len].copy_from_slice(&data);
        assert!(contents(&disk) == expected, "{name} after a write at {offset}");
    }
    disk.write_zeroes(4096, 5120, true).unwrap();
    expected[4096..4096 + 5120].fill(0);
    disk.flush().unwrap();
    drop(disk);
    assert!(contents(&Disk::open(&path, &rw()).unwrap()) == expected, "{name} opened again");
    qemu_agrees(&path, &expected);
}

/// QEMU finds no fault in the image, and the same data.
fn qemu_agrees(path: &Path, expected: &[u8]) {
    if qemu_img(&["check", "-q", text(path)]).is_none() {
        return;
    }
    let flat = path.with_extension("flat");
    qemu_img(&["convert", "-O", "raw", text(path), text(&flat)]);
    assert!(std::fs::read(&flat).unwrap() == expected, "{} as QEMU reads it", path.display());
}

#[test]
fn clusters_compressed_with_zlib() {
    works("compressed-zlib.qcow2");
}

#[test]
fn clusters_compressed_with_zstd() {
    works("compressed-zstd.qcow2");
}

#[test]
fn clusters_of_512_bytes() {
    works("cluster-512.qcow2");
}

/// The last cluster of the disk is compressed, and is not whole.
#[test]
fn a_compressed_end() {
    let dir = TempDir::new().unwrap();
    let (raw, path) = (dir.path().join("data.raw"), dir.path().join("disk.qcow2"));
    let mut data = pattern(3, (5 << 16) + 1536);
    data[300..4000].fill(7);
    data[5 << 16..].fill(9);
    std::fs::write(&raw, &data).unwrap();
    for kind in ["zlib", "zstd"] {
        let options = format!("compression_type={kind}");
        let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&path)];
        if qemu_img(&args).is_none() {
            return;
        }
        let disk = Disk::open(&path, &rw()).unwrap();
        assert!(contents(&disk) == data);
        write(&disk, 5 << 16, &[1; 512]).unwrap();
        let mut expected = data.clone();
        expected[5 << 16..(5 << 16) + 512].fill(1);
        drop(disk);
        let disk = Disk::open(&path, &rw()).unwrap();
        assert!(contents(&disk) == expected, "{kind}");
        drop(disk);
        qemu_agrees(&path, &expected);
    }
}

/// A stream that begins with "copy what was three bytes ago": there is nothing. What is before the buffer, or at its end, is memory of
/// this process.
#[test]
fn a_compressed_cluster_cannot_refer_to_what_was_before_it() {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, "compressed-zlib.qcow2");
    // Fixed Huffman codes: length 258, distance 3, again and again. Bits from the lowest on: 1, 01, then 11000101 00010.
    let bits: Vec<u8> =
        [1, 1, 0].into_iter().chain([1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0].repeat(20)).collect();
    let stream: Vec<u8> =
        bits.chunks(8).map(|byte| byte.iter().rev().fold(0, |value, bit| value << 1 | bit)).collect();
    let data = number_at(&path, 16384 + 8) & 0xff_ffff;
    patch(&path, data, &stream);
    for options in [rw(), ro()] {
        let disk = Disk::open(&path, &options).unwrap();
        for (offset, len) in [(4096, 4096), (4608, 512)] {
            // QEMU says the same.
            assert!(read(&disk, offset, len).is_err(), "data out of nothing");
        }
        assert!(read(&disk, 0, 4096).unwrap() == sample_data()[..4096]);
    }
}

#[test]
fn a_zstd_image_as_backing_file() {
    let dir = TempDir::new().unwrap();
    let base = sample(&dir, "compressed-zstd.qcow2");
    let top = clustered_image(&dir, "top.qcow2", 128 << 10, 65536, Some(("compressed-zstd.qcow2", "qcow2")));
    let disk = Disk::open(&top, &over(&[&base])).unwrap();
    let mut expected = sample_data();
    assert!(contents(&disk) == expected);
    write(&disk, 1024, &[5; 512]).unwrap();
    expected[1024..1536].fill(5);
    assert!(contents(&disk) == expected);
}

#[test]
fn a_snapshot_stays_as_it_is() {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, "snapshots.qcow2");
    let disk = Disk::open(&path, &rw()).unwrap();
    let mut now = sample_data();
    now[4096..8192].fill(0x77);
    assert!(contents(&disk) == now);
    for offset in (0..128 << 10).step_by(6 << 10) {
        write(&disk, offset, &[0x11; 2048]).unwrap();
    }
    drop(disk);
    if qemu_img(&["check", "-q", text(&path)]).is_none() {
        return;
    }
    let flat = dir.path().join("flat");
    qemu_img(&["convert", "-l", "snapshot.name=one", "-O", "raw", text(&path), text(&flat)]);
    assert!(std::fs::read(&flat).unwrap() == sample_data());
}

#[test]
fn version_2_with_a_backing_file() {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, "v2-backing.qcow2");
    let base = dir.path().join("data.raw");
    std::fs::write(&base, sample_data()).unwrap();
    let mut expected = sample_data();
    expected[8192..9216].fill(0x44);
    let disk = Disk::open(&path, &over(&[&base])).unwrap();
    assert!(contents(&disk) == expected);
    // Version 2 has no zero clusters, but its guest may ask for zeros all the same.
    disk.write_zeroes(0, 16384, true).unwrap();
    disk.discard(20480, 4096).unwrap();
    expected[..16384].fill(0);
    assert!(contents(&disk) == expected);
    drop(disk);
    qemu_agrees(&path, &expected);
}

#[test]
fn a_size_that_is_no_multiple_of_512() {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, "odd-size.qcow2");
    let disk = Disk::open(&path, &rw()).unwrap();
    // QEMU rounds the size of a qcow2 image down, and that of a file up.
    assert_eq!(disk.len(), 130_560);
    write(&disk, 130_048, &[9; 512]).unwrap();
    drop(disk);
    assert_eq!(number_at(&path, 24), 130_660, "the header keeps its size");
    let mut expected = vec![0; 130_560];
    expected[130_048..].fill(9);
    qemu_agrees(&path, &expected);
    let raw = dir.path().join("odd.raw");
    std::fs::write(&raw, pattern(1, 1000)).unwrap();
    let disk = Disk::open(&raw, &ro()).unwrap();
    let mut expected = pattern(1, 1000);
    expected.resize(1024, 0);
    assert_eq!(contents(&disk), expected);
    assert_eq!(read(&disk, 512, 512).unwrap(), expected[512..]);
    drop(disk);
    let disk = Disk::open(&raw, &rw()).unwrap();
    write(&disk, 512, &[3; 512]).unwrap();
    assert_eq!(read(&disk, 512, 512).unwrap(), [3; 512]);
    drop(disk);
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 1024);
}

/// The error's type is right, and all it says together holds these words.
fn says(error: &DiskError, words: &[&str]) {
    let text = chain(error);
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

#[test]
fn an_image_that_was_not_closed() {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, "dirty.qcow2");
    let error = refusal(&path, &rw());
    assert!(matches!(error, DiskError::Dirty(_)));
    says(&error, &["not closed properly", "qemu-img check -r all", ":ro"]);
    assert!(contents(&Disk::open(&path, &ro()).unwrap()) == sample_data());
}

#[test]
fn a_backing_file_that_is_no_file() {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, "json-backing.qcow2");
    let error = refusal(&path, &rw());
    assert!(matches!(error, DiskError::BackingName { .. }));
    says(&error, &["JSON description", "json:{", "qemu-img rebase"]);
    for name in
        ["nbd:localhost:10809", "nbd://localhost/disk", "https://example.org/disk.img", "ssh://host/disk"]
    {
        let path = qcow2_image(&dir, "remote.qcow2", MIB, Some((name, "raw")));
        let error = refusal(&path, &ro());
        assert!(matches!(error, DiskError::BackingName { .. }));
        says(&error, &[name, name.split_once(':').unwrap().0]);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_file_of_the_host_as_backing_file() {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, "absolute-backing.qcow2");
    for options in [rw(), ro()] {
        let error = refusal(&path, &options);
        assert!(matches!(error, DiskError::BackingNotAllowed { .. }));
        says(&error, &["/etc/hostname", "backing=/etc/hostname"]);
    }
    let disk = Disk::open(&path, &over(&[Path::new("/etc/hostname")])).unwrap();
    let name = std::fs::read("/etc/hostname").unwrap();
    assert!(contents(&disk).starts_with(&name));
}

#[test]
fn images_that_cannot_be_written_safely() {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, "no-refcount-table.qcow2");
    let before = std::fs::read(&path).unwrap();
    says(&refusal(&path, &rw()), &["it has no refcount table", "qemu-img check"]);
    assert!(std::fs::read(&path).unwrap() == before);
    let path = sample(&dir, "truncated.qcow2");
    for options in [rw(), ro()] {
        says(&refusal(&path, &options), &["damaged or truncated", "is not in the file"]);
    }
    // Of a sound image: refcounts of zero for its own tables, an empty first entry, blocks and tables in one place.
    let table = number_at(&sample(&dir, "cluster-512.qcow2"), 48);
    let block = number_at(&sample(&dir, "cluster-512.qcow2"), table);
    let l1 = number_at(&sample(&dir, "cluster-512.qcow2"), 40);
    let damages: [(&str, u64, Vec<u8>, &str); 8] = [
        ("refcount of the header", block, vec![0; 2], "cluster 0 has a refcount of 0 but is used 1 times"),
        ("refcounts", block, vec![0; 512], "refcount of 0"),
        ("first entry of the refcount table", table, vec![0; 8], "refcount of 0"),
        ("refcount block in the header", table, vec![0; 8], "refcount of 0"),
        ("refcount block on the L1 table", table, l1.to_be_bytes().to_vec(), "two things are in one place"),
        ("refcount block beyond the end", table, (1u64 << 40).to_be_bytes().to_vec(), "is not in the file"),
        ("L1 table on the refcount table", 40, table.to_be_bytes().to_vec(), ""),
        ("refcount table on the header", 48, vec![0; 8], ""),
    ];
    for (what, at, bytes, reason) in damages {
        let path = sample(&dir, "cluster-512.qcow2");
        patch(&path, at, &bytes);
        let before = std::fs::read(&path).unwrap();
        let error = refusal(&path, &rw());
        assert!(matches!(error, DiskError::Unsound { .. } | DiskError::Damaged { .. }), "{what}: {error}");
        says(&error, &[reason]);
        assert!(std::fs::read(&path).unwrap() == before, "{what}: a refused image was written to");
    }
}

#[test]
fn features_that_are_not_supported_say_so() {
    let dir = TempDir::new().unwrap();
    let path = sample(&dir, "data-file.qcow2");
    says(&refusal(&path, &rw()), &["outside.data", "qemu-img convert"]);
    let feature = |bits: u64| {
        let path = sample(&dir, "cluster-512.qcow2");
        patch(&path, 72, &bits.to_be_bytes());
        path
    };
    let error = refusal(&feature(1 << 1), &rw());
    assert!(matches!(error, DiskError::MarkedCorrupt(_)));
    says(&error, &["qemu-img check -r all", ":ro"]);
    assert!(contents(&Disk::open(&feature(1 << 1), &ro()).unwrap()) == sample_data());
    says(&refusal(&feature(1 << 4), &rw()), &["extended L2", "extended_l2=off"]);
    says(&refusal(&feature(1 << 4), &ro()), &["extended L2", "extended_l2=off"]);
    says(
        &refusal(&feature(1 << 40 | 1 << 7), &ro()),
        &["unknown incompatible features: 7, 40", "qemu-img convert"],
    );
    says(&refusal(&feature(1 << 3), &ro()), &["contradicts itself", "compressed"]);
    let encrypted = sample(&dir, "cluster-512.qcow2");
    patch(&encrypted, 32, &2u32.to_be_bytes());
    says(&refusal(&encrypted, &ro()), &["encrypted", "qemu-img convert --object secret"]);
    let future = sample(&dir, "cluster-512.qcow2");
    patch(&future, 4, &9u32.to_be_bytes());
    says(&refusal(&future, &ro()), &["version 9"]);
}

/// The real thing, where QEMU can make it.
#[test]
fn extended_l2_and_bitmaps_from_qemu() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("extended.qcow2");
    if qemu_img(&["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", text(&path), "1M"]).is_none() {
        return;
    }
    says(&refusal(&path, &rw()), &["extended L2"]);
    let path = dir.path().join("bitmap.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "1M"]);
    qemu_img(&["bitmap", "--add", text(&path), "daily"]);
    says(&refusal(&path, &rw()), &["dirty bitmaps", "qemu-img bitmap --remove"]);
    Disk::open(&path, &ro()).unwrap();
    qemu_img(&["bitmap", "--remove", text(&path), "daily"]);
    Disk::open(&path, &rw()).unwrap();
}

/// What a killed process leaves must be accepted again: imago links new tables before it writes their refcounts.
#[test]
fn a_table_is_counted_before_it_is_linked() {
    let dir = TempDir::new().unwrap();
    for refcount_bits in ["1", "16", "64"] {
        let path = dir.path().join("disk.qcow2");
        let options = format!("cluster_size=512,refcount_bits={refcount_bits}");
        if qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "64M"]).is_none() {
            return;
        }
        let disk = Disk::open(&path, &rw()).unwrap();
        let copy = dir.path().join("copy.qcow2");
        for i in 0..600u64 {
            write(&disk, (i * 7919 % 2048) * 32768, &[1; 512]).unwrap();
            if i % 50 == 7 {
                // As the file is when the process is killed now.
                std::fs::copy(&path, &copy).unwrap();
                if let Err(error) = Disk::open(&copy, &rw()) {
                    panic!("refcount_bits={refcount_bits}, after {i} writes: {}", chain(&error));
                }
            }
        }
    }
}
