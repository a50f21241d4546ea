//! One recording in every form of text that is read: the figures are always the same, and those that were counted while it was made.

mod common;

use std::fmt::Write as _;

use common::{figures, fit_bytes, gzip, zstd};
use proptest::prelude::*;

const PAGE: u64 = 4096;
/// Entries of a list that the kernel's mapping event keeps.
const KEPT: usize = 128;
const DEVICE: &str = "0000:01:00.0";

/// What a driver asks for.
#[derive(Clone, Debug)]
enum Wish {
    /// So many bytes.
    Page(u64),
    /// So many bytes of coherent memory.
    Coherent(u64),
    /// Entries of so many pages each.
    List(Vec<u64>),
    /// A list of so many single pages: more than one event keeps.
    Long(usize),
    /// Unmap one of the live calls, by a number of any size.
    Unmap(usize),
}

fn wish() -> impl Strategy<Value = Wish> {
    prop_oneof![
        3 => (1..=4 * PAGE).prop_map(Wish::Page),
        2 => (1..=4 * PAGE).prop_map(Wish::Coherent),
        2 => prop::collection::vec(1..=4_u64, 1..6).prop_map(Wish::List),
        1 => (KEPT + 1..300).prop_map(Wish::Long),
        4 => (0..1000_usize).prop_map(Wish::Unmap),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Page,
    Coherent,
    List,
}

/// A call of the DMA API: what it maps, by address and length.
#[derive(Clone, Debug)]
struct Call {
    kind: Kind,
    pieces: Vec<(u64, u64)>,
}

/// Calls in order, the second element true for unmapping; and the counts that every text must give.
#[derive(Debug)]
struct Recording {
    calls: Vec<(Call, bool)>,
    peak_live: u64,
    peak_pieces: u64,
}

/// Every piece is in 16 KiB of its own, so that without windows each is an entry.
fn recording(wishes: &[Wish]) -> Recording {
    let mut next = 0x1_0000_0000;
    let mut piece = |len: u64| {
        let start = next;
        next += len.next_multiple_of(4 * PAGE) + 4 * PAGE;
        (start, len)
    };
    let mut recording = Recording { calls: Vec::new(), peak_live: 0, peak_pieces: 0 };
    let mut live: Vec<Call> = Vec::new();
    let all_unmapped = std::iter::repeat_n(&Wish::Unmap(0), wishes.len());
    for wish in wishes.iter().chain(all_unmapped) {
        let (kind, pieces) = match wish {
            Wish::Page(len) => (Kind::Page, vec![piece(*len)]),
            Wish::Coherent(len) => (Kind::Coherent, vec![piece(*len)]),
            Wish::List(pages) => (Kind::List, pages.iter().map(|pages| piece(pages * PAGE)).collect()),
            Wish::Long(count) => (Kind::List, (0..*count).map(|_| piece(PAGE)).collect()),
            Wish::Unmap(_) if live.is_empty() => continue,
            Wish::Unmap(which) => {
                let call = live.swap_remove(which % live.len());
                recording.calls.push((call, true));
                continue;
            }
        };
        let call = Call { kind, pieces };
        live.push(call.clone());
        recording.calls.push((call, false));
        let pieces = || live.iter().flat_map(|call| call.pieces.iter().map(|(_, len)| (call.kind, *len)));
        let bytes = pieces().map(|(kind, len)| match kind {
            Kind::Coherent => len.next_multiple_of(PAGE),
            _ => len,
        });
        recording.peak_live = recording.peak_live.max(bytes.sum());
        recording.peak_pieces = recording.peak_pieces.max(pieces().count() as u64);
    }
    recording
}

/// Who prints the text.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// Lines `m` and `u`.
    Ours,
    /// The kernel's trace_pipe, Linux 6.12: other names, and no counts with lists.
    OldKernel,
    /// The kernel's trace.
    Kernel,
    /// `outboard record`.
    Record,
    /// trace-cmd report.
    TraceCmd,
    /// The same where it cannot parse the formats.
    TraceCmdRaw,
    /// perf script.
    Perf,
}

