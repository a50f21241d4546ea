//! One line of the kernel's `dma:*` trace events, as `trace`, `trace_pipe`, `outboard record`, `trace-cmd report` and `perf script`
//! print it: `TASK [CPU] FLAGS TIME: EVENT: FIELDS`.
//!
//! The fields are those of `include/trace/events/dma.h`, 6.12 to 7.x, in one of two forms: printed by the event's own format, or raw,
//! which is what a program prints that cannot parse that format (`[FAILED TO PARSE]`). In the raw form the fields have the names
//! of the record, and numbers without `0x` are decimal.

use crate::fields::Fields;
use crate::read::checked;
use crate::trace::Segment;

pub(crate) const PAGE: u64 = 4096;
/// `DMA_MAPPING_ERROR`: the bus address of what could not be mapped.
const FAILED: u64 = u64::MAX;
/// `DMA_ATTR_MMIO`, where attributes are a number.
const MMIO: u64 = 1 << 10;

/// What one event did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Mapped one piece.
    Map { segment: Segment, bus: u64, size: u64 },
    /// Allocated one piece of coherent memory: the kernel tells only the bus address.
    Alloc { segment: Segment },
    /// Unmapped or freed one piece.
    Unmap { bus: u64, size: u64 },
    /// Mapped or allocated a list.
    MapList(List),
    /// Unmapped or freed a list: the addresses of its entries.
    UnmapList(Vec<u64>),
}

/// A scatterlist as its mapping shows it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct List {
    /// The entries that are known.
    pub(crate) segments: Vec<Segment>,
    /// Entries of the whole list.
    pub(crate) full: u64,
    /// Lengths are shares of a sum, not each entry's own.
    pub(crate) estimated: bool,
}

/// An event of a device, at a time in microseconds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Happened<'l> {
    pub(crate) at: u64,
    pub(crate) device: &'l str,
    /// None for what maps nothing: a failure, or device memory.
    pub(crate) event: Option<Event>,
}

/// A line of text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'l> {
    /// A mapping or unmapping.
    Dma(Happened<'l>),
    /// Another event.
    Other,
    /// No event.
    Text,
}

/// The kernel's names of what maps and unmaps.
const NAMES: [&str; 14] = [
    "map_page",
    "map_phys",
    "unmap_page",
    "unmap_phys",
    "map_resource",
    "unmap_resource",
    "map_sg",
    "unmap_sg",
    "alloc",
    "free",
    "alloc_pages",
    "free_pages",
    "alloc_sgt",
    "free_sgt",
];

/// Takes one line apart.
///
/// # Errors
/// What is wrong with a line that has a DMA event, which must not be passed over.
pub(crate) fn parse(line: &str) -> Result<Line<'_>, String> {
    let Some((at, event, rest)) = head(line) else {
        return if mentions_an_event(line) { Err(unknown_form(line)) } else { Ok(Line::Text) };
    };
    let Some(name) = dma_name(event) else {
        let is_coloured = event.contains('\x1b') && event.contains("dma_");
        return if is_coloured { Err(unknown_form(line)) } else { Ok(Line::Other) };
    };
    if !NAMES.contains(&name) {
        let maps = ["map", "unmap", "alloc", "free"].iter().any(|start| name.starts_with(start));
        return match maps && !name.ends_with("_err") {
            true => Err(format!("the event dma_{name} is not known to this version of outboard")),
            false => Ok(Line::Other),
        };
    }
    let fields = Fields::parse(rest)?;
    let event = of_fields(name, &fields).map_err(|what| explain(name, what))?;
    Ok(Line::Dma(Happened { at, device: fields.device()?, event }))
}

/// True for an event's line that has its end: the field of attributes, empty as it mostly is, or a list. Of any other the last number may be
/// a part of one.
pub(crate) fn is_whole(line: &str) -> bool {
    let line = line.trim_end();
    head(line).is_some() && (line.ends_with("attrs=") || line.ends_with('}'))
}

