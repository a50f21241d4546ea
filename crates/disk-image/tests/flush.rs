//! A flush that failed once is not followed by one that succeeds: Linux drops the pages whose write-back failed and says so once.

#![allow(clippy::print_stderr)] // A test that cannot run says why.
#![cfg(target_os = "linux")]

mod common;

use common::*;
use outboard_disk_image::Disk;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// Names the image to the child; its presence makes this program the child.
const CHILD: &str = "OUTBOARD_TEST_FLUSH_CHILD";
const ARM: &str = "FAIL_ONE_SYNC";

/// Runs with the library of one_failing_sync.c preloaded.
#[test]
#[ignore = "the other half of later_flushes_fail_too"]
fn child() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let disk = Disk::open(Path::new(&path), &rw()).unwrap();
    let health = disk.health();
    write(&disk, 0, &[1; 4096]).unwrap();
    disk.flush().unwrap();
    assert_eq!(health.flush_error(), None);
    write(&disk, 4096, &[2; 4096]).unwrap();
    std::fs::write(std::env::var_os(ARM).unwrap(), []).unwrap();
    let first = disk.flush().expect_err("the flush whose fsync failed");
    assert_eq!(first.raw_os_error(), Some(5), "{first}");
    for _ in 0..3 {
        write(&disk, 8192, &[3; 4096]).unwrap();
        disk.flush().expect_err("a flush after one that failed");
    }
    assert!(health.flush_error().unwrap().contains("os error 5"));
    drop(disk);
    Disk::open(Path::new(&path), &rw()).unwrap().flush().expect("an image that was opened anew");
    println!("child is done");
}

#[test]
fn later_flushes_fail_too() {
    let dir = TempDir::new().unwrap();
    let library = dir.path().join("one_failing_sync.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/one_failing_sync.c");
    // Rust needs a C compiler as its linker, so there is one.
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
    assert!(compiled.unwrap().success());
    for path in [raw_image(&dir, MIB), qcow2_image(&dir, "disk.qcow2", MIB, None)] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env(CHILD, &path)
            .env(ARM, dir.path().join("arm"))
            .env("LD_PRELOAD", &library)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("child is done"), "{}: {output:?}", path.display());
    }
}
