//! What a hostile guest can do to devices and to the address space. The monitor and its devices must come through.

use crate::case::{Case, Group, HOST};
use crate::data::{BLOCK, Pattern};
use crate::guest::disk::GuestDisk;
use crate::guest::pci::{Registers, VirtioPci};
use crate::guest::virtio::{INDIRECT, NEXT, RawDevice, Rings, WRITE};
use crate::guest::{Guest, net};
use crate::host::{Disk, Host, Kernel};
use anyhow::{Context, Result, anyhow, ensure};
use std::fs;
use std::io::Read;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(300);
/// An address of Outboard's machine where nothing is: between the redistributors and the ECAM.
const NOWHERE: u64 = 0x0C00_0000;
/// An address beyond any guest's memory.
const BEYOND: u64 = 0xFF_FFFF_F000;
const QUEUE: u16 = 64;
/// Name, virtio device type, a queue that takes buffers at any time.
const DEVICES: [(&str, u16, u16); 5] =
    [("blk", 2, 0), ("net", 1, 1), ("rng", 4, 0), ("console", 3, 1), ("vsock", 19, 1)];

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "guest-abuse",
        about: "every virtio device survives hostile queues; unmapped addresses read all-ones",
        limit_s: 900,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    let image = host.raw_image("abuse.raw", 1)?;
    fs::write(&image, {
        let mut bytes = vec![0; 256 * BLOCK];
        Pattern(4).blocks(0, &mut bytes);
        bytes
    })?;
    let socket = host.scratch("vsock");
    let spec = host
        .guest(Kernel::V6_12)
        .disk(Disk::raw(image))
        .net()
        .extra(&["--vsock", &format!("socket={}", socket.display())])
        .extra(&["--virtio-console", &format!("file:{}", host.scratch("hvc0").display())]);
    let mut vm = host.start(&spec)?;
    let parts = vm.note("parts", STEP)?.as_u64().context("a number of parts")?;
    for _ in 0..parts {
        let part = vm.note("part", STEP)?;
        let name = part["name"].as_str().unwrap_or("?");
        host.part(name, part["fault"].as_str().map_or(Ok(()), |fault| Err(anyhow!("{fault}"))));
    }
    vm.finish(STEP)?;
    // The bus counts and says so, but not for every access.
    let said = vm.stderr();
    // The first access is to one of its first bytes; more may be left out.
    let counted = said.contains("where no device is") && said.contains(&format!("{:#x}", NOWHERE >> 4));
    host.part(
        "unmapped-is-reported",
        counted.then_some(()).ok_or_else(|| anyhow!("the log says nothing: {said}")),
    );
    Ok(None)
}

fn guest(guest: &mut Guest) -> Result<()> {
    let mut results = vec![("unmapped-all-ones".to_owned(), unmapped())];
    for (name, kind, queue) in DEVICES {
        match VirtioPci::find(kind) {
            Ok(device) => attack_all(name, &device, queue, &mut results),
            Err(error) => results.push((name.to_owned(), Err(error))),
        }
    }
    results.push(("blk/works-after".into(), disk_works(guest)));
    results.push(("net/works-after".into(), net::up(guest).map(|_| ())));
    results.push(("rng/works-after".into(), entropy_works(guest)));
    guest.note("parts", results.len());
    for (name, result) in results {
        let fault = result.err().map(|error| format!("{error:#}"));
        guest.note("part", serde_json::json!({ "name": name, "fault": fault }));
    }
    Ok(())
}

fn unmapped() -> Result<()> {
    let page = Registers::physical(NOWHERE)?;
    ensure!(page.read::<u8>(1) == u8::MAX, "a read of 1 byte is not all-ones");
    ensure!(page.read::<u16>(2) == u16::MAX, "a read of 2 bytes is not all-ones");
    ensure!(page.read::<u32>(4) == u32::MAX, "a read of 4 bytes is not all-ones");
    ensure!(page.read::<u64>(8) == u64::MAX, "a read of 8 bytes is not all-ones");
    page.write(4, 0_u32);
    ensure!(page.read::<u32>(4) == u32::MAX, "a write to nowhere was kept");
    Ok(())
}

type Attack = fn(&RawDevice) -> Result<()>;

