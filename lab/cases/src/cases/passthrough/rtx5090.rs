//! The outside of a GeForce RTX 5090 in a real guest: a simulated device, so this runs on any host.

use super::{STEP, case};
use crate::case::Case;
use crate::guest::Guest;
use crate::guest::function::{GuestFunction, lspci};
use crate::guest::pci::Registers;
use crate::host::{Host, Kernel};
use anyhow::{Context, Result, ensure};

/// BOOT_0 of a GB202, revision A1.
const BOOT_0: u32 = 0x1b20_00a1;

pub(super) fn cases() -> Vec<Case> {
    vec![case(
        "passthrough-rtx5090",
        "the simulated RTX 5090 enumerates: lspci, capabilities, audio function, BARs, BOOT_0",
        host,
        guest,
    )]
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

fn expect(shown: &str, wanted: &[&str]) -> Result<()> {
    let missing = wanted.iter().find(|text| !shown.contains(**text));
    missing
        .map_or(Ok(()), |text| Err(anyhow::anyhow!("no '{text}'")))
        .with_context(|| format!("lspci: {shown}"))
}
