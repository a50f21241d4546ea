//! What the tests of this crate share.

#![allow(dead_code)] // Each test program uses a part of it.

use outboard_disk_image::{Disk, DiskError, DiskOptions, GuestSlice, Scratch};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// For writing, with no backing file.
pub fn rw() -> DiskOptions {
    DiskOptions::default()
}

/// Only for reading.
pub fn ro() -> DiskOptions {
    DiskOptions { read_only: true, ..rw() }
}

/// For writing, over these backing files.
pub fn over(backing: &[&Path]) -> DiskOptions {
    DiskOptions { backing: backing.iter().map(|path| path.to_path_buf()).collect(), ..rw() }
}

/// The error of an image that must be refused.
pub fn refusal(path: &Path, options: &DiskOptions) -> DiskError {
    match Disk::open(path, options) {
        Err(error) => error,
        Ok(_) => panic!("{} was opened", path.display()),
    }
}

/// An error with all that lies behind it, as the command line shows it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

pub fn read(disk: &Disk, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0xee; len];
    disk.read(&[GuestSlice::from(&mut data[..])], offset, &mut Scratch::default())?;
    Ok(data)
}

pub fn write(disk: &Disk, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut data = data.to_vec();
    disk.write(&[GuestSlice::from(&mut data[..])], offset, &mut Scratch::default())
}

/// All of a disk.
pub fn contents(disk: &Disk) -> Vec<u8> {
    read(disk, 0, disk.len() as usize).unwrap()
}

pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed) >> 13) as u8).collect()
}

/// Runs a program of QEMU; `None`, with a word on why, where it is not installed.
pub fn try_qemu(program: &str, args: &[&str]) -> Option<(Option<i32>, String)> {
    let Ok(output) = Command::new(program).args(args).output() else {
        eprintln!("skipped: {program} is not installed");
        return None;
    };
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Some((output.status.code(), text))
}

/// Runs qemu-img, which must succeed; `None` where it is not installed.
pub fn qemu_img(args: &[&str]) -> Option<String> {
    let (status, text) = try_qemu("qemu-img", args)?;
    assert_eq!(status, Some(0), "qemu-img {args:?}: {text}");
    Some(text)
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn raw_image(dir: &TempDir, len: u64) -> PathBuf {
    let path = dir.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(len).unwrap();
    path
}

/// A fresh qcow2 image, made by imago so that these tests need no QEMU.
pub fn qcow2_image(dir: &TempDir, name: &str, len: u64, backing: Option<(&str, &str)>) -> PathBuf {
    clustered_image(dir, name, len, 65536, backing)
}

/// The same with clusters of `cluster` bytes.
pub fn clustered_image(
    dir: &TempDir,
    name: &str,
    len: u64,
    cluster: usize,
    backing: Option<(&str, &str)>,
) -> PathBuf {
    use imago::file::File;
    use imago::qcow2::Qcow2;
    use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
    let path = dir.path().join(name);
    let file = File::create_open(StorageCreateOptions::new().filename(&path)).unwrap();
    let mut builder: imago::qcow2::Qcow2CreateBuilder<File> =
        Qcow2::create_builder(file).size(len).cluster_size(cluster);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_owned(), format.to_owned());
    }
    builder.create().unwrap();
    path
}

/// A copy, in `dir`, of one of the images in tests/images.
pub fn sample(dir: &TempDir, name: &str) -> PathBuf {
    let to = dir.path().join(name);
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images").join(name);
    std::fs::copy(from, &to).unwrap();
    to
}

/// What most of the images in tests/images hold: a pattern in the first 20 KiB and in the last 3 KiB of 128 KiB.
pub fn sample_data() -> Vec<u8> {
    let mut data = vec![0; 128 << 10];
    for (i, byte) in data.iter_mut().enumerate().take(20 << 10) {
        *byte = ((i / 5 + (i >> 8)) % 251) as u8;
    }
    let len = data.len();
    for (i, byte) in data.iter_mut().enumerate().skip(len - 3072) {
        *byte = (i % 97) as u8;
    }
    data
}

/// Overwrites a part of a file.
pub fn patch(path: &Path, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

/// The big-endian number at `at` of a file.
pub fn number_at(path: &Path, at: u64) -> u64 {
    use std::os::unix::fs::FileExt;
    let mut word = [0; 8];
    std::fs::File::open(path).unwrap().read_exact_at(&mut word, at).unwrap();
    u64::from_be_bytes(word)
}