/// What is tried on each device. After each, the device must reset, and say hello again.
const ATTACKS: [(&str, Attack); 12] = [
    ("descriptor-loop", |device| {
        device.start(QUEUE, device.rings())?;
        device.descriptor(0, device.buffer.address(), 16, NEXT, 1);
        device.descriptor(1, device.buffer.address(), 16, NEXT, 0);
        device.offer(0, 1);
        Ok(())
    }),
    ("self-loop", |device| {
        device.start(QUEUE, device.rings())?;
        device.descriptor(0, device.buffer.address(), 16, NEXT | WRITE, 0);
        device.offer(0, 1);
        Ok(())
    }),
    ("address-out-of-range", |device| {
        device.start(QUEUE, device.rings())?;
        device.descriptor(0, BEYOND, 4096, NEXT, 1);
        device.descriptor(1, u64::MAX - 8, 4096, WRITE, 0);
        device.offer(0, 1);
        Ok(())
    }),
    ("address-in-a-device", |device| {
        device.start(QUEUE, device.rings())?;
        device.descriptor(0, NOWHERE, 512, NEXT, 1);
        device.descriptor(1, NOWHERE, 512, WRITE, 0);
        device.offer(0, 1);
        Ok(())
    }),
    ("length-0", |device| {
        device.start(QUEUE, device.rings())?;
        device.descriptor(0, device.buffer.address(), 0, NEXT, 1);
        device.descriptor(1, device.buffer.address(), 0, WRITE, 0);
        device.offer(0, 1);
        Ok(())
    }),
    ("length-4g", |device| {
        device.start(QUEUE, device.rings())?;
        device.descriptor(0, device.buffer.address(), u32::MAX, NEXT, 1);
        device.descriptor(1, device.buffer.address(), u32::MAX, WRITE, 0);
        device.offer(0, 1);
        Ok(())
    }),
    ("next-outside-table", |device| {
        device.start(QUEUE, device.rings())?;
        device.descriptor(0, device.buffer.address(), 16, NEXT, 0xFFFF);
        device.offer(0, 1);
        device.offer(0xFFFF, 2);
        Ok(())
    }),
    ("more-available-than-fit", |device| {
        device.start(QUEUE, device.rings())?;
        device.descriptor(0, device.buffer.address(), 16, WRITE, 0);
        device.offer(0, 0x8000);
        Ok(())
    }),
    ("indirect-in-indirect", |device| {
        device.start(QUEUE, device.rings())?;
        device.buffer.write(0, device.buffer.address());
        device.buffer.write(8, 16_u32);
        device.buffer.write(12, INDIRECT | NEXT);
        device.descriptor(0, device.buffer.address(), 16, INDIRECT, 0);
        device.descriptor(1, device.buffer.address(), 7, INDIRECT, 0);
        device.offer(0, 1);
        device.ring();
        Ok(())
    }),
    ("odd-queue-sizes", |device| {
        for size in [0, 3, 63, 0x7FFF, 0x8000, 0xFFFF] {
            device.start(size, device.rings())?;
            device.descriptor(0, device.buffer.address(), 16, WRITE, 0);
            device.offer(0, 1);
            device.reset()?;
        }
        Ok(())
    }),
    ("rings-out-of-range", |device| {
        let good = device.rings();
        for rings in [
            Rings { descriptors: BEYOND, ..good },
            Rings { available: u64::MAX - 1, ..good },
            Rings { used: NOWHERE, ..good },
            Rings { descriptors: good.descriptors + 1, available: good.available + 1, used: good.used + 1 },
        ] {
            device.start(QUEUE, rings)?;
            device.offer(0, 1);
            device.reset()?;
        }
        Ok(())
    }),
    ("reset-in-the-middle", |device| {
        for _ in 0..20 {
            device.start(QUEUE, device.rings())?;
            // For a disk this is a read of sector 0; for the others, buffers as any.
            device.descriptor(0, device.buffer.address(), 16, NEXT, 1);
            device.descriptor(1, device.buffer.address() + 512, 512, NEXT | WRITE, 2);
            device.descriptor(2, device.buffer.address() + 2048, 1, WRITE, 0);
            device.offer(0, 1);
            device.reset()?;
        }
        Ok(())
    }),
];

fn attack_all(name: &str, device: &VirtioPci, queue: u16, results: &mut Vec<(String, Result<()>)>) {
    let raw = device.unbind().and_then(|()| RawDevice::new(device, queue));
    match raw {
        Ok(raw) => {
            for (attack, run) in ATTACKS {
                let result = run(&raw).and_then(|()| raw.reset()).and_then(|()| still_works(&raw, name));
                results.push((format!("{name}/{attack}"), result));
            }
        }
        Err(error) => results.push((format!("{name}/take-over"), Err(error))),
    }
    results.push((format!("{name}/bind-again"), device.bind()));
}

/// An ordinary request, where the device has one that needs no other end.
fn still_works(device: &RawDevice, name: &str) -> Result<()> {
    device.start(QUEUE, device.rings())?;
    match name {
        "rng" => {
            device.descriptor(0, device.buffer.address(), 64, WRITE, 0);
            device.offer(0, 1);
            device.wait_used(1).context("an ordinary request afterwards")?;
        }
        "blk" => {
            // A header of zeros is a read of sector 0; 512 bytes of data; the status.
            device.buffer.write(2048, 0xFF_u8);
            device.descriptor(0, device.buffer.address(), 16, NEXT, 1);
            device.descriptor(1, device.buffer.address() + 512, 512, NEXT | WRITE, 2);
            device.descriptor(2, device.buffer.address() + 2048, 1, WRITE, 0);
            device.offer(0, 1);
            device.wait_used(1).context("an ordinary read afterwards")?;
            ensure!(device.buffer.read::<u8>(2048) == 0, "an ordinary read afterwards failed");
        }
        _ => ensure!(device.status() & 4 != 0, "the device does not start afterwards"),
    }
    device.reset()
}

fn disk_works(guest: &mut Guest) -> Result<()> {
    GuestDisk::open(guest, "vda", false)?.check_pattern(Pattern(4), 0, 256)
}

fn entropy_works(guest: &mut Guest) -> Result<()> {
    guest.need("virtio_rng")?;
    let mut bytes = [0; 64];
    fs::File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
    ensure!(bytes.iter().any(|byte| *byte != 0), "64 bytes of zeros");
    Ok(())
}
