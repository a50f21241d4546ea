//! `outboard status` and `outboard device`: asking and telling running machines.

use crate::{EXIT_USAGE, chain, failed, print};
use clap::{Args, Subcommand};
use outboard_control::{
    Answer, Error, Folder, Found, GuestState, Name, Request, Slot, SlotState, VmStatus, request, running,
};
use outboard_host_pci::Selection;
use outboard_machine::DeviceSpec;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::process::ExitCode;

#[derive(Args)]
pub struct StatusArgs {
    /// Only this virtual machine.
    #[arg(value_name = "NAME")]
    name: Option<Name>,

    /// Print JSON: an array with an object for each machine; with NAME that object alone.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct DeviceArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Have the guest let go of a device of the host. Returns once it has: then the device is free.
    Remove(Target),
    /// Give a running guest a device of the host, behind a free root port (--spare-ports, or one that a removed device left).
    Add(Target),
}

#[derive(Args)]
#[command(allow_missing_positional = true)]
struct Target {
    /// The virtual machine; may be left out while only one is running.
    #[arg(value_name = "NAME")]
    name: Option<Name>,

    /// Slot with all its functions (01:00), or one function (01:00.0), as on the host.
    #[arg(value_name = "ADDRESS", required = true)]
    device: String,

    /// Seconds to wait for the guest.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u32,
}

pub fn status(args: &StatusArgs) -> ExitCode {
    finish(status_text(args))
}

pub fn device(args: &DeviceArgs) -> ExitCode {
    let (target, is_remove) = match &args.action {
        Action::Remove(target) => (target, true),
        Action::Add(target) => (target, false),
    };
    if let Err(error) = check_device(&target.device, is_remove) {
        failed(&error);
        return ExitCode::from(EXIT_USAGE);
    }
    finish(tell(target, is_remove).map(|text| (text, true)))
}

/// Refuses what no machine could understand.
fn check_device(device: &str, is_remove: bool) -> Result<(), String> {
    let parsed = if is_remove {
        device.parse::<Selection>().map(drop).map_err(|error| error.to_string())
    } else {
        device.parse::<DeviceSpec>().map(drop)
    };
    parsed.map_err(|error| format!("'{device}' is no device: {error}"))
}

/// Prints what there is to print; a failure if it went wrong, or was not all.
fn finish(done: Result<(String, bool), String>) -> ExitCode {
    match done {
        Ok((text, is_whole)) => print(&text, is_whole),
        Err(error) => failed(&error),
    }
}

/// The text, and whether every machine has answered.
fn status_text(args: &StatusArgs) -> Result<(String, bool), String> {
    let folder = Folder::of_user();
    if let Some(name) = &args.name {
        let status = match request(&folder, name, &Request::Status).map_err(text)? {
            Answer::Status(status) => status,
            other => return Err(format!("'{name}' answered {other:?}")),
        };
        let text = if args.json { format!("{:#}\n", object(&status)) } else { paragraph(&status) };
        return Ok((text, true));
    }
    let found = running(&folder).map_err(text)?;
    let whole = found.iter().all(|(_, status)| status.is_ok());
    if args.json {
        let all = found.iter().map(|(name, status)| match status {
            Ok(status) => object(status),
            Err(error) => json!({ "name": name.as_str(), "error": chain(error) }),
        });
        return Ok((format!("{:#}\n", Value::Array(all.collect())), whole));
    }
    if found.is_empty() {
        let folder = folder.path().display();
        return Ok((format!("This user runs no virtual machines (looked in {folder}).\n"), true));
    }
    let paragraphs = found.iter().map(|(name, status)| match status {
        Ok(status) => paragraph(status),
        Err(error) => format!("{name}\n  {}\n", chain(error)),
    });
    Ok((paragraphs.collect(), whole))
}

fn tell(target: &Target, is_remove: bool) -> Result<String, String> {
    let folder = Folder::of_user();
    let name = match &target.name {
        Some(name) => name.clone(),
        None => only(running(&folder).map_err(text)?)?,
    };
    let (device, wait_s) = (target.device.clone(), target.wait);
    let order = if is_remove {
        Request::RemoveDevice { device, wait_s }
    } else {
        Request::AddDevice { device, wait_s }
    };
    match request(&folder, &name, &order) {
        Ok(Answer::Done(said)) => Ok(format!("{said}\n")),
        Ok(other) => Err(format!("'{name}' answered {other:?}")),
        Err(Error::Refused(why)) => Err(format!("{name}: {why}")),
        Err(error) => Err(text(error)),
    }
}

/// The one machine that runs.
fn only(found: Vec<Found>) -> Result<Name, String> {
    let names: Vec<Name> = found.into_iter().map(|(name, _)| name).collect();
    match &names[..] {
        [name] => Ok(name.clone()),
        [] => Err("this user runs no virtual machine".into()),
        _ => {
            let names: Vec<&str> = names.iter().map(Name::as_str).collect();
            Err(format!("several virtual machines are running: say which of {}", names.join(", ")))
        }
    }
}

fn object(status: &VmStatus) -> Value {
    serde_json::to_value(status).expect("a status is plain data")
}

