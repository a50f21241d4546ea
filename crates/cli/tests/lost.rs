//! What is lost is said once something gets out again. A process of its own: the log is the whole process's.

use outboard_cli::{Kind, LogLine, Writer, log_to, say};
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

#[test]
fn losses_are_counted_and_said_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let target = path.display().to_string().parse().unwrap();
    log_to(outboard_cli::RotatingFile::open(&target).unwrap()).unwrap();
    tracing_subscriber::fmt().with_ansi(false).with_writer(|| LogLine).init();

    let (mut reader, writer) = std::io::pipe().unwrap();
    let file = OwnedFd::from(writer).into();
    let console = Writer::to_descriptor("bytes of a console", Kind::Stream, 128 << 10, file).unwrap();
    // Nobody reads: the pipe fills, then the queue, then there is no room.
    while console.wait_for_room(Duration::from_secs(1)) {
        console.push_some(&[b'x'; 4096]);
    }
    console.lose(12_345);
    logged(&path, "bytes of a console are being lost: nobody took them");
    // The reader goes on.
    let reading = std::thread::spawn(move || reader.read_to_end(&mut Vec::new()));
    assert!(console.flush(LONG));
    console.push_some(b"and on");
    logged(&path, "12345 bytes of a console were lost: nobody took them");
    drop(console);
    reading.join().unwrap().unwrap();

    // Not what was said to the user.
    say!("this goes to standard error");
    outboard_cli::flush(LONG);
    assert!(!fs::read_to_string(&path).unwrap().contains("this goes"));
}

fn logged(path: &std::path::Path, text: &str) {
    let deadline = Instant::now() + LONG;
    while !fs::read_to_string(path).unwrap().contains(text) {
        assert!(
            Instant::now() < deadline,
            "the log does not say '{text}': {}",
            fs::read_to_string(path).unwrap()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