const FORMS: [Form; 7] =
    [Form::Ours, Form::OldKernel, Form::Kernel, Form::Record, Form::TraceCmd, Form::TraceCmdRaw, Form::Perf];

fn print(recording: &Recording, form: Form) -> String {
    let mut text = match form {
        Form::Ours | Form::OldKernel | Form::Perf => String::new(),
        Form::Kernel => "# tracer: nop\n#\n# entries-in-buffer/entries-written: 7/7   #P:2\n".to_owned(),
        Form::Record => "# outboard record, Linux 6.18\n# command: ./game lost 3 events\n".to_owned(),
        Form::TraceCmd | Form::TraceCmdRaw => "version = 7\nCPU 1 is empty\ncpus=2\n".to_owned(),
    };
    for (index, (call, unmaps)) in recording.calls.iter().enumerate() {
        let micros = 5_000_000 + index as u64 * 1000;
        if matches!(form, Form::Ours) {
            text += &our_line(call, *unmaps, micros);
            continue;
        }
        let time = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
        let (event, fields) = event(call, *unmaps, form);
        let line = match form {
            Form::Perf => format!("Web Content   812 [001]   {time}: dma:{event}: {DEVICE} {fields}"),
            Form::TraceCmd => format!(
                "     Web Content-812   [001]   {time}: {event:<20} {DEVICE} {fields}",
                event = event + ":"
            ),
            Form::TraceCmdRaw => {
                format!(
                    "    Web Content-812   [001]   {time}: {event}:     [FAILED TO PARSE] device={DEVICE} {fields}"
                )
            }
            Form::Record => format!("<...>-812 [001] {time}: {event}: {DEVICE} {fields}"),
            _ => format!("     Web Content-812     [001] d..1.   {time}: {event}: {DEVICE} {fields}"),
        };
        text += &line;
        text += "\n";
    }
    if matches!(form, Form::Record) {
        text += "# lost 0 events\n";
    }
    text
}

fn our_line(call: &Call, unmaps: bool, micros: u64) -> String {
    // The address of the first piece is the call's, no other has it.
    let id = call.pieces[0].0;
    if unmaps {
        return format!("u {micros} {id}\n");
    }
    let whole = |len: u64| if call.kind == Kind::Coherent { len.next_multiple_of(PAGE) } else { len };
    let list: Vec<String> =
        call.pieces.iter().map(|(start, len)| format!("{start:x}:{:x}", whole(*len))).collect();
    format!("m {micros} {id} {}\n", list.join(","))
}

/// Name and fields of a call's event.
fn event(call: &Call, unmaps: bool, form: Form) -> (String, String) {
    let (is_raw, is_old) = (matches!(form, Form::TraceCmdRaw), matches!(form, Form::OldKernel));
    let (start, len) = call.pieces[0];
    let hex = |number: u64| if is_raw { number.to_string() } else { format!("{number:x}") };
    let one = if is_old { "page" } else { "phys" };
    let (dir, attrs) = if is_raw { ("", "dir=1 attrs=0x0") } else { ("dir=TO_DEVICE ", "attrs=") };
    let starts: Vec<u64> = call.pieces.iter().map(|(start, _)| *start).collect();
    match (call.kind, unmaps) {
        (Kind::Page, false) => (
            format!("dma_map_{one}"),
            format!("{dir}dma_addr={0} size={len} phys_addr={0} {attrs}", hex(start)),
        ),
        (Kind::Page, true) => {
            let name = if is_raw { "addr" } else { "dma_addr" };
            (format!("dma_unmap_{one}"), format!("{dir}{name}={} size={len} {attrs}", hex(start)))
        }
        (Kind::Coherent, _) => {
            let name = if unmaps { "dma_free" } else { "dma_alloc" };
            let flags = if unmaps { "" } else { "flags=GFP_KERNEL|__GFP_ZERO " };
            (
                name.to_owned(),
                format!(
                    "{dir}dma_addr={} size={len} virt_addr=0xffff888000000000 {flags}{attrs}",
                    hex(start)
                ),
            )
        }
        (Kind::List, true) => {
            let name = if is_raw { "addrs" } else { "phys_addrs" };
            ("dma_unmap_sg".to_owned(), format!("{dir}{name}={} {attrs}", array(&starts, 8, is_raw)))
        }
        (Kind::List, false) => {
            ("dma_map_sg".to_owned(), format!("{dir}{} {attrs}", list(call, is_raw, is_old)))
        }
    }
}

