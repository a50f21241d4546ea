//! What is tried on each function.

use super::witness::Witness;
use crate::data::Pattern;
use crate::guest::config::{
    BAR_0, COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY, Config, EXPRESS, MSIX, PortConfig,
};
use crate::guest::disk::GuestDisk;
use crate::guest::function::GuestFunction;
use crate::guest::nvme::RawNvme;
use crate::guest::pci::{DmaPage, PAGE, Registers};
use crate::guest::sound::{Playback, RATE};
use anyhow::{Context, Result, ensure};
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// Places in Outboard's machine that are no PCI window, and one in no bridge's reach.
const ELSEWHERE: [u64; 6] =
    [0x0800_0000, 0x0801_0000, 0x0900_0000, 0x1000_0000, 0x4000_0000, 0xffff_ffff_fff0_0000];
/// Doorbell of the guest's MSI frame.
const DOORBELL: u64 = 0x0801_0040;
/// Most time for a command of one page.
const PROMPT: Duration = Duration::from_secs(10);
const FLR: u32 = 1 << 15;
const BAR_COUNT: usize = 6;

type Attack = fn(&Victim, &Witness) -> Result<()>;

/// On a function without a driver; its slot is reset after each.
pub(super) const ATTACKS: [(&str, Attack); 7] = [
    ("config-reads", |victim, _| victim.read_all()),
    ("config-ones", |victim, _| victim.write_all(|_, _| u32::MAX)),
    ("config-random", |victim, _| victim.write_all(random)),
    ("bars-on-top", Victim::bars_on_top),
    ("msix-rubbish", |victim, _| victim.msix_rubbish()),
    ("stray-dma", |victim, _| victim.stray_dma()),
    ("decode-and-reset-while-read", |victim, _| {
        victim.read_while(|| victim.toggle(20).and_then(|()| victim.reset_all()))
    }),
];

/// On a function whose driver is at work. The driver may give up on it.
pub(super) const TRAFFIC_ATTACKS: [(&str, Attack); 2] =
    [("decode-toggled", |victim, _| victim.toggle(20)), ("reset", |victim, _| victim.reset_all())];

/// A function, its config space, the port above it.
pub(super) struct Victim {
    pub(super) name: String,
    function: GuestFunction,
    config: Config,
    port: PortConfig,
    /// Its header as the guest's kernel had set it up.
    header: Vec<u32>,
    /// Of BARs that can be mapped: index, bytes.
    bars: Vec<(u8, u64)>,
}

impl Victim {
    pub(super) fn new(function: &GuestFunction) -> Result<Self> {
        let config = Config::open(function)?;
        let (ids, class) = (config.read(0, 4)?, config.read(8, 4)? >> 8);
        let place = function.address.trim_start_matches("0000:");
        let name = format!("{:04x}-{:04x}-{class:06x}-{}", ids & 0xffff, ids >> 16, place.replace(':', "."));
        let header = (0..0x40).step_by(4).map(|at| config.read(at, 4)).collect::<Result<_>>()?;
        let resources = std::fs::read_to_string(function.folder().join("resource"))?;
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or(0);
        let bar = |(index, line): (usize, &str)| {
            let fields: Vec<u64> = line.split(' ').map(number).collect();
            let [first, last, flags] = fields[..] else { return None };
            // Memory (linux/ioport.h).
            (flags & 0x200 != 0 && last > first).then_some((index as u8, last - first + 1))
        };
        let bars = resources.lines().take(BAR_COUNT).enumerate().filter_map(bar).collect();
        Ok(Self {
            name,
            function: function.clone(),
            config,
            port: PortConfig::above(function)?,
            header,
            bars,
        })
    }

    /// Resets its slot, with its siblings.
    pub(super) fn reset_slot(&self) -> Result<()> {
        self.port.reset_slot()?;
        self.port.restore_windows()
    }