/// Adds what to do where the program that printed the text is at fault; lists are what it mostly fails to print.
fn explain(name: &str, what: String) -> String {
    if name.contains("sg") && what.contains("array") {
        return format!(
            "{what}: the program that printed this could not parse the kernel's dma_{name}, and its scatterlist is not in the text; \
             record again with `outboard record`, which reads the kernel's buffers itself"
        );
    }
    if what.starts_with("the event has no") {
        return format!(
            "{what}: the line was cut, or the program that printed it could not parse the kernel's dma_{name}; `outboard record` reads the \
             kernel's buffers itself"
        );
    }
    what
}

/// Time, name and fields of an event's line.
fn head(line: &str) -> Option<(u64, &str, &str)> {
    let mut rest = line;
    loop {
        let (word, after) = next_word(rest)?;
        rest = after;
        let Some(at) = word.strip_suffix(':').and_then(microseconds) else { continue };
        let (mut event, mut fields) = next_word(after)?;
        // The time since the event before (trace-cmd), or the event's period (perf).
        if event.starts_with("(+") || event.bytes().all(|byte| byte.is_ascii_digit()) {
            (event, fields) = next_word(fields)?;
        }
        if let Some(event) = event.strip_suffix(':') {
            return Some((at, event, fields));
        }
    }
}

fn next_word(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_ascii_start();
    let end = text.find(|c: char| c.is_ascii_whitespace()).unwrap_or(text.len());
    (end != 0).then(|| text.split_at(end))
}

/// `map_page` of `dma_map_page` or, as perf has it, `dma:dma_map_page`.
fn dma_name(event: &str) -> Option<&str> {
    event.strip_prefix("dma:").unwrap_or(event).strip_prefix("dma_")
}

/// True for a line with the name of one of the events where a name of an event stands in some program's output.
fn mentions_an_event(line: &str) -> bool {
    line.contains("dma_") && line.split_ascii_whitespace().any(is_event_word)
}

fn is_event_word(word: &str) -> bool {
    // Colours: `grep --color`, a terminal's log.
    let plain = word.split_once('\x1b').and_then(|(_, rest)| rest.split_once("dma_").map(|(_, name)| name));
    if let Some(name) = plain {
        return NAMES.iter().any(|known| name.starts_with(known));
    }
    let (event, is_group) = match word.split_once("dma:") {
        Some(("", event)) => (event, true),
        _ => (word, false),
    };
    let Some(name) = event.strip_prefix("dma_") else { return false };
    let end = name.find([':', '(']).map(|end| (&name[..end], &name[end..=end]));
    matches!(end, Some((name, mark)) if NAMES.contains(&name) && (mark == ":" || is_group))
}

fn unknown_form(line: &str) -> String {
    let why = if line.contains('\x1b') {
        "has the control codes of a terminal (colours); write the text to a file directly"
    } else {
        "is not in the form TASK [CPU] SECONDS.FRACTION: EVENT: FIELDS, as trace_pipe, `trace-cmd report`, `perf script` and `outboard \
         record` write it (no latency format, no trace_clock that does not count seconds)"
    };
    format!("the DMA event {why}")
}

fn of_fields(name: &str, fields: &Fields) -> Result<Option<Event>, String> {
    let size = || fields.number("size", 10);
    let bus = || fields.number("dma_addr", 16);
    // Device memory cannot be mapped through the windows (the guest module refuses it); it shows as
    // `map_resource` or by its attribute.
    if matches!(name, "map_resource" | "unmap_resource") || is_mmio(fields) {
        return Ok(None);
    }
    match name {
        "map_page" | "map_phys" => {
            let (bus, size, start) = (bus()?, size()?, fields.number("phys_addr", 16)?);
            let mapped = (bus != FAILED).then_some(());
            mapped.map(|()| Ok(Event::Map { segment: checked(start, size)?, bus, size })).transpose()
        }
        "alloc" | "alloc_pages" => {
            let (bus, size) = (bus()?, whole_pages(size()?));
            // So a failed allocation shows: in newer kernels by its bus address, in 6.12 only by its pointer.
            if matches!(bus, 0 | FAILED) || fields.is_null("virt_addr") {
                return Ok(None);
            }
            Ok(Some(Event::Alloc { segment: checked(bus, size)? }))
        }
        "free" | "free_pages" => Ok(Some(Event::Unmap { bus: bus()?, size: whole_pages(size()?) })),
        "unmap_page" | "unmap_phys" => {
            let bus = if fields.is_raw() { fields.number("addr", 16) } else { bus() };
            Ok(Some(Event::Unmap { bus: bus?, size: size()? }))
        }
        "map_sg" => map_list(fields),
        // The size is the whole list's: entries share it.
        "alloc_sgt" => {
            let (starts, size) = (fields.array("phys_addrs", 8)?, size()?);
            let full = starts.len() as u64;
            shared_out(&starts, size, full).map(|list| list.map(Event::MapList))
        }
        "free_sgt" => unmap_list(fields.array("phys_addrs", 8)?),
        _ => unmap_list(fields.array(if fields.is_raw() { "addrs" } else { "phys_addrs" }, 8)?),
    }
}

