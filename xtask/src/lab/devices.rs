//! The PCI devices of the emulated host that guests get: hardware to it, behind its SMMU.

use crate::paths::Paths;
use anyhow::{Context, Result};
use lab_cases::host::{PLUGGABLE, Port};
use std::fs::File;
use std::process::Command;

/// Size of a disk. Its contents are of no use after the session.
const DISK_MIB: u64 = 64;

/// Adds them to the emulator's command line, and the emulated host's own end of the network.
pub fn add(paths: &Paths, command: &mut Command) -> Result<()> {
    for port in Port::ALL {
        // Without hot plug a reset of the port's bus takes no time.
        let hotplug = if port == Port::Pluggable { "on" } else { "off" };
        command.arg("-device").arg(format!(
            "pcie-root-port,id={},chassis={},addr={:#x},hotplug={hotplug}",
            port.id(),
            port.device(),
            port.device()
        ));
    }
    let mut device = |port: Port, text: &str| {
        command.arg("-device").arg(format!("{text},bus={}", port.id()));
    };
    device(Port::Nvme, "nvme,id=nvme,drive=nvme,serial=outboard-lab");
    device(Port::Network, "e1000e,id=net,netdev=guest-wire,romfile=");
    device(Port::Usb, "qemu-xhci,id=usb");
    device(Port::Sata, "ich9-ahci,id=sata");
    device(Port::Sound, "ich9-intel-hda,id=sound");
    device(Port::Several, "ich9-ahci,id=sata2,addr=0.0,multifunction=on");
    device(Port::Several, "ich9-intel-hda,id=sound2,addr=0.1");
    device(Port::Edu, "edu,dma_mask=0xffffffffffffffff");
    device(Port::IoPorts, "e1000,id=io-ports,netdev=io-ports-net,romfile=");
    device(Port::Unprotected, "e1000e,id=unprotected,romfile=");
    for name in ["nvme", "stick", "sata", "sata2"] {
        add_drive(paths, command, name)?;
    }
    add_node(paths, command, PLUGGABLE.0)?;
    command.args(["-device", "usb-storage,bus=usb.0,drive=stick"]);
    command.args(["-device", "ide-hd,bus=sata.0,drive=sata", "-device", "ide-hd,bus=sata2.0,drive=sata2"]);
    command.args(["-audiodev", "none,id=silence"]);
    command.args(["-device", "hda-output,bus=sound.0,audiodev=silence"]);
    command.args(["-device", "hda-output,bus=sound2.0,audiodev=silence"]);
    // A wire from the guest's card to the emulated host's own.
    command.args(["-netdev", "hubport,id=guest-wire,hubid=1", "-netdev", "hubport,id=host-wire,hubid=1"]);
    command.args(["-device", "virtio-net-pci,netdev=host-wire,romfile="]);
    // A gateway that answers pings, and nothing behind it.
    command.args(["-netdev", "user,id=io-ports-net,restrict=on"]);
    Ok(())
}

fn add_drive(paths: &Paths, command: &mut Command, name: &str) -> Result<()> {
    let path = image(paths, name)?;
    command.arg("-drive").arg(format!("if=none,id={name},format=raw,file={path}"));
    Ok(())
}

/// A disk that stays when its device is unplugged.
fn add_node(paths: &Paths, command: &mut Command, name: &str) -> Result<()> {
    let path = image(paths, name)?;
    let node = format!("driver=raw,node-name={name},file.driver=file,file.filename={path}");
    command.arg("-blockdev").arg(node);
    Ok(())
}

/// Makes the image; its path for the emulator's command line.
fn image(paths: &Paths, name: &str) -> Result<String> {
    let image = paths.lab.join(format!("{name}.img"));
    let file = File::create(&image).with_context(|| format!("cannot create {}", image.display()))?;
    file.set_len(DISK_MIB << 20)?;
    Ok(image.to_str().context("the clone's path is not valid UTF-8; move it")?.replace(',', ",,"))
}
