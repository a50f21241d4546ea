//! `core.h` says the same as `ffi.rs`: fields in the same order with the same widths, functions with as many arguments.

use std::fs;
use std::path::Path;

fn read(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).expect("the file is there")
}

/// Names of the fields between `start` and the brace that closes it, in order. `field` takes a line apart.
fn fields(text: &str, start: &str, field: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let (_, rest) = text.split_once(start).unwrap_or_else(|| panic!("there is no '{start}'"));
    let end = rest.find("\n}").expect("it ends");
    rest[..end].lines().filter_map(|line| field(line.trim())).collect()
}

fn rust_field(line: &str) -> Option<String> {
    let (name, kind) = line.strip_prefix("pub ")?.trim_end_matches(',').split_once(": ")?;
    Some(format!("{name} {}", width(kind)))
}

fn c_field(line: &str) -> Option<String> {
    if let Some((_, rest)) = line.split_once("(*") {
        return Some(format!("{} pointer", rest.split(')').next()?));
    }
    let (kind, name) = line.trim_end_matches(';').rsplit_once([' ', '*'])?;
    let pointer = line.contains('*');
    let name = name.split('[').next()?;
    Some(format!("{name} {}", if pointer { "pointer" } else { width(kind) }))
}

fn width(kind: &str) -> &str {
    match kind {
        kind if kind.starts_with("extern") || kind.starts_with('*') => "pointer",
        kind if kind.contains("Range") || kind.contains("odma_range") => "ranges",
        kind => kind,
    }
}

#[test]
fn structures_agree() {
    let (header, ffi, exchange) = (read("../core.h"), read("src/ffi.rs"), read("src/exchange.rs"));
    let pairs = [
        ("struct odma_range {", "pub struct RamRange {"),
        ("struct odma_core_config {", "pub struct Config {"),
        ("struct odma_list {", "pub struct CList {"),
        ("struct odma_window {", "pub struct CWindow {"),
    ];
    for (c, rust) in pairs {
        assert_eq!(fields(&header, c, c_field), fields(&ffi, rust, rust_field), "{c}");
    }
    let mut stats = fields(&ffi, "pub struct CoreStats {", rust_field);
    assert_eq!(stats.pop().as_deref(), Some("exchange Counts"));
    stats.extend(fields(&exchange, "pub struct Counts {", rust_field));
    assert_eq!(fields(&header, "struct odma_core_stats {", c_field), stats);
}

#[test]
fn functions_agree() {
    let (header, ffi) = (read("../core.h"), read("src/ffi.rs"));
    let arguments = |text: &str, name: &str| {
        let (_, rest) = text.split_once(&format!("{name}(")).unwrap_or_else(|| panic!("no {name}"));
        rest.split(')').next().expect("it closes").split(',').filter(|part| !part.trim().is_empty()).count()
    };
    let names: Vec<&str> = ffi
        .lines()
        .filter_map(|line| line.strip_prefix("pub unsafe extern \"C\" fn ")?.split('(').next())
        .collect();
    assert!(names.len() > 8);
    for name in &names {
        assert_eq!(arguments(&header, name), arguments(&ffi, name), "{name}");
    }
    let declared = header.matches("odma_core_").count() - header.matches("struct odma_core_").count();
    assert_eq!(declared, names.len(), "core.h declares exactly these");
}

/// `NAME = VALUE` of an enumeration of `core.h`.
fn constant(header: &str, name: &str) -> u32 {
    let (_, rest) =
        header.split_once(&format!("\t{name} = ")).unwrap_or_else(|| panic!("there is no {name}"));
    let value = rest.split(',').next().expect("it ends");
    let number = |text: &str| text.trim().parse::<u32>().expect("a number");
    value.split_once("<<").map_or_else(|| number(value), |(one, shift)| number(one) << number(shift))
}

#[test]
fn the_table_of_states_has_the_same_numbers() {
    use outboard_dma_core::served::*;
    let header = read("../core.h");
    let numbers = [
        ("ODMA_FREE", State::Free as u32),
        ("ODMA_FOREIGN", State::Foreign as u32),
        ("ODMA_BOUND", State::Served as u32),
        ("ODMA_REFUSED", State::Refused as u32),
        ("ODMA_LEAVING", State::Leaving as u32),
        ("ODMA_FOUND", Event::Found as u32),
        ("ODMA_TAKEN", Event::Taken as u32),
        ("ODMA_BIND", Event::Bind as u32),
        ("ODMA_DENIED", Event::Denied as u32),
        ("ODMA_UNBOUND", Event::Unbound as u32),
        ("ODMA_PROBE_FAILED", Event::Failed as u32),
        ("ODMA_SETTLED", Event::Settled as u32),
        ("ODMA_REMOVED", Event::Removed as u32),
        ("ODMA_ACT_HOLD_MODULE", HOLD_MODULE),
        ("ODMA_ACT_QUIET", QUIET),
        ("ODMA_ACT_SERVE", SERVE),
        ("ODMA_ACT_REFUSE", REFUSE),
        ("ODMA_ACT_RESTORE", RESTORE),
        ("ODMA_ACT_LEAKS", LEAKS),
        ("ODMA_ACT_TRIM", TRIM),
        ("ODMA_ACT_SETTLE", SETTLE),
        ("ODMA_ACT_DROP_MODULE", DROP_MODULE),
        ("ODMA_ACT_FORGET", FORGET),
        ("ODMA_ADMIT_GO", Admission::Go as u32),
        ("ODMA_ADMIT_START", Admission::Start as u32),
        ("ODMA_ADMIT_CLOSING", Admission::Closing as u32),
        ("ODMA_ADMIT_FOREIGN", Admission::Foreign as u32),
        ("ODMA_ADMIT_LOST", Admission::Lost as u32),
    ];
    for (name, number) in numbers {
        assert_eq!(constant(&header, name), number, "{name}");
    }
}