fn is_mmio(fields: &Fields) -> bool {
    let mut attributes = fields.text("attrs").unwrap_or_default().split('|').map(str::trim);
    attributes.any(|one| {
        let number = one.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
        one == "MMIO" || number.is_some_and(|bits| bits & MMIO != 0)
    })
}

fn map_list(fields: &Fields) -> Result<Option<Event>, String> {
    let starts = fields.array("phys_addrs", 8)?;
    let sizes = fields.array(if fields.is_raw() { "lengths" } else { "sizes" }, 4)?;
    let (known, on_bus) = (starts.len() as u64, sizes.len() as u64);
    let (full, full_on_bus) = match fields.is_raw() {
        true => (fields.optional("full_nents", 10)?, fields.optional("full_ents", 10)?),
        false => (fields.part_of("nents", known)?, fields.part_of("ents", on_bus)?),
    };
    let (full, full_on_bus) = (full.unwrap_or(known), full_on_bus.unwrap_or(on_bus));
    if full < known || full_on_bus < on_bus {
        return Err("the list has more entries than it says".to_owned());
    }
    // An IOMMU merges entries on the bus; then sizes are those of its segments.
    let list = if known == on_bus && full == full_on_bus {
        let segments = starts.iter().zip(&sizes).map(|(start, size)| checked(*start, *size));
        let segments = segments.collect::<Result<Vec<_>, _>>()?;
        (!segments.is_empty()).then_some(List { segments, full, estimated: false })
    } else if full_on_bus == on_bus {
        let total = sizes.iter().fold(0, |sum: u64, size| sum.saturating_add(*size));
        shared_out(&starts, total, full)?
    } else {
        // Of how many entries these sizes are the sum is not said.
        shared_out(&starts, known.saturating_mul(PAGE), known)?.map(|list| List {
            full,
            estimated: true,
            ..list
        })
    };
    Ok(list.map(Event::MapList))
}

/// A list of `full` entries with `total` bytes in all, of which the first begin at `starts`.
fn shared_out(starts: &[u64], total: u64, full: u64) -> Result<Option<List>, String> {
    if starts.is_empty() {
        return Ok(None);
    }
    let size = whole_pages(total / full).max(PAGE);
    let segments = starts.iter().map(|start| checked(*start, size)).collect::<Result<Vec<_>, _>>()?;
    let estimated = full > 1 && total != full.saturating_mul(PAGE);
    Ok(Some(List { segments, full, estimated }))
}

fn unmap_list(starts: Vec<u64>) -> Result<Option<Event>, String> {
    starts.iter().try_for_each(|start| checked(*start, PAGE).map(drop))?;
    Ok((!starts.is_empty()).then_some(Event::UnmapList(starts)))
}

/// `size` in whole pages; what is beyond every address stays so, and is refused as such.
fn whole_pages(size: u64) -> u64 {
    size.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

/// `seconds.fraction` of a trace line as microseconds.
fn microseconds(word: &str) -> Option<u64> {
    let (seconds, fraction) = word.split_once('.')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(seconds) || !is_number(fraction) {
        return None;
    }
    let micros: u64 = format!("{fraction:0<6}").get(..6)?.parse().ok()?;
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(micros)
}
