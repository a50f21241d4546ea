//! macos/outboard.sb against the list of files of a machine. The profile is text here: no Mac has run it. What is checked is that it says what it
//! is meant to say, read as sandbox(7) profiles are: of the rules that match an operation the last one counts.

use std::path::Path;

const PROFILE: &str = include_str!("../../../macos/outboard.sb");

/// What `-D` gives.
const PARAMETERS: [(&str, &str); 5] = [
    ("PROGRAM", "/opt/outboard/bin/outboard"),
    ("KERNEL", "/Users/u/vm/vmlinuz"),
    ("INITRD", "/Users/u/vm/initrd.img"),
    ("DISKS", "/Users/u/vm/disks"),
    ("RUN", "/Users/u/vm/run"),
];

#[derive(Clone, Debug, PartialEq, Eq)]
enum Expression {
    Word(String),
    Text(String),
    List(Vec<Expression>),
}
use Expression::{List, Text, Word};

fn parse(text: &str) -> Vec<Expression> {
    let mut stack = vec![Vec::new()];
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        match first {
            ';' => rest = rest.split_once('\n').map_or("", |(_, after)| after),
            '(' => {
                stack.push(Vec::new());
                rest = &rest[1..];
            }
            ')' => {
                let list = stack.pop().expect("there is always one");
                stack.last_mut().expect("a ) without its (").push(List(list));
                rest = &rest[1..];
            }
            '"' => {
                let (inside, after) = rest[1..].split_once('"').expect("a text ends");
                stack.last_mut().expect("there is always one").push(Text(inside.to_owned()));
                rest = after;
            }
            c if c.is_whitespace() => rest = &rest[c.len_utf8()..],
            _ => {
                let end = rest.find(|c: char| c.is_whitespace() || "();\"".contains(c)).unwrap_or(rest.len());
                stack.last_mut().expect("there is always one").push(Word(rest[..end].to_owned()));
                rest = &rest[end..];
            }
        }
    }
    assert_eq!(stack.len(), 1, "a ( without its )");
    stack.pop().expect("one is left")
}

fn path(expression: &Expression) -> String {
    match expression {
        Text(text) => text.clone(),
        List(list) => match &list[..] {
            [Word(param), Text(name)] if param == "param" => {
                let found = PARAMETERS.iter().find(|(known, _)| known == name);
                found.unwrap_or_else(|| panic!("parameter {name} is not explained")).1.to_owned()
            }
            _ => panic!("{list:?} is no path"),
        },
        Word(word) => panic!("{word} is no path"),
    }
}

fn matches(filter: &Expression, at: &Path) -> bool {
    let List(list) = filter else { panic!("{filter:?} is no filter") };
    match &list[..] {
        [Word(kind), place] if kind == "literal" => at == Path::new(&path(place)),
        [Word(kind), place] if kind == "subpath" => at.starts_with(path(place)),
        _ => false,
    }
}

fn is_allowed(operation: &str, at: &str) -> bool {
    let mut allowed = None;
    for rule in parse(PROFILE) {
        let List(rule) = rule else { panic!("{rule:?} is no rule") };
        match &rule[..] {
            [Word(version), Word(one)] if version == "version" => assert_eq!(one, "1"),
            [Word(verdict), Word(what)] if verdict == "deny" && what == "default" => allowed = Some(false),
            [Word(verdict), Word(what), filters @ ..] if verdict == "allow" => {
                let applies = filters.is_empty() || filters.iter().any(|f| matches(f, Path::new(at)));
                if what == operation && applies {
                    allowed = Some(true);
                }
            }
            _ => panic!("{rule:?} is not understood"),
        }
    }
    allowed.expect("the profile says what holds for all else")
}

#[test]
fn a_machines_files_are_within_reach() {
    for file in [
        "/opt/outboard/bin/outboard",
        "/Users/u/vm/vmlinuz",
        "/Users/u/vm/initrd.img",
        "/Users/u/vm/disks/debian.qcow2",
        "/Users/u/vm/run/outboard/vm1.lock",
        "/private/etc/resolv.conf",
    ] {
        assert!(is_allowed("file-read*", file), "{file}");
    }
    for file in ["/Users/u/vm/disks/debian.qcow2", "/Users/u/vm/run/console.log", "/Users/u/vm/run/vsock"] {
        assert!(is_allowed("file-write*", file), "{file}");
    }
    assert!(is_allowed("network-bind", "/Users/u/vm/run/vsock"));
    assert!(is_allowed("network-outbound", ""));
}

#[test]
fn everything_else_is_not() {
    for file in
        ["/Users/u/.ssh/id_ed25519", "/private/etc/master.passwd", "/Users/u/vm/disks2/x", "/Users/u/vm", "/"]
    {
        assert!(!is_allowed("file-read*", file), "{file}");
        assert!(!is_allowed("file-write*", file), "{file}");
    }
    for file in
        ["/Users/u/vm/vmlinuz", "/opt/outboard/bin/outboard", "/private/etc/resolv.conf", "/usr/lib/dyld"]
    {
        assert!(!is_allowed("file-write*", file), "{file}");
    }
    assert!(!is_allowed("process-exec", "/bin/sh"));
    assert!(!is_allowed("network-bind", "/private/tmp/socket"));
    for operation in ["process-fork", "mach-lookup", "iokit-open", "process-info*", "system-socket"] {
        assert!(!is_allowed(operation, "/bin/sh"), "{operation}");
    }
}
