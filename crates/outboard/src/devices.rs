//! `outboard devices`: what the host has, and taking it from the host's driver and back.

use crate::{chain, failed, print};
use clap::{Args, Subcommand};
use outboard_host_pci::host::{BarInfo, BarSpace, Function, Host, Names, Refusal};
use outboard_host_pci::{PciAddress, Selection};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::process::ExitCode;

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DevicesArgs {
    #[command(subcommand)]
    action: Option<Action>,

    /// Print JSON: an array with an object for each function.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Action {
    /// Take a device from the host's driver, so that `outboard run --device` can use it. Needs root.
    Bind {
        /// Slot with all its functions (01:00), or one function (01:00.0).
        #[arg(value_name = "ADDRESS")]
        selection: Selection,
    },
    /// Give a device back to the host's driver. Needs root.
    Release {
        /// Slot with all its functions (01:00), or one function (01:00.0).
        #[arg(value_name = "ADDRESS")]
        selection: Selection,
    },
}

pub fn devices(args: &DevicesArgs) -> ExitCode {
    let done = Host::this().and_then(|host| match &args.action {
        None => list(&host, args.json),
        Some(Action::Bind { selection }) => bind(&host, *selection),
        Some(Action::Release { selection }) => release(&host, *selection),
    });
    match done {
        Ok(text) => print(&text, true),
        Err(error) => failed(&chain(&error)),
    }
}

fn list(host: &Host, as_json: bool) -> Result<String, Refusal> {
    let (functions, names) = (host.functions()?, host.names());
    let with_obstacles = functions.iter().map(|f| {
        let slot: Vec<Function> =
            functions.iter().filter(|o| f.address.slot().contains(o.address)).cloned().collect();
        (f, host.obstacles(f, &slot))
    });
    if as_json {
        let all: Vec<Value> = with_obstacles.map(|(f, obstacles)| object(f, &names, &obstacles)).collect();
        return Ok(format!("{:#}\n", Value::Array(all)));
    }
    let all: Vec<String> = with_obstacles.map(|(f, obstacles)| paragraph(f, &names, &obstacles)).collect();
    Ok(if all.is_empty() { "This host has no PCI devices.\n".into() } else { all.concat() })
}

fn paragraph(function: &Function, names: &Names, obstacles: &[Refusal]) -> String {
    let Function { address, vendor, device, driver, group, .. } = function;
    let (class, name) = (names.class(function), names.device(function));
    let mut text = format!("{address}  {class}: {name} [{vendor:04x}:{device:04x}]\n");
    let driver = driver.as_deref().unwrap_or("none");
    let group = group.map_or("none".into(), |g| g.to_string());
    // Writing to a string does not fail.
    let _ = writeln!(text, "    driver {driver}, IOMMU group {group}");
    if !function.bars.is_empty() && !function.bridge {
        let bars: Vec<String> = function.bars.iter().map(bar).collect();
        let _ = writeln!(text, "    {}", bars.join(", "));
    }
    match obstacles {
        [] if function.bound() => text += "    ready: outboard run --device can use it\n",
        [] => {
            let _ = writeln!(text, "    possible, after: sudo outboard devices bind {}", address.slot());
        }
        _ if function.bridge => {}
        _ => obstacles.iter().for_each(|o| {
            let _ = writeln!(text, "    not possible: {o}");
        }),
    }
    text
}

fn bar(bar: &BarInfo) -> String {
    let kind = match bar.space {
        BarSpace::Io => "I/O",
        BarSpace::Memory { prefetchable: true, .. } => "prefetchable",
        BarSpace::Memory { .. } => "memory",
    };
    format!("BAR {} {} {kind}", bar.index, size(bar.len))
}

/// The largest unit that leaves no rest.
fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    unit.map_or_else(|| format!("{bytes} B"), |(shift, name)| format!("{} {name}", bytes >> shift))
}

fn object(function: &Function, names: &Names, obstacles: &[Refusal]) -> Value {
    let bars: Vec<Value> = function.bars.iter().map(bar_object).collect();
    let reasons: Vec<String> = obstacles.iter().map(ToString::to_string).collect();
    json!({
        "address": function.address.to_string(),
        "vendor": format!("{:04x}", function.vendor),
        "device": format!("{:04x}", function.device),
        "subsystem_vendor": format!("{:04x}", function.subsystem_vendor),
        "subsystem_device": format!("{:04x}", function.subsystem_device),
        "class": format!("{:06x}", function.class),
        "revision": format!("{:02x}", function.revision),
        "name": names.device(function),
        "class_name": names.class(function),
        "driver": function.driver,
        "iommu_group": function.group,
        "bars": bars,
        "bound": function.bound(),
        "possible": reasons.is_empty(),
        "reasons": reasons,
    })
}

fn bar_object(bar: &BarInfo) -> Value {
    let (space, wide, prefetchable) = match bar.space {
        BarSpace::Io => ("io", false, false),
        BarSpace::Memory { wide, prefetchable } => ("memory", wide, prefetchable),
    };
    json!({
        "index": bar.index, "space": space, "bytes": bar.len, "wide": wide, "prefetchable": prefetchable,
    })
}

fn bind(host: &Host, selection: Selection) -> Result<String, Refusal> {
    let bound = host.bind(selection)?;
    Ok(bound.iter().map(|address| format!("{address} is bound to vfio-pci\n")).collect())
}

fn release(host: &Host, selection: Selection) -> Result<String, Refusal> {
    let released = host.release(selection)?;
    let line = |(address, driver): &(PciAddress, Option<String>)| match driver {
        Some(driver) => format!("{address} is back with {driver}\n"),
        None => format!("{address} is free; no driver of the host wants it\n"),
    };
    Ok(released.iter().map(line).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole() {
        let sizes = [0, 128, 4096, 16 << 10, 3 << 20, 256 << 20, 32 << 30, (1 << 20) + 1].map(size);
        assert_eq!(sizes, ["0 B", "128 B", "4 KiB", "16 KiB", "3 MiB", "256 MiB", "32 GiB", "1048577 B"]);
    }
}
