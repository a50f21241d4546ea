//! `dma:*` events from records to text, as the kernel prints them (`include/trace/events/dma.h`), without its limit on a line.

use crate::format::{Field, Format};
use crate::ring::number;
use std::fmt::Write as _;

/// Events that say what is mapped, in the spellings of Linux 6.12 to 7.x. Synchronisation is not among them: it maps nothing.
pub(crate) const WANTED: [&str; 14] = [
    "dma_map_page",
    "dma_map_phys",
    "dma_unmap_page",
    "dma_unmap_phys",
    "dma_map_resource",
    "dma_unmap_resource",
    "dma_map_sg",
    "dma_unmap_sg",
    "dma_alloc",
    "dma_free",
    "dma_alloc_pages",
    "dma_free_pages",
    "dma_alloc_sgt",
    "dma_free_sgt",
];

/// `enum dma_data_direction`.
const DIRECTIONS: [&str; 4] = ["BIDIRECTIONAL", "TO_DEVICE", "FROM_DEVICE", "NONE"];
/// `DMA_ATTR_*`, by bit from 1; those above are printed as a number.
const ATTRIBUTES: [(u32, &str); 12] = [
    (1, "WEAK_ORDERING"),
    (2, "WRITE_COMBINE"),
    (4, "NO_KERNEL_MAPPING"),
    (5, "SKIP_CPU_SYNC"),
    (6, "FORCE_CONTIGUOUS"),
    (7, "ALLOC_SINGLE_PAGES"),
    (8, "NO_WARN"),
    (9, "PRIVILEGED"),
    (10, "MMIO"),
    (11, "CACHELINES_OVERLAP"),
    (12, "REQUIRE_COHERENT"),
    (13, "CC_SHARED"),
];
/// Entries of a scatterlist that the kernel's event keeps, where it cuts them.
const KEPT: u64 = 128;

/// How a value is printed.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Hex,
    Decimal,
    /// Only whether there is one: kernel addresses stay in the kernel.
    Pointer,
    /// Of elements with so many bytes.
    Array(usize),
}

/// `label=` and the record's field for it.
type Part = (&'static str, &'static str, Kind);

const HEX: Kind = Kind::Hex;
const SIZE: Part = ("size", "size", Kind::Decimal);
const LIST: Kind = Kind::Array(8);

/// What each event's line has between direction and attributes.
fn parts(event: &str) -> &'static [Part] {
    match event {
        "dma_map_page" | "dma_map_phys" | "dma_map_resource" => {
            &[("dma_addr", "dma_addr", HEX), SIZE, ("phys_addr", "phys_addr", HEX)]
        }
        "dma_unmap_page" | "dma_unmap_phys" | "dma_unmap_resource" => &[("dma_addr", "addr", HEX), SIZE],
        "dma_map_sg" => &[
            ("dma_addrs", "dma_addrs", LIST),
            ("sizes", "lengths", Kind::Array(4)),
            ("phys_addrs", "phys_addrs", LIST),
        ],
        "dma_unmap_sg" => &[("phys_addrs", "addrs", LIST)],
        "dma_alloc_sgt" | "dma_free_sgt" => {
            &[("dma_addr", "dma_addr", HEX), SIZE, ("phys_addrs", "phys_addrs", LIST)]
        }
        _ => &[("dma_addr", "dma_addr", HEX), SIZE, ("virt_addr", "virt_addr", Kind::Pointer)],
    }
}

