//! PCI functions in the guest that belong to the host: where they are, who drives them, how they interrupt.

use super::pci::{PAGE, Registers};
use super::{dma_device, wait_for};
use anyhow::{Context, Result, ensure};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const DEVICES: &str = "/sys/bus/pci/devices";

/// A PCI function as the guest sees it.
#[derive(Clone, Debug)]
pub struct GuestFunction {
    /// Such as `0000:01:00.0`.
    pub address: String,
}

impl GuestFunction {
    /// The functions with this class (24 bits) that are behind a root port: those of the host. In order.
    pub fn of_class(class: u32) -> Result<Vec<Self>> {
        let is = |address: &String| number(address, "class").is_ok_and(|seen| seen == u64::from(class));
        Ok(Self::behind_ports()?.into_iter().filter(|function| is(&function.address)).collect())
    }

    /// All functions of the host, in order.
    pub fn behind_ports() -> Result<Vec<Self>> {
        let mut addresses: Vec<String> = fs::read_dir(DEVICES)?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|address| !address.starts_with("0000:00:"))
            .collect();
        addresses.sort();
        Ok(addresses.into_iter().map(|address| Self { address }).collect())
    }

    /// The one function with this class.
    pub fn the(class: u32) -> Result<Self> {
        let mut found = Self::of_class(class)?;
        ensure!(found.len() == 1, "{} functions of class {class:06x} instead of one", found.len());
        found.pop().context("one is there")
    }

    /// Its folder in sysfs.
    pub fn folder(&self) -> PathBuf {
        Path::new(DEVICES).join(&self.address)
    }

    /// Its function number.
    pub fn number(&self) -> Result<u8> {
        let number = self.address.rsplit('.').next().unwrap_or_default();
        number.parse().with_context(|| format!("{} has no function number", self.address))
    }

    /// Turns memory decoding on, which a driver would do.
    pub fn enable_memory(&self) -> Result<()> {
        let path = self.folder().join("config");
        let config = OpenOptions::new().read(true).write(true).open(&path)?;
        let mut command = [0; 2];
        config.read_exact_at(&mut command, 4)?;
        command[0] |= 0b010;
        config.write_all_at(&command, 4).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Waits until `driver` has it.
    pub fn wait_driver(&self, driver: &str) -> Result<()> {
        wait_for(&format!("driver {driver} at {}", self.address), Duration::from_secs(30), || {
            let link = fs::read_link(self.folder().join("driver")).ok()?;
            (link.file_name()? == driver).then_some(())
        })
    }

    /// Gives it to `driver`, which is loaded.
    pub fn bind(&self, driver: &str) -> Result<()> {
        let place = Path::new("/sys/bus/pci/drivers").join(driver).join("bind");
        fs::write(place, &self.address)
            .with_context(|| format!("{driver} does not bind to {}", self.address))?;
        self.wait_driver(driver)
    }

    /// Takes it from its driver.
    pub fn unbind(&self) -> Result<()> {
        fs::write(self.folder().join("driver/unbind"), &self.address)
            .with_context(|| format!("cannot take {} from its driver", self.address))
    }

    /// Takes it from its driver, and maps the first page of BAR `index`.
    pub fn take_registers(&self, index: u8) -> Result<Registers> {
        let driver = self.folder().join("driver");
        if driver.exists() {
            fs::write(driver.join("unbind"), &self.address)
                .with_context(|| format!("cannot take {} from its driver", self.address))?;
        }
        dma_device::enable(&self.folder())?;
        Registers::of_bar(&self.folder(), index, PAGE)
    }

    /// The network interface that its driver made.
    pub fn interface(&self) -> Result<String> {
        wait_for(&format!("network interface of {}", self.address), Duration::from_secs(30), || {
            fs::read_dir(self.folder().join("net")).ok()?.flatten().next()?.file_name().into_string().ok()
        })
    }

    /// The disk (`sda`) whose controller it is.
    pub fn disk(&self) -> Result<String> {
        let folder = fs::canonicalize(self.folder())?;
        wait_for(&format!("disk of {}", self.address), Duration::from_secs(60), || {
            let disks = fs::read_dir("/sys/block").ok()?.flatten();
            let own = |name: &String| {
                fs::canonicalize(Path::new("/sys/block").join(name))
                    .is_ok_and(|path| path.starts_with(&folder))
            };
            disks.filter_map(|entry| entry.file_name().into_string().ok()).find(own)
        })
    }

    /// The sound card's number.
    pub fn sound_card(&self) -> Result<u32> {
        wait_for(&format!("sound card of {}", self.address), Duration::from_secs(30), || {
            let cards = fs::read_dir(self.folder().join("sound")).ok()?.flatten();
            cards.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("card")?.parse().ok()).next()
        })
    }

    /// Its interrupts so far: a name and a count for each.
    pub fn interrupts(&self) -> Result<Vec<(String, u64)>> {
        let own: Vec<String> = fs::read_dir(self.folder().join("msi_irqs"))
            .map(|entries| {
                entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
            })
            .unwrap_or_default();
        let own = if own.is_empty() { vec![number(&self.address, "irq")?.to_string()] } else { own };
        let table = fs::read_to_string("/proc/interrupts").context("cannot read /proc/interrupts")?;
        Ok(table.lines().filter_map(|line| interrupt(line, &own)).collect())
    }

    /// The sum of [`GuestFunction::interrupts`].
    pub fn interrupt_count(&self) -> Result<u64> {
        Ok(self.interrupts()?.iter().map(|(_, count)| count).sum())
    }
}

/// `NUMBER: COUNT COUNT … CHIP HWIRQ TYPE NAME`, if it is one of `own`.
fn interrupt(line: &str, own: &[String]) -> Option<(String, u64)> {
    let (irq, rest) = line.split_once(':')?;
    own.iter().find(|one| *one == irq.trim())?;
    let count = rest.split_whitespace().map_while(|word| word.parse::<u64>().ok()).sum();
    Some((rest.split_whitespace().last()?.to_owned(), count))
}

/// A number of sysfs, decimal or with `0x`.
fn number(address: &str, file: &str) -> Result<u64> {
    let path = Path::new(DEVICES).join(address).join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = text.trim();
    let number =
        text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok());
    number.with_context(|| format!("{} holds '{text}'", path.display()))
}

/// What Debian's `lspci` prints, with numbers for names.
pub fn lspci(args: &[&str]) -> Result<String> {
    let output = Command::new("/sbin/lspci").arg("-n").args(args).output().context("cannot start lspci")?;
    ensure!(output.status.success(), "lspci {}: {}", args.join(" "), crate::host::describe(&output));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_counted_over_all_cpus() {
        let line = " 45:          3         12  GICv2m-PCI-MSIX-0000:01:00.0   1 Edge      nvme0q1";
        assert_eq!(interrupt(line, &["45".into()]), Some(("nvme0q1".into(), 15)));
        assert_eq!(interrupt(line, &["4".into()]), None);
    }
}
