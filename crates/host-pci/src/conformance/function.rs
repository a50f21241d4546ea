//! Identity, config space, BARs.

use super::{Case, Opener, Outcome, Step, Subject, case, ensure, ensure_eq, fail, opened, skip};
use crate::{Error, GRANULE, HostBarKind, HostFunction, IoPorts};
use outboard_bus::Width;

pub(super) const CASES: &[Case] = &[
    case("identity-is-what-config-space-says", identity),
    case("config-widths-agree", config_widths),
    case("config-out-of-range-is-refused", config_bounds),
    case("config-write-reads-back", config_write),
    case("bars-are-well-formed", bars),
    case("bar-access-out-of-range-is-refused", bar_bounds),
    case("bar-mapping-rules", mapping_rules),
    case("io-ports-are-reached-by-calls", io_ports),
    case("msix-pages-are-not-mapped", msix_pages),
    case("mapped-and-trapped-reads-agree", mapped_reads),
    case("rom-is-an-image-or-none", rom),
];

fn identity(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &subject.function;
    let id = f.identity();
    ensure_eq("vendor", u32::from(id.vendor), f.config_read(0, Width::B2).step("config read")?)?;
    ensure_eq("device", u32::from(id.device), f.config_read(2, Width::B2).step("config read")?)?;
    let class = f.config_read(8, Width::B4).step("config read")?;
    ensure_eq("class and revision", id.class << 8 | u32::from(id.revision), class)?;
    ensure(matches!(f.config_len(), 256 | 4096), || format!("config space of {} bytes", f.config_len()))
}

fn config_widths(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &subject.function;
    // The header but for its status half, which the device changes.
    for at in (0..0x40).step_by(4).filter(|at| *at != 4) {
        let dword = f.config_read(at, Width::B4).step("config read")?;
        for (width, step) in [(Width::B1, 1), (Width::B2, 2)] {
            for part in (0..4).step_by(step) {
                let read = f.config_read(at + part, width).step("config read")?;
                let should_be = width.truncate(u64::from(dword >> (8 * part))) as u32;
                ensure_eq(format!("{width:?} of config space at {:#x}", at + part), read, should_be)?;
            }
        }
    }
    Ok(())
}

fn config_bounds(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &subject.function;
    let len = f.config_len();
    let wrong = [
        (len, Width::B1),
        (len, Width::B4),
        (u16::MAX, Width::B1),
        (1, Width::B2),
        (2, Width::B4),
        (0, Width::B8),
    ];
    for (at, width) in wrong {
        let read = f.config_read(at, width);
        ensure(matches!(read, Err(Error::OutOfRange { .. })), || {
            format!("{width:?} read at {at:#x} answered {read:?}")
        })?;
        let write = f.config_write(at, width, 0);
        ensure(matches!(write, Err(Error::OutOfRange { .. })), || {
            format!("{width:?} write at {at:#x} answered {write:?}")
        })?;
    }
    for (width, back) in [(Width::B1, 1), (Width::B2, 2), (Width::B4, 4)] {
        f.config_read(len - back, width).step("read of the last bytes")?;
    }
    Ok(())
}

fn config_write(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &subject.function;
    // Interrupt line: for software alone, no effect on the device (PCIe 7.5.1.1.12).
    for value in [0x5a, 0xa5] {
        f.config_write(0x3c, Width::B1, value).step("config write")?;
        ensure_eq("interrupt line", f.config_read(0x3c, Width::B1).step("config read")?, value)?;
    }
    Ok(())
}

fn bars(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let bars = subject.function.bars();
    for (index, bar) in bars.iter().enumerate() {
        let Some(bar) = bar else { continue };
        ensure(bar.len.is_power_of_two(), || format!("BAR {index} has {:#x} bytes", bar.len))?;
        if matches!(bar.kind, HostBarKind::Memory64 { .. }) {
            ensure(bars.get(index + 1) == Some(&None), || {
                format!("BAR {index} of 64 bits has no upper half")
            })?;
        }
    }
    Ok(())
}

fn bar_bounds(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &subject.function;
    let absent = (0..6).find(|i| f.bars()[*i].is_none());
    let ends = (0..6).filter_map(|i| f.bars()[i].map(|b| (i, b.len)));
    let beyond = ends.flat_map(|(i, len)| [(i, len), (i, len - 1), (i, u64::MAX - 1), (i, u64::MAX)]);
    for (bar, offset) in beyond.chain(absent.map(|i| (i, 0))).chain([(6, 0), (usize::MAX, 0)]) {
        let read = f.bar_read(bar, offset, Width::B4);
        ensure(matches!(read, Err(Error::OutOfRange { .. })), || {
            format!("read of BAR {bar} at {offset:#x} answered {read:?}")
        })?;
        let write = f.bar_write(bar, offset, Width::B4, 0);
        ensure(matches!(write, Err(Error::OutOfRange { .. })), || {
            format!("write of BAR {bar} at {offset:#x} answered {write:?}")
        })?;
    }
    Ok(())
}