/// The middle of `dma_map_sg`, which keeps the first entries.
fn list(call: &Call, is_raw: bool, is_old: bool) -> String {
    let full = call.pieces.len();
    // Linux 6.12 keeps them all, up to a page.
    let kept = if is_old { full } else { full.min(KEPT) };
    let starts: Vec<u64> = call.pieces.iter().take(kept).map(|(start, _)| *start).collect();
    let sizes: Vec<u64> = call.pieces.iter().take(kept).map(|(_, len)| *len).collect();
    let (starts, sizes) = (array(&starts, 8, is_raw), array(&sizes, 4, is_raw));
    if is_raw {
        let truncated = u32::from(kept < full);
        return format!(
            "full_nents={full} full_ents={full} truncated={truncated} phys_addrs={starts} dma_addrs={starts} lengths={sizes}"
        );
    }
    let mut text = String::new();
    if !is_old {
        let cut = if kept < full { " [TRUNCATED]" } else { "" };
        let _ = write!(text, "nents={kept}/{full} ents={kept}/{full}{cut} ");
    }
    text + &format!("dma_addrs={starts} sizes={sizes} phys_addrs={starts}")
}

fn array(numbers: &[u64], width: usize, is_raw: bool) -> String {
    if is_raw {
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes().into_iter().take(width));
        let bytes: Vec<String> = bytes.map(|byte| format!("{byte:02x}")).collect();
        return format!("ARRAY[{}]", bytes.join(", "));
    }
    let numbers: Vec<String> = numbers.iter().map(|number| format!("{number:#x}")).collect();
    format!("{{{}}}", numbers.join(","))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_text_gives_the_same_figures(wishes in prop::collection::vec(wish(), 1..40), dressed in 0..4_u8) {
        let recording = recording(&wishes);
        prop_assume!(!recording.calls.is_empty());
        let mut expected = None;
        for form in FORMS {
            let text = print(&recording, form);
            let bytes = match dressed {
                0 => text.clone().into_bytes(),
                1 => text.replace('\n', "\r\n").into_bytes(),
                2 => gzip(text.as_bytes()),
                _ => zstd(text.as_bytes()),
            };
            let json = fit_bytes(&bytes, &["--json"]).map_err(|error| TestCaseError::fail(format!("{form:?}: {error}\n{text}")))?;
            let ([entries, _, live], json) = figures(&json, "none");
            prop_assert_eq!(live, recording.peak_live, "{:?}\n{}", form, text);
            prop_assert_eq!(json["lost_events"].as_u64(), Some(0));
            prop_assert_eq!(json["caveats"].as_array().map(Vec::len), Some(0), "{:?}: {}", form, json);
            prop_assert!(entries >= recording.peak_pieces);
            let first = expected.get_or_insert_with(|| json["policies"].clone());
            prop_assert_eq!(&json["policies"], &*first, "{:?}\n{}", form, text);
        }
    }

    /// Damage is read or refused, and ends nothing.
    #[test]
    fn damaged_texts_end_nothing(
        wishes in prop::collection::vec(wish(), 1..6),
        form in prop::sample::select(&FORMS[..]),
        damage in prop::collection::vec((any::<usize>(), any::<u8>()), 1..6),
        cut in any::<usize>(),
        packed in any::<bool>(),
    ) {
        let mut bytes = print(&recording(&wishes), form).into_bytes();
        if packed {
            bytes = zstd(&bytes);
        }
        let length = bytes.len().max(1);
        for (at, byte) in damage {
            if let Some(place) = bytes.get_mut(at % length) {
                *place = byte;
            }
        }
        bytes.truncate(cut % (2 * length));
        let _ = fit_bytes(&bytes, &["--json"]);
    }
}