/// Prints one kind of event.
#[derive(Debug)]
pub(crate) struct Printer {
    name: &'static str,
    device: Field,
    dir: Option<Field>,
    attrs: Option<Field>,
    pid: Option<Field>,
    full: Option<(Field, Field)>,
    parts: Vec<(&'static str, Field, Kind)>,
}

impl Printer {
    /// For event `name` (one of [`WANTED`]) as `format` describes it; an error names the field that is missing.
    pub(crate) fn new(name: &'static str, format: &Format) -> Result<Self, &'static str> {
        let need = |field: &'static str| format.field(field).ok_or(field);
        let known = parts(name).iter();
        let parts = known.map(|(label, field, kind)| Ok((*label, need(field)?, *kind)));
        Ok(Self {
            name,
            device: need("device")?,
            dir: format.field("dir"),
            attrs: format.field("attrs"),
            pid: format.field("common_pid"),
            full: format.field("full_nents").zip(format.field("full_ents")),
            parts: parts.collect::<Result<_, &'static str>>()?,
        })
    }

    /// The line of `record`, taken at `time` (ns) on `cpu`. `None` if the record is too short for its fields.
    pub(crate) fn line(&self, cpu: usize, time: u64, record: &[u8]) -> Option<String> {
        let pid = self.pid.and_then(|f| value(record, f)).unwrap_or(0);
        let (seconds, micros) = (time / 1_000_000_000, time / 1000 % 1_000_000);
        let device = self.device(record)?;
        let mut line = format!("<...>-{pid} [{cpu:03}] {seconds}.{micros:06}: {}: {device}", self.name);
        if let Some(dir) = self.dir.and_then(|f| value(record, f)) {
            // Linux 6.12 does not fill it in for allocations.
            let _ = write!(line, " dir={}", DIRECTIONS.get(dir as usize).unwrap_or(&"NONE"));
        }
        if let Some((nents, ents)) = self.full {
            let (nents, ents) = (value(record, nents)?, value(record, ents)?);
            let (some, few) = (nents.min(KEPT), ents.min(KEPT));
            let cut = if nents > KEPT || ents > KEPT { " [TRUNCATED]" } else { "" };
            let _ = write!(line, " nents={some}/{nents} ents={few}/{ents}{cut}");
        }
        for (label, field, kind) in &self.parts {
            let _ = write!(line, " {label}=");
            match *kind {
                Kind::Hex => drop(write!(line, "{:x}", value(record, *field)?)),
                Kind::Decimal => drop(write!(line, "{}", value(record, *field)?)),
                Kind::Pointer if value(record, *field)? == 0 => line.push_str("0000000000000000"),
                Kind::Pointer => line.push_str("(ptrval)"),
                Kind::Array(element) => print_array(&mut line, record, *field, element)?,
            }
        }
        if let Some(attrs) = self.attrs.and_then(|f| value(record, f)) {
            line.push_str(" attrs=");
            attributes(&mut line, attrs);
        }
        line.push('\n');
        Some(line)
    }

    /// A device's name; never one that would break the line.
    fn device(&self, record: &[u8]) -> Option<String> {
        let (offset, length) = located(record, self.device)?;
        let text = record.get(offset..(offset + length).min(record.len()))?;
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(text);
        Some(text.chars().map(|c| if c.is_whitespace() || c.is_control() { '_' } else { c }).collect())
    }
}

fn value(record: &[u8], field: Field) -> Option<u64> {
    number(record, field.offset, field.size)
}

/// Offset and length of data that a `__data_loc` field points to.
fn located(record: &[u8], field: Field) -> Option<(usize, usize)> {
    let at = value(record, field).filter(|_| field.located)?;
    Some(((at & 0xffff) as usize, (at >> 16) as usize))
}

fn print_array(line: &mut String, record: &[u8], field: Field, element: usize) -> Option<()> {
    let (offset, length) = located(record, field)?;
    let data = record.get(offset..offset.checked_add(length)?)?;
    if !length.is_multiple_of(element) {
        return None;
    }
    line.push('{');
    for (index, bytes) in data.chunks_exact(element).enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let _ = write!(line, "{comma}{:#x}", number(bytes, 0, element)?);
    }
    line.push('}');
    Some(())
}

fn attributes(line: &mut String, bits: u64) {
    let mut rest = bits;
    let mut bar = "";
    for (bit, name) in ATTRIBUTES {
        if rest & (1 << bit) != 0 {
            let _ = write!(line, "{bar}{name}");
            bar = "|";
            rest &= !(1 << bit);
        }
    }
    if rest != 0 {
        let _ = write!(line, "{bar}{rest:#x}");
    }
}

#[cfg(test)]
#[path = "event_tests.rs"]
mod tests;
