//! The C header says what the Rust says.

use outboard_abi::{ENTRY_OFFSETS, OPS, REGISTERS, STATUSES, published};
use std::fmt::Write;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/include/outboard_dma.h");

fn header() -> String {
    let mut text = String::from(
        "/* SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0 */\n\
         /* Written by crates/abi/tests/header.rs; change crates/abi/src and run UPDATE=1 cargo test -p outboard-abi. */\n\
         #ifndef OUTBOARD_DMA_H\n#define OUTBOARD_DMA_H\n",
    );
    for list in [REGISTERS, ENTRY_OFFSETS, OPS, STATUSES, published::CONSTANTS] {
        text.push('\n');
        for (name, value, comment) in list {
            let comment = comment.join("").replace(['[', ']', '`'], "");
            let _ = write!(text, "/*{comment} */\n#define ODMA_{name} {value:#x}u\n");
        }
    }
    text.push_str("\n#endif\n");
    text
}

#[test]
fn the_header_is_up_to_date() {
    let wanted = header();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(PATH, &wanted).expect("the header can be written");
    }
    let found = std::fs::read_to_string(PATH).unwrap_or_default();
    assert!(found == wanted, "{PATH} is out of date: run UPDATE=1 cargo test -p outboard-abi");
}
