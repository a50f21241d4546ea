//! What the module `outboard_dma` shows beside its statistics: its trace events, and its list of windows.

use super::dma::Stats;
use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use std::fs;
use std::path::Path;

const TRACEFS: &str = "/sys/kernel/tracing";
/// A tracing instance of our own, with room for all events of a short run on each CPU.
const INSTANCE: &str = "/sys/kernel/tracing/instances/lab";
const BUFFER_KIB: u32 = 8192;

/// `odma_map`.
#[derive(Debug)]
pub struct Mapped {
    /// Address of the function.
    pub device: String,
    /// Guest memory.
    pub phys: u64,
    /// Bus address.
    pub bus: u64,
    /// Bytes.
    pub len: u64,
    /// Whether a window covered it.
    pub hit: bool,
}

/// The module's events, in no particular order between CPUs.
#[derive(Debug, Default)]
pub struct Events {
    /// `odma_map`.
    pub maps: Vec<Mapped>,
    /// `odma_unmap`: bus address and bytes.
    pub unmaps: Vec<(u64, u64)>,
    /// `odma_map_sg`: entries and segments.
    pub lists: Vec<(u64, u64)>,
    /// `odma_unmap_sg`: entries.
    pub list_unmaps: Vec<u64>,
    /// `odma_fail`: codes.
    pub failures: Vec<u64>,
    /// `odma_ring`: entries.
    pub rings: Vec<u64>,
}

/// Starts to trace.
pub fn start() -> Result<()> {
    if !Path::new(TRACEFS).join("instances").exists() {
        let mounted = mount(Some("tracefs"), TRACEFS, Some("tracefs"), MsFlags::empty(), None::<&str>);
        mounted.context("cannot mount tracefs")?;
    }
    fs::create_dir(INSTANCE).context("cannot make a tracing instance")?;
    write("buffer_size_kb", &BUFFER_KIB.to_string())?;
    write("events/outboard_dma/enable", "1")
}

/// Ends it: what there was.
pub fn stop() -> Result<Events> {
    write("tracing_on", "0")?;
    write("events/outboard_dma/enable", "0")?;
    let text = fs::read_to_string(Path::new(INSTANCE).join("trace")).context("cannot read the trace")?;
    let events = parse(&text)?;
    fs::remove_dir(INSTANCE).context("cannot remove the tracing instance")?;
    Ok(events)
}

fn write(file: &str, text: &str) -> Result<()> {
    let path = Path::new(INSTANCE).join(file);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The events of a `trace` file, none of which may have been lost.
fn parse(text: &str) -> Result<Events> {
    let mut events = Events::default();
    for line in text.lines() {
        if let Some((_, counts)) = line.split_once("entries-in-buffer/entries-written: ") {
            let (kept, written) = counts.split_once('/').context("two numbers")?;
            let written = written.split_whitespace().next().unwrap_or_default();
            ensure!(kept == written, "events were lost: {line}");
        }
        if line.starts_with('#') {
            continue;
        }
        let (_, event) = line.split_once(": odma_").with_context(|| format!("not an event: {line}"))?;
        one(event, &mut events).with_context(|| format!("not an event of this module: {line}"))?;
    }
    Ok(events)
}

/// `NAME: DEVICE KEY=VALUE KEY=VALUE …`.
fn one(event: &str, events: &mut Events) -> Result<()> {
    let (name, rest) = event.split_once(": ").context("no name")?;
    let field = |key: &str| {
        let found = rest.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        found.with_context(|| format!("no {key}"))
    };
    let decimal = |key: &str| Ok::<u64, anyhow::Error>(field(key)?.parse()?);
    let hex = |key: &str| Ok::<u64, anyhow::Error>(u64::from_str_radix(field(key)?, 16)?);
    match name {
        "map" => events.maps.push(Mapped {
            device: rest.split(' ').next().unwrap_or_default().to_owned(),
            phys: hex("phys_addr")?,
            bus: hex("dma_addr")?,
            len: decimal("size")?,
            hit: rest.ends_with(" hit"),
        }),
        "unmap" => events.unmaps.push((hex("dma_addr")?, decimal("size")?)),
        "map_sg" => events.lists.push((decimal("nents")?, decimal("segments")?)),
        "unmap_sg" => events.list_unmaps.push(decimal("nents")?),
        "fail" => events.failures.push(decimal("failure")?),
        "ring" => events.rings.push(decimal("entries")?),
        _ => anyhow::bail!("unknown"),
    }
    Ok(())
}

/// A line of `windows`.
struct Window {
    len: u64,
    bus: u64,
    mappings: u64,
    live: u64,
}

fn windows(folder: &Path) -> Result<Vec<Window>> {
    let file = folder.join("windows");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let line = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, len, bus, mappings, live] = words[..] else { return None };
        let bus = u64::from_str_radix(bus, 16).ok()?;
        Some(Window {
            len: len.parse().ok()?,
            bus,
            mappings: mappings.parse().ok()?,
            live: live.parse().ok()?,
        })
    };
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|text| line(text).with_context(|| format!("not a window: {text}"))).collect()
}

/// The list of windows says what the statistics say, while nothing is mapped or unmapped. Number and bytes of the mappings in them.
pub fn check_windows(folder: &Path) -> Result<(u64, u64)> {
    let (mut all, stats) = (windows(folder)?, Stats::read(folder)?);
    let used = || all.iter().filter(|window| window.mappings > 0);
    let sum = |values: &mut dyn Iterator<Item = u64>| values.sum::<u64>();
    let mappings = sum(&mut all.iter().map(|window| window.mappings));
    let live = sum(&mut all.iter().map(|window| window.live));
    for (key, value) in [
        ("mapped_windows", all.len() as u64),
        ("mapped_bytes", sum(&mut all.iter().map(|window| window.len))),
        ("used_windows", used().count() as u64),
        ("used_bytes", sum(&mut used().map(|window| window.len))),
        ("slack_bytes", sum(&mut used().map(|window| window.len.saturating_sub(window.live)))),
        ("live", mappings),
    ] {
        let said = stats.value(key)?;
        ensure!(said == i64::try_from(value)?, "{key}: the windows have {value}:\n{}", stats.text);
    }
    all.sort_by_key(|window| window.bus);
    let apart = all.windows(2).all(|pair| pair[0].bus + pair[0].len <= pair[1].bus);
    ensure!(apart, "windows overlap on the bus");
    Ok((mappings, live))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_lost_ones_noticed() {
        let text = "# tracer: nop\n#\n# entries-in-buffer/entries-written: 3/3   #P:4\n#\n\
            \u{20}   stress/0-81   [000] d..1.   12.345678: odma_ring: 0000:00:02.0 entries=17\n\
            \u{20}   stress/0-81   [000] .....   12.345679: odma_map: 0000:01:00.0 phys_addr=41000000 dma_addr=8000c000 size=4096 miss\n\
            \u{20}   <idle>-0      [001] d.h1.   12.345680: odma_unmap: 0000:01:00.0 dma_addr=8000c000 size=4096\n";
        let events = parse(text).unwrap();
        assert_eq!((events.rings[0], events.unmaps[0]), (17, (0x8000_c000, 4096)));
        let map = &events.maps[0];
        assert_eq!(
            (map.device.as_str(), map.phys, map.len, map.hit),
            ("0000:01:00.0", 0x4100_0000, 4096, false)
        );
        assert!(parse(&text.replace("3/3", "3/4")).is_err());
        assert!(parse(&text.replace("odma_ring", "odma_bell")).is_err());
    }
}
