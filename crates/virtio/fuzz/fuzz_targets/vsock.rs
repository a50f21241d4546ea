//! A guest's packets and programs of the host, against the socket device's table of connections and real Unix sockets.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder for sockets"));

fuzz_target!(|bytes: &[u8]| outboard_virtio::vsock::script::play(bytes, FOLDER.path()));