fn paragraph(status: &VmStatus) -> String {
    let VmStatus { name, pid, state, uptime_s, boots, vcpus, memory, slots, disks, networks, counters } =
        status;
    let state = match state {
        GuestState::Starting => "starting",
        GuestState::Running => "running",
        GuestState::PoweringOff => "running, power key pressed",
        GuestState::Stopping => "stopping",
    };
    let mut text = format!("{name}  {state}, process {pid}, up {uptime_s} s, boot {boots}\n");
    // Writing to a string does not fail.
    let _ = writeln!(text, "  {vcpus} vCPUs, {} MiB of memory", memory >> 20);
    for slot in slots {
        text += &slot_lines(slot);
    }
    for disk in disks {
        let _ = writeln!(text, "  disk {}{}", disk.path, if disk.read_only { " (read-only)" } else { "" });
    }
    for network in networks {
        let _ = write!(text, "  network {}", network.mac);
        for forward in &network.forwards {
            let _ = write!(text, ", forward {forward}");
        }
        text += "\n";
    }
    if let Some(counters) = counters {
        let (unmapped, refused) = (counters.unmapped_accesses, counters.refused_accesses);
        if unmapped + refused > 0 {
            let _ = writeln!(
                text,
                "  guest accesses that no device served: {unmapped} unmapped, {refused} refused"
            );
        }
    }
    text
}

fn slot_lines(slot: &Slot) -> String {
    let Slot { port, device, state, why, bus, functions, dma } = slot;
    let state = match state {
        SlotState::Empty => "free",
        SlotState::On => "in the guest",
        SlotState::Off => "plugged in, the guest has its slot turned off",
        SlotState::Ejecting => "the guest was asked to let go",
        SlotState::Gone => "gone",
        SlotState::Broken => "broken",
    };
    let mut text = format!("  port {port}  ");
    text += device.as_deref().map(|device| format!("{device} ")).as_deref().unwrap_or_default();
    text += state;
    if let Some(why) = why {
        let _ = write!(text, ": {why}");
    }
    text += "\n";
    for function in functions {
        let _ = write!(text, "    {} [{}] class {}", function.address, function.id, function.class);
        if let (Some(bus), true) = (bus, function.lost.is_none()) {
            let _ = write!(text, ", on bus {bus:02x} of the guest");
        }
        if let Some(lost) = &function.lost {
            let _ = write!(text, ", lost: {lost}");
        }
        text += "\n";
    }
    if let Some(dma) = dma {
        let _ = writeln!(
            text,
            "    DMA: {} of {} KiB in {} of {} mappings; {} made, {} taken down",
            dma.bytes >> 10,
            dma.limit_bytes >> 10,
            dma.entries,
            dma.limit_entries,
            dma.maps,
            dma.unmaps
        );
        if dma.mistakes > 0 {
            let _ = writeln!(
                text,
                "    {} mistakes that would have panicked a Mac; please report it, with the log",
                dma.mistakes
            );
        }
    }
    text
}

fn text(error: Error) -> String {
    chain(&error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use outboard_control::{Counters, DeviceFunction, DmaCounters};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: DeviceArgs,
    }

    #[test]
    fn the_machine_may_be_left_out() {
        let parse = |words: &[&str]| match Cli::try_parse_from([&["outboard"], words].concat())?.args.action {
            Action::Remove(target) | Action::Add(target) => {
                Ok::<_, clap::Error>((target.name.map(|n| n.to_string()), target.device, target.wait))
            }
        };
        assert_eq!(parse(&["remove", "01:00"]).unwrap(), (None, "01:00".into(), 60));
        let named = parse(&["add", "web", "01:00.0", "--wait", "5"]).unwrap();
        assert_eq!(named, (Some("web".into()), "01:00.0".into(), 5));
        assert!(parse(&["remove"]).is_err());
        assert!(parse(&["add", "../x", "01:00"]).is_err());
    }

    #[test]
    fn a_lost_device_says_which_and_why() {
        let function = DeviceFunction {
            address: "0000:01:00.0".into(),
            id: "1b36:0010".into(),
            class: "010802".into(),
            lost: Some("it was unplugged".into()),
        };
        let slot = Slot {
            port: "00:02.0".into(),
            device: Some("0000:01:00".into()),
            state: SlotState::Gone,
            why: Some("it was unplugged".into()),
            bus: Some(1),
            functions: vec![function],
            dma: Some(DmaCounters { bytes: 32 << 10, entries: 2, mistakes: 1, ..Default::default() }),
        };
        let status = VmStatus {
            name: "vm1".into(),
            slots: vec![slot, Slot { port: "00:03.0".into(), ..Default::default() }],
            counters: Some(Counters::default()),
            ..Default::default()
        };
        let text = paragraph(&status);
        assert!(text.contains("port 00:02.0  0000:01:00 gone: it was unplugged"), "{text}");
        assert!(text.contains("0000:01:00.0 [1b36:0010] class 010802, lost: it was unplugged"), "{text}");
        assert!(text.contains("port 00:03.0  free"), "{text}");
        assert!(text.contains("32 of 0 KiB in 2 of 0 mappings") && text.contains("1 mistakes"), "{text}");
    }

    #[test]
    fn without_a_name_there_must_be_one_machine() {
        let found = |names: &[&str]| {
            let found = |name: &&str| (name.parse().unwrap(), Ok(VmStatus::default()));
            only(names.iter().map(found).collect())
        };
        assert_eq!(found(&["a"]).unwrap().as_str(), "a");
        assert!(found(&[]).is_err());
        assert!(found(&["a", "b"]).unwrap_err().contains("a, b"));
    }
}
