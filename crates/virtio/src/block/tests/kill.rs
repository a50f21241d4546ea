//! A process that is killed while its guest writes: the image stays sound, and what was flushed is there.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

/// Names the image to the child; its presence makes this test binary the child.
const CHILD: &str = "OUTBOARD_TEST_KILL_CHILD";
const SLOTS: u64 = 4096;
/// Not a cluster, so that most writes also copy.
const LEN: usize = 12 * 1024;

fn sector(n: u64) -> u64 {
    // A walk through all slots that jumps between L2 tables.
    n * 1531 % SLOTS * (256 << 10) / 512
}

/// With the image beside it as backing file, if it is an overlay.
fn open(path: &Path) -> Driver {
    let base = path.with_file_name("disk.img");
    if base != path && base.exists() { over(path, &[&base]) } else { writable(path) }
}

/// Writes slot after slot, zeroes an old one now and then, flushes, and says how far it has come.
#[test]
#[ignore = "the other half of survives_sigkill"]
fn child() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let mut d = open(Path::new(&path));
    for n in 0..SLOTS {
        assert_eq!(write(&mut d, sector(n), &pattern(n, LEN)), 0);
        if n >= 40 && n % 10 == 0 {
            assert_eq!(send(&mut d, 13, 0, &range(sector(n - 40), 512, 1)), 0);
        }
        if n % 5 == 4 {
            assert_eq!(send(&mut d, 4, 0, &[]), 0);
            // Not println: the test harness would keep it.
            writeln!(std::io::stderr(), "flushed {n}").unwrap();
            d.reset();
            d.start(u64::MAX, 128);
        }
    }
}

/// Starts the child on `path` and kills it soon after its `flushes`th flush; the last slot it reported as flushed.
fn run_and_kill(path: &Path, flushes: usize) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "block::tests::kill::child", "--ignored", "--nocapture"])
        .env(CHILD, path)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut last = None;
    let mut note = |line: String| {
        let number = line.strip_prefix("flushed ").unwrap_or_else(|| panic!("child says: {line}"));
        last = Some(number.parse().unwrap());
    };
    for line in lines.by_ref().take(flushes) {
        note(line);
    }
    std::thread::sleep(std::time::Duration::from_micros(flushes as u64 * 137 % 2000));
    child.kill().unwrap();
    child.wait().unwrap();
    lines.for_each(&mut note);
    last.expect("the child flushed something")
}

#[test]
fn survives_sigkill() {
    let dir = TempDir::new().unwrap();
    for round in 0..20 {
        let name = format!("{round}.qcow2");
        let path = match round % 4 {
            0 => raw_image(&dir, SLOTS << 18),
            1 => {
                raw_image(&dir, SLOTS << 18);
                qcow2_image(&dir, &name, SLOTS << 18, Some(("disk.img", "raw")))
            }
            _ => {
                let _ = std::fs::remove_file(dir.path().join("disk.img"));
                qcow2_image(&dir, &name, SLOTS << 18, None)
            }
        };
        let flushed = run_and_kill(&path, 3 + round * 2);
        if round % 4 != 0 {
            let checked = Command::new("qemu-img").args(["check", path.to_str().unwrap()]).output();
            match checked {
                // 3: leaked clusters but no corruption.
                Ok(output) => {
                    assert!(matches!(output.status.code(), Some(0 | 3)), "round {round}: {output:?}")
                }
                Err(_) => eprintln!("round {round}: not checked, qemu-img is not installed"),
            }
        }
        let mut d = open(&path);
        for n in 0..=flushed {
            // Slots that may have been zeroed since.
            if n % 10 != 0 {
                assert_eq!(
                    read(&mut d, sector(n), LEN as u32),
                    (pattern(n, LEN), 0),
                    "round {round}, slot {n}"
                );
            }
            if n % 64 == 63 {
                d.reset();
                d.start(u64::MAX, 128);
            }
        }
        drop(d);
        let _ = std::fs::remove_file(path);
    }
}