fn mapping_rules(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &subject.function;
    let refused =
        |bar: usize, offset: u64, len: u64, expected: fn(&Error) -> bool| match f.map_bar(bar, offset, len) {
            Ok(_) => fail(format!("BAR {bar} at {offset:#x}+{len:#x} was mapped")),
            Err(e) => ensure(expected(&e), || format!("BAR {bar} at {offset:#x}+{len:#x}: {e}")),
        };
    let unaligned: fn(&Error) -> bool = |e| matches!(e, Error::Unaligned { .. });
    let out_of_range: fn(&Error) -> bool = |e| matches!(e, Error::OutOfRange { .. });
    let not_mappable: fn(&Error) -> bool = |e| matches!(e, Error::NotMappable { .. });
    refused(6, 0, GRANULE, not_mappable)?;
    for (bar, info) in f.bars().iter().enumerate() {
        match info {
            Some(info) if info.kind != HostBarKind::Io && info.len >= GRANULE => {
                refused(bar, 0, 0x1000, unaligned)?;
                refused(bar, 0x1000, GRANULE, unaligned)?;
                refused(bar, 0, 0, out_of_range)?;
                refused(bar, info.len, GRANULE, out_of_range)?;
                refused(bar, 0, info.len + GRANULE, out_of_range)?;
                refused(bar, !(GRANULE - 1), GRANULE, out_of_range)?;
            }
            _ => refused(bar, 0, GRANULE, not_mappable)?,
        }
    }
    Ok(())
}

fn io_ports(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &*subject.function;
    let bars = f.bars();
    let io = bars.iter().enumerate().filter_map(|(index, bar)| Some((index, bar.as_ref()?)));
    let io: Vec<_> = io.filter(|(_, bar)| bar.kind == HostBarKind::Io).collect();
    ensure(io.is_empty() || matches!(f.io_ports(), IoPorts::Reachable | IoPorts::Unassigned), || {
        format!("there are BARs of I/O ports, which are {:?}", f.io_ports())
    })?;
    if io.is_empty() {
        return skip("the function has no I/O ports that can be reached");
    }
    let command = f.config_read(4, Width::B2).step("read of the command register")?;
    f.config_write(4, Width::B2, command | 1).step("I/O decode on")?;
    for (bar, info) in io {
        for width in [Width::B1, Width::B2, Width::B4] {
            f.bar_read(bar, 0, width).step("read of a port")?;
        }
        for (offset, width) in [(0, Width::B8), (info.len, Width::B1), (info.len - 1, Width::B4)] {
            let read = f.bar_read(bar, offset, width);
            ensure(matches!(read, Err(Error::OutOfRange { .. })), || {
                format!("{width:?} of port {offset:#x} of BAR {bar} answered {read:?}")
            })?;
        }
    }
    Ok(())
}

/// Where the MSI-X table and its pending bits are, by config space: BAR and offset.
fn msix_places(f: &dyn HostFunction) -> Result<Vec<(usize, u64)>, super::Verdict> {
    let read = |at| f.config_read(at, Width::B4);
    let Some(at) = crate::capabilities::find(&read, crate::capabilities::MSIX).step("capabilities")? else {
        return skip("the function has no MSI-X");
    };
    let places = [at + 4, at + 8].map(|at| read(at).map(|v| ((v & 7) as usize, u64::from(v & !7))));
    places.into_iter().map(|p| p.step("config read")).collect()
}

fn msix_pages(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let f = &*subject.function;
    for (bar, offset) in msix_places(f)? {
        let page = offset / GRANULE * GRANULE;
        match f.map_bar(bar, page, GRANULE) {
            Err(Error::NotMappable { .. }) => {}
            Err(e) => return fail(format!("page {page:#x} of BAR {bar}: {e}")),
            Ok(_) => return fail(format!("page {page:#x} of BAR {bar}, with MSI-X state, was mapped")),
        }
        f.bar_read(bar, offset, Width::B4).step("trapped read of MSI-X state")?;
    }
    Ok(())
}

fn mapped_reads(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    let (granules, mut tried) = (first_granules(&subject), 0);
    for (bar, offset) in granules {
        let mapped = match subject.function.map_bar(bar, offset, GRANULE) {
            Err(Error::NotMappable { .. }) => continue,
            mapped => mapped.step("map")?,
        };
        ensure_eq("length of a mapping", mapped.len(), GRANULE)?;
        ensure_eq("its address modulo 16 KiB", mapped.host().as_ptr() as u64 % GRANULE, 0)?;
        let trapped = subject.function.bar_read(bar, offset, Width::B4).step("trapped read")?;
        ensure_eq(format!("BAR {bar} at {offset:#x}"), u64::from(super::device::peek(&*mapped, 0)), trapped)?;
        tried += 1;
    }
    if tried == 0 { skip("no BAR can be mapped") } else { Ok(()) }
}

/// The first and the last granule of each memory BAR that has one.
fn first_granules(subject: &Subject) -> Vec<(usize, u64)> {
    let bars = subject.function.bars();
    let large = (0..6).filter_map(|i| {
        bars[i].filter(|b| b.len >= GRANULE && b.kind != HostBarKind::Io).map(|b| (i, b.len))
    });
    large.flat_map(|(i, len)| [(i, 0), (i, len - GRANULE)]).collect()
}

fn rom(open: Opener<'_>) -> Outcome {
    let subject = opened(open)?;
    match subject.function.rom().step("rom")? {
        None => skip("the function has no ROM"),
        Some(image) => ensure(image.starts_with(&[0x55, 0xaa]), || {
            format!("a ROM of {} bytes without its signature", image.len())
        }),
    }
}
