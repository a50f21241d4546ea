//! The outside of a GeForce RTX 5090 in a real guest: a simulated device, so this runs on any host.

use super::{STEP, case};
use crate::case::Case;
use crate::guest::function::{GuestFunction, lspci};
use crate::guest::pci::Registers;
use crate::guest::{Guest, wait_for};
use crate::host::{Host, Kernel, describe, outboard, outboard_path};
use anyhow::{Context, Result, ensure};
use std::process::Command;

/// Name of the virtual machine that gets it later.
const NAME: &str = "hotadd";
/// BOOT_0 of a GB202, revision A1.
const BOOT_0: u32 = 0x1b20_00a1;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            "passthrough-rtx5090",
            "the simulated RTX 5090 enumerates: lspci, capabilities, audio function, BARs, BOOT_0",
            host,
            guest,
        ),
        case(
            "passthrough-hotadd",
            "the simulated RTX 5090 added to a running guest, whose port had no room for it; what has no room is refused",
            add_host,
            added,
        ),
    ]
}

fn host(host: &Host) -> Result<Option<String>> {
    let spec = host.guest(Kernel::V6_12).device_drivers().extra(&["--device", "simulated:rtx5090"]);
    let mut vm = host.start(&spec)?;
    let boot_0 = vm.note("boot-0", STEP)?;
    ensure!(boot_0 == BOOT_0, "BAR 0 reads {boot_0} at offset 0");
    vm.finish(STEP)?;
    Ok(None)
}

fn guest(guest: &mut Guest) -> Result<()> {
    let functions = GuestFunction::behind_ports()?;
    let [graphics, audio] = &functions[..] else { anyhow::bail!("the guest has {functions:?}") };
    functions.iter().try_for_each(GuestFunction::enable_memory)?;
    let shown = lspci(&["-vv", "-s", &graphics.address])?;
    expect(
        &shown,
        &[
            "0300: 10de:2b85 (rev a1)",
            "Subsystem: 10de:2057",
            "Region 0: Memory at ",
            "(32-bit, non-prefetchable) [size=64M]",
            "Region 1: Memory at ",
            "(64-bit, prefetchable) [size=256M]",
            "Region 3: Memory at ",
            "(64-bit, prefetchable) [size=32M]",
            "Expansion ROM at ",
            "Power Management version 3",
            "MSI: Enable- Count=1/16 Maskable+ 64bit+",
            "Express (v2) Legacy Endpoint",
            "LnkCap:\tPort #0, Speed 32GT/s, Width x16",
            "Physical Resizable BAR",
            "BAR 1: current size: 256MB",
            "Advanced Error Reporting",
        ],
    )?;
    // What the guest must not reach is out of the chain, though it is its first link in the hardware.
    ensure!(!shown.contains("Virtual Channel"), "a capability that is the host's is shown: {shown}");
    let shown = lspci(&["-vv", "-s", &audio.address])?;
    expect(&shown, &["0403: 10de:22e8 (rev a1)", "[size=16K]", "Express (v2)", "Advanced Error Reporting"])?;
    ensure!(graphics.number()? == 0 && audio.number()? == 1, "the functions are {functions:?}");
    let tree = lspci(&["-t"])?;
    ensure!(tree.contains("-[01]--+-00.0"), "it is behind no root port: {tree}");
    let register = |function: &GuestFunction, bar: u8| -> Result<u32> {
        Ok(Registers::of_bar(&function.folder(), bar, 0x1000)?.read(0))
    };
    guest.note("boot-0", register(graphics, 0)?);
    // BARs that are memory in the device are memory in the guest, to their ends.
    for (bar, len) in [(1, 256 << 20), (3, 32 << 20)] {
        let memory = Registers::of_bar(&graphics.folder(), bar, len)?;
        for at in [0, len / 2, len - 4] {
            memory.write(at, 0x5090_0000 | at as u32 >> 12);
        }
        for at in [0, len / 2, len - 4] {
            let seen: u32 = memory.read(at);
            ensure!(seen == 0x5090_0000 | at as u32 >> 12, "BAR {bar} reads {seen:#x} at {at:#x}");
        }
    }
    ensure!(register(audio, 0)? == 0, "the audio function's BAR does not answer");
    Ok(())
}

/// Adds what has no room in the machine, what finds room behind its port once the guest makes some, and the same again.
fn add_host(host: &Host) -> Result<Option<String>> {
    let spec = host.guest(Kernel::V6_12).device_drivers().extra(&["--spare-ports", "2", "--name", NAME]);
    let mut vm = host.start(&spec)?;
    vm.note("ready", STEP)?;
    refused("simulated:large-bar", &["64-bit PCIe window", "resource2_resize", "fewer devices"])?;
    outboard(&["device", "add", NAME, "simulated:rtx5090"])?;
    let boot_0 = vm.note("boot-0", STEP)?;
    ensure!(boot_0 == BOOT_0, "BAR 0 reads {boot_0} at offset 0");
    refused("simulated:rtx5090", &["is in the guest already", "outboard status"])?;
    vm.type_text("end\n")?;
    vm.finish(STEP)?;
    Ok(None)
}

fn refused(device: &str, says: &[&str]) -> Result<()> {
    let output = Command::new(outboard_path()).args(["device", "add", NAME, device]).output()?;
    let said = describe(&output);
    ensure!(!output.status.success(), "{device} was added: {said}");
    let missing = says.iter().find(|text| !said.contains(**text));
    ensure!(missing.is_none(), "the refusal of {device} does not have '{missing:?}': {said}");
    Ok(())
}

fn added(guest: &mut Guest) -> Result<()> {
    ensure!(GuestFunction::behind_ports()?.is_empty(), "there is a device already");
    guest.note("ready", true);
    let both = || GuestFunction::behind_ports().ok().filter(|found| found.len() == 2);
    let functions = wait_for("graphics card and its audio function", STEP, both)?;
    // The kernel gives them their places before it shows them whole.
    let placed = || functions.iter().all(|function| function.enable_memory().is_ok()).then_some(());
    wait_for("its config space", STEP, placed)?;
    let shown = lspci(&["-vv", "-s", &functions[0].address])?;
    expect(&shown, &["Region 0: Memory at ", "[size=64M]", "[size=256M]", "[size=32M]"])?;
    ensure!(!shown.contains("<unassigned>"), "the guest has no room for it: {shown}");
    guest.note("boot-0", Registers::of_bar(&functions[0].folder(), 0, 0x1000)?.read::<u32>(0));
    let memory = Registers::of_bar(&functions[0].folder(), 1, 256 << 20)?;
    memory.write((256 << 20) - 4, 0x5090_u32);
    let seen: u32 = memory.read((256 << 20) - 4);
    ensure!(seen == 0x5090, "BAR 1 reads {seen:#x} at its end");
    ensure!(guest.read_line()? == "end", "the host half said something else");
    Ok(())
}

fn expect(shown: &str, wanted: &[&str]) -> Result<()> {
    let missing = wanted.iter().find(|text| !shown.contains(**text));
    missing
        .map_or(Ok(()), |text| Err(anyhow::anyhow!("no '{text}'")))
        .with_context(|| format!("lspci: {shown}"))
}