    /// Puts back what the guest's kernel had set up.
    pub(super) fn restore(&self) -> Result<()> {
        for (at, value) in (BAR_0..0x28).step_by(4).zip(&self.header[4..]) {
            self.config.write(at, 4, *value)?;
        }
        self.config.write(COMMAND, 2, self.header[1] & 0xffff)?;
        let (ids, wanted) = (self.config.read(0, 4)?, self.header[0]);
        ensure!(ids == wanted, "afterwards the identity of {} reads {ids:#x}, not {wanted:#x}", self.name);
        Ok(())
    }

    fn read_all(&self) -> Result<()> {
        let len = self.config.len()?;
        for width in [1, 2, 4] {
            for at in (0..len).step_by(width.into()) {
                self.config.read(at, width)?;
            }
        }
        Ok(())
    }

    fn write_all(&self, value: fn(u16, u16) -> u32) -> Result<()> {
        let len = self.config.len()?;
        for width in [4, 2, 1] {
            for at in (0..len).step_by(width.into()) {
                self.config.write(at, width, value(at, width))?;
            }
        }
        Ok(())
    }

    /// Every BAR to every place where something else is, while the port lets everything through.
    fn bars_on_top(&self, witness: &Witness) -> Result<()> {
        let page = DmaPage::new()?;
        (0..PAGE / 8).for_each(|word| page.write(word * 8, word as u64));
        let mut places = ELSEWHERE.to_vec();
        places.push(page.address());
        for other in GuestFunction::behind_ports()? {
            places.extend(first_bar(&Config::open(&other)?)?);
        }
        // Its own: both at the same place.
        places.extend(first_bar(&self.config)?);
        self.port.open_windows()?;
        for place in places {
            let before = witness.rounds();
            self.config.update(COMMAND, COMMAND_MEMORY, 0)?;
            for at in (BAR_0..0x28).step_by(8) {
                self.config.write(at, 4, place as u32)?;
                self.config.write(at + 4, 4, (place >> 32) as u32)?;
            }
            self.config.update(COMMAND, COMMAND_MEMORY, COMMAND_MEMORY)?;
            // Moved while it is decoded.
            self.config.write(BAR_0, 4, place as u32 ^ 0x10_0000)?;
            self.config.write(BAR_0, 4, place as u32)?;
            let damaged = (0..PAGE / 8).find(|word| page.read::<u64>(word * 8) != *word as u64);
            ensure!(damaged.is_none(), "memory is not memory with BARs at {place:#x}");
            witness.wait_round(before).with_context(|| format!("with BARs at {place:#x}"))?;
        }
        Ok(())
    }

    /// Rubbish in the whole MSI-X table, and in one whose messages would arrive somewhere.
    fn msix_rubbish(&self) -> Result<()> {
        let Some(at) = self.config.capability(MSIX)? else { return Ok(()) };
        let count = usize::from(self.config.read(at + 2, 2)? as u16 & 0x7ff) + 1;
        let table = self.config.read(at + 4, 4)?;
        let (bar, offset) = ((table & 7) as u8, (table & !7) as usize);
        self.config.update(COMMAND, COMMAND_MEMORY | COMMAND_BUS_MASTER, u32::MAX)?;
        let len = (offset + count * 16).next_multiple_of(PAGE);
        let registers = Registers::of_bar(&self.function.folder(), bar, len)?;
        for aimed in [false, true] {
            // Enabled; masked as a whole or not, while the table changes.
            for control in [0x8000, 0xc000, 0x8000, 0] {
                self.config.update(at + 2, 0xc000, control)?;
                for entry in 0..count {
                    let place = offset + entry * 16;
                    let rubbish = random(entry as u16, 4);
                    let address =
                        if aimed { DOORBELL } else { u64::from(rubbish) << 20 | u64::from(rubbish) };
                    registers.write(place, address as u32);
                    registers.write(place + 4, (address >> 32) as u32);
                    registers.write(place + 8, rubbish);
                    registers.write(place + 12, rubbish >> 16);
                }
            }
        }
        self.config.update(at + 2, 0xc000, 0)
    }

