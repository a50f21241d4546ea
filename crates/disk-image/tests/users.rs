//! Two users of one disk: QEMU and we, the host and we.

#![allow(clippy::print_stderr)] // A test that cannot run says why.

mod common;

use common::*;
use outboard_disk_image::Disk;
#[cfg(target_os = "linux")]
use outboard_disk_image::DiskError;
use std::path::Path;
use tempfile::TempDir;

/// qemu-io with the image open, until it is dropped.
#[cfg(target_os = "linux")]
struct Open(std::process::Child);

#[cfg(target_os = "linux")]
impl Open {
    fn new(path: &Path, format: &str, read_only: bool) -> Option<Self> {
        use std::io::{BufRead, BufReader, Write};
        use std::process::{Command, Stdio};
        let mut command = Command::new("qemu-io");
        command.args(["-f", format]).args(read_only.then_some("-r")).arg(path);
        let Ok(mut child) = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
            eprintln!("skipped: qemu-io is not installed");
            return None;
        };
        writeln!(child.stdin.as_mut().unwrap(), "read 0 512").unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("512/512")), "qemu-io could not open the image");
        Some(Self(child))
    }
}

#[cfg(target_os = "linux")]
impl Drop for Open {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn what_qemu_has_open_is_refused() {
    let dir = TempDir::new().unwrap();
    for (path, format) in
        [(raw_image(&dir, MIB), "raw"), (qcow2_image(&dir, "disk.qcow2", MIB, None), "qcow2")]
    {
        let Some(writer) = Open::new(&path, format, false) else { return };
        for options in [rw(), ro()] {
            let error = refusal(&path, &options);
            assert!(
                matches!(error, DiskError::InUse { .. }) && error.to_string().contains("QEMU"),
                "{error}"
            );
        }
        drop(writer);
        Disk::open(&path, &rw()).unwrap();
        let _reader = Open::new(&path, format, true);
        Disk::open(&path, &ro()).unwrap();
        // Who only reads a raw image with QEMU's tools lets others write to it.
        if format == "qcow2" {
            assert!(matches!(refusal(&path, &rw()), DiskError::InUse { .. }));
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn what_we_have_open_is_refused_by_qemu() {
    let dir = TempDir::new().unwrap();
    for (path, format) in
        [(raw_image(&dir, MIB), "raw"), (qcow2_image(&dir, "disk.qcow2", MIB, None), "qcow2")]
    {
        let qemu_io = |args: &[&str]| try_qemu("qemu-io", &[&["-f", format], args, &[text(&path)]].concat());
        let writer = Disk::open(&path, &rw()).unwrap();
        let Some((status, said)) = qemu_io(&["-c", "write 0 512"]) else { return };
        assert!(status != Some(0) && said.contains("lock"), "{said}");
        let (status, said) = qemu_io(&["-r", "-c", "read 0 512"]).unwrap();
        assert!(format == "raw" || (status != Some(0) && said.contains("lock")), "{said}");
        drop(writer);
        let _reader = Disk::open(&path, &ro()).unwrap();
        let (status, said) = qemu_io(&["-c", "write 0 512"]).unwrap();
        assert!(status != Some(0) && said.contains("lock"), "{said}");
        let (status, said) = qemu_io(&["-r", "-c", "read 0 512"]).unwrap();
        assert_eq!(status, Some(0), "{said}");
    }
}

/// A loop device on a file of `mib` MiB.
#[cfg(target_os = "linux")]
struct Loop(String);

#[cfg(target_os = "linux")]
impl Loop {
    /// `None`, with a word on why, where there can be none.
    fn new(file: &Path, mib: u64, args: &[&str]) -> Option<Self> {
        std::fs::File::options().create(true).append(true).open(file).unwrap().set_len(mib << 20).unwrap();
        let output =
            std::process::Command::new("losetup").args(["-f", "--show"]).args(args).arg(file).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
            }
            other => {
                eprintln!("skipped: no loop device can be made here ({other:?})");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        Path::new(&self.0)
    }
}

#[cfg(target_os = "linux")]
impl Drop for Loop {
    fn drop(&mut self) {
        // Partitions outlive what was in the device. Mostly there are none, which delpart says.
        for number in ["1", "2"] {
            let _ = std::process::Command::new("delpart").args([&self.0, number]).output();
        }
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[cfg(target_os = "linux")]
fn succeeds(program: &str, args: &[&str]) -> bool {
    let output = std::process::Command::new(program).args(args).output();
    let ok = output.as_ref().is_ok_and(|output| output.status.success());
    if !ok {
        eprintln!("skipped: {program} {args:?}: {output:?}");
    }
    ok
}

#[cfg(target_os = "linux")]
#[test]
fn a_read_only_device_is_opened_only_for_reading() {
    let dir = TempDir::new().unwrap();
    let Some(device) = Loop::new(&dir.path().join("file"), 8, &["-r"]) else { return };
    let error = refusal(device.path(), &rw());
    assert!(matches!(error, DiskError::ReadOnlyDevice(_)), "{error}");
    assert!(error.to_string().contains(":ro"));
    let (one, two) = (Disk::open(device.path(), &ro()).unwrap(), Disk::open(device.path(), &ro()).unwrap());
    assert_eq!((one.len(), two.len()), (8 * MIB, 8 * MIB));
}

#[cfg(target_os = "linux")]
#[test]
fn a_mounted_device_is_refused() {
    let dir = TempDir::new().unwrap();
    let Some(device) = Loop::new(&dir.path().join("file"), 32, &[]) else { return };
    let disk = Disk::open(device.path(), &rw()).unwrap();
    write(&disk, 0, &[0; 4096]).unwrap();
    disk.flush().unwrap();
    assert!(matches!(refusal(device.path(), &rw()), DiskError::DeviceInUse { .. } | DiskError::InUse { .. }));
    drop(disk);
    let place = dir.path().join("mnt");
    std::fs::create_dir(&place).unwrap();
    if !succeeds("mkfs.ext4", &["-q", &device.0]) || !succeeds("mount", &[&device.0, text(&place)]) {
        return;
    }
    let errors = [refusal(device.path(), &rw()), refusal(device.path(), &ro())];
    assert!(succeeds("umount", &[text(&place)]));
    for error in errors {
        assert!(matches!(error, DiskError::DeviceInUse { .. }), "{error}");
        assert!(error.to_string().contains(&format!("mounted on {}", place.display())), "{error}");
    }
    Disk::open(device.path(), &rw()).unwrap();
}

/// A partition whose disk is in use, and a disk of which a partition is in use.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_and_its_partition_are_not_two_disks() {
    let dir = TempDir::new().unwrap();
    let Some(device) = Loop::new(&dir.path().join("file"), 32, &[]) else { return };
    for (number, first) in [("1", "2048"), ("2", "20480")] {
        if !succeeds("addpart", &[&device.0, number, first, "16384"]) {
            return;
        }
    }
    let partition = device.0.clone() + "p1";
    let partition = Path::new(&partition);
    let whole = Disk::open(device.path(), &rw()).unwrap();
    assert!(matches!(refusal(partition, &rw()), DiskError::DeviceInUse { .. }));
    assert!(matches!(refusal(partition, &ro()), DiskError::DeviceInUse { .. }));
    drop(whole);
    let part = Disk::open(partition, &rw()).unwrap();
    assert!(matches!(refusal(device.path(), &rw()), DiskError::DeviceInUse { .. }));
    let second = device.0.clone() + "p2";
    Disk::open(Path::new(&second), &rw()).unwrap();
    drop(part);
    Disk::open(device.path(), &rw()).unwrap();
}

/// The same on every host: one writer, or many readers.
#[test]
fn one_file_by_two_names() {
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, MIB);
    let link = dir.path().join("link.img");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let _writer = Disk::open(&path, &rw()).unwrap();
    for name in [link.as_path(), Path::new(text(&path))] {
        refusal(name, &ro());
    }
}
