//! The module `outboard_dma` in guests whose devices are under a Mac's limits.

use super::{Guest, kernel_log};
use crate::host::Dma;
use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Where debugfs is, once the module is loaded.
pub const DEBUGFS: &str = "/sys/kernel/debug";
/// The module.
pub const MODULE: &str = "outboard_dma";
/// Argument for guests that load the module later.
pub const LATER: &str = "module-later";

/// What a guest that needs the module does before its half: loads it, before any driver of a device.
pub fn before(guest: &mut Guest) -> Result<()> {
    if Dma::of(guest.arg("case")?) == Dma::Identity {
        return Ok(());
    }
    let debugfs = mount(Some("debugfs"), DEBUGFS, Some("debugfs"), MsFlags::empty(), None::<&str>);
    debugfs.context("cannot mount debugfs")?;
    kernel_log::say_more(Path::new(DEBUGFS))?;
    // The host half wants the case to load it itself.
    if guest.arg(LATER).is_ok() { Ok(()) } else { guest.need(MODULE) }
}

/// What it does after its half: tells the statistics, and fails where the module did not do its work in peace.
pub fn after(guest: &mut Guest) -> Result<()> {
    let dma = Dma::of(guest.arg("case")?);
    if dma == Dma::Identity || guest.own_dma_check {
        return Ok(());
    }
    kernel_log::check(Path::new(DEBUGFS))?;
    // Where there is too little room, mappings may fail for want of it, and only for that.
    let never = ["lost", "leaks", "host_refused", "unknown", "misused", "masked", "refused"].iter();
    let never: Vec<&str> =
        never.chain(&["failures", "failed"][..if dma == Dma::Tight { 0 } else { 2 }]).copied().collect();
    // Not every device that a guest has needs to have a driver.
    let mut maps = 0;
    for folder in domains()? {
        let stats = Stats::read(&folder)?;
        guest.note("dma", stats.text.as_str());
        maps += stats.value("maps")?;
        for key in &never {
            // Counted by function, and there is none before a driver binds.
            ensure!(stats.value(key).unwrap_or(0) == 0, "{key} is not 0:\n{}", stats.text);
        }
    }
    ensure!(maps > 0, "nothing was mapped through the module");
    Ok(())
}

/// The module's folders, one for each DMA device.
pub fn domains() -> Result<Vec<PathBuf>> {
    let root = Path::new(DEBUGFS).join(MODULE);
    let entries = fs::read_dir(&root).with_context(|| format!("cannot read {}", root.display()))?;
    let mut folders: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    ensure!(!folders.is_empty(), "the module found no DMA device");
    Ok(folders)
}

/// `stats` of one DMA device.
pub struct Stats {
    /// As the module shows it.
    pub text: String,
    values: BTreeMap<String, i64>,
}

impl Stats {
    /// Reads it.
    pub fn read(folder: &Path) -> Result<Self> {
        let file = folder.join("stats");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Ok(Self { values: parse(&text), text })
    }

    /// A value; for those of functions, the sum over all.
    pub fn value(&self, key: &str) -> Result<i64> {
        self.values.get(key).copied().with_context(|| format!("the module's statistics have no '{key}'"))
    }
}

/// Lines `KEY VALUE`, and `device ADDRESS KEY VALUE KEY VALUE …`, whose values add up; `hits` stand in both and count once.
fn parse(text: &str) -> BTreeMap<String, i64> {
    let mut values = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (pairs, of_device) = match words.as_slice() {
            ["device", _, rest @ ..] => (rest, true),
            all => (all, false),
        };
        for pair in pairs.chunks_exact(2) {
            let shown_above = of_device && ["live", "hits", "misses"].contains(&pair[0]);
            if let (Ok(value), false) = (pair[1].parse::<i64>(), shown_above) {
                *values.entry(pair[0].to_owned()).or_default() += value;
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_functions_add_up() {
        let text = "live 5\nhits 7\ndevice 0000:01:00.0 bound 1 live 2 hits 3 failed 1\n\
                    device 0000:01:00.1 bound 1 live 3 hits 4 failed 2\n";
        let values = parse(text);
        assert_eq!(values["live"], 5);
        assert_eq!(values["hits"], 7);
        assert_eq!(values["failed"], 3);
    }
}