    /// An NVMe controller is told to write where no guest memory is. The host half sees the fault, and so that it would see others.
    fn stray_dma(&self) -> Result<()> {
        if self.header[2] >> 8 != super::class::NVME {
            return Ok(());
        }
        let nvme = RawNvme::open()?;
        let [queue, done, answer] = [0, 1, 2].map(|index: usize| nvme.pages[index].address());
        let serial = nvme.identify([queue, done, answer], PROMPT)?;
        ensure!(serial.as_deref() == Some("outboard-lab"), "the controller says that it is {serial:?}");
        // How the command ends is the controller's to say.
        let _ = nvme.identify([queue, done, super::STRAY], PROMPT);
        let serial = nvme.identify([queue, done, answer], PROMPT)?;
        ensure!(serial.is_some(), "the controller does not work after a fault");
        Ok(())
    }

    /// Runs `work` while another thread reads the BARs all the time.
    fn read_while(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.config.update(COMMAND, COMMAND_MEMORY, COMMAND_MEMORY)?;
        let map = |(bar, len): &(u8, u64)| -> Result<(Registers, usize)> {
            let len = usize::try_from(*len)?.clamp(PAGE, 1 << 20);
            Ok((Registers::of_bar(&self.function.folder(), *bar, len)?, len))
        };
        let bars = self.bars.iter().map(map).collect::<Result<Vec<_>>>()?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for (registers, len) in &bars {
                        for at in [0, len / 2, len - 4] {
                            let _: u32 = registers.read(at);
                        }
                    }
                }
            });
            let result = work();
            stop.store(true, Ordering::Relaxed);
            result
        })
    }

    /// Memory decoding off and on.
    fn toggle(&self, times: u32) -> Result<()> {
        for _ in 0..times {
            self.config.update(COMMAND, COMMAND_MEMORY, 0)?;
            thread::sleep(Duration::from_millis(2));
            self.config.update(COMMAND, COMMAND_MEMORY, COMMAND_MEMORY)?;
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// A function level reset, where there is one, and a reset of the slot.
    fn reset_all(&self) -> Result<()> {
        if let Some(at) = self.config.capability(EXPRESS)? {
            self.config.update(at + 8, FLR, FLR)?;
        }
        thread::sleep(Duration::from_millis(20));
        self.port.reset_slot()
    }

    /// Has the driver work on a thread of its own, which may hang. Whether there is one.
    pub(super) fn start_traffic(&self) -> Result<bool> {
        let function = self.function.clone();
        let class = self.header[2] >> 8;
        let work: Box<dyn FnOnce() -> Result<()> + Send> = match class >> 8 {
            0x0108 | 0x0106 | 0x0c03 => {
                let disk = GuestDisk::direct(&function.disk()?)?;
                Box::new(move || {
                    let none = Pattern(0);
                    (0..).try_for_each(|_| {
                        // It reads what is there; only that it reads matters.
                        let _ = disk.check_pattern(none, 0, 64);
                        disk.read_block(0).map(drop)
                    })
                })
            }
            0x0403 if self.header[0] & 0xffff == 0x8086 => {
                let playback = Playback::open(function.sound_card()?)?;
                Box::new(move || (0..).try_for_each(|_| playback.play(RATE)))
            }
            0x0200 => {
                super::super::network::up(&function)?;
                Box::new(move || {
                    let socket = UdpSocket::bind("0.0.0.0:0")?;
                    socket.set_broadcast(true)?;
                    (0..).try_for_each(|_| {
                        thread::sleep(Duration::from_millis(1));
                        Ok(socket.send_to(&[0; 1400], "10.77.0.255:9").map(drop)?)
                    })
                })
            }
            _ => return Ok(false),
        };
        thread::Builder::new().name("traffic".into()).spawn(work)?;
        Ok(true)
    }
}

/// Where a function's first BAR is.
fn first_bar(config: &Config) -> Result<Option<u64>> {
    let low = config.read(BAR_0, 4)?;
    let high = if low & 0b110 == 0b100 { config.read(BAR_0 + 4, 4)? } else { 0 };
    let address = u64::from(high) << 32 | u64::from(low & !0xf);
    Ok((low & 1 == 0 && address != 0).then_some(address))
}

/// A value that differs from place to place, the same each time.
fn random(at: u16, width: u16) -> u32 {
    let mut bytes = [0; 8];
    Pattern(90 + u64::from(width)).block(at.into(), &mut bytes);
    u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"))
}
