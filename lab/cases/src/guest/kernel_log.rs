//! What a guest's kernel that checks itself (`cargo xtask lab --guest-kernel`, with DMA_API_DEBUG) found wrong: in its log, and in what it counts.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// How each report of a fault starts: `WARN`, lockdep, RCU; oopses, KASAN, sleeping where that is forbidden. Not those of the watchdogs: they
/// see how slow the emulation is.
const SIGNS: [&str; 3] = ["WARNING: ", "BUG: ", "Internal error: "];
/// Reports of DMA_API_DEBUG that are shown in full; the kernel's own number is one.
const DMA_REPORTS: &str = "20";

/// Has a kernel with DMA_API_DEBUG report more than the first fault.
pub fn say_more(debugfs: &Path) -> Result<()> {
    let Some(folder) = dma_debug(debugfs) else { return Ok(()) };
    fs::write(folder.join("num_errors"), DMA_REPORTS).context("cannot set up DMA_API_DEBUG")
}

/// Fails if such a kernel found anything wrong since its start.
pub fn check(debugfs: &Path) -> Result<()> {
    let faults = faults(debugfs)?;
    ensure!(faults.is_empty(), "the guest's kernel found faults, its console has the reports: {faults:?}");
    let Some(folder) = dma_debug(debugfs) else { return Ok(()) };
    let read = |name: &str| {
        let text = fs::read_to_string(folder.join(name));
        text.with_context(|| format!("DMA_API_DEBUG has no {name}"))
    };
    let errors = read("error_count")?;
    ensure!(errors.trim() == "0", "DMA_API_DEBUG counted {} faults", errors.trim());
    ensure!(read("disabled")?.trim() == "N", "DMA_API_DEBUG ran out of memory and sees nothing any more");
    Ok(())
}

/// Where DMA_API_DEBUG shows itself, in a kernel that has it.
fn dma_debug(debugfs: &Path) -> Option<PathBuf> {
    let folder = debugfs.join("dma-api");
    folder.is_dir().then_some(folder)
}

/// The first line of each report in the log of such a kernel. Others are not looked at: what their drivers warn of is not ours.
pub fn faults(debugfs: &Path) -> Result<Vec<String>> {
    if dma_debug(debugfs).is_none() {
        return Ok(Vec::new());
    }
    let mut log = fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .context("cannot open /dev/kmsg")?;
    let (mut found, mut record) = (Vec::new(), vec![0; 8192]);
    loop {
        match log.read(&mut record) {
            Ok(0) => return Ok(found),
            Ok(count) => found.extend(fault(&String::from_utf8_lossy(&record[..count]))),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EAGAIN) => return Ok(found),
                // The oldest records were overwritten: reading goes on with the next.
                Some(Errno::EPIPE) => {}
                _ => return Err(error).context("cannot read /dev/kmsg"),
            },
        }
    }
}

/// The message of a record (Linux, Documentation/ABI/testing/dev-kmsg), if it starts a report.
fn fault(record: &str) -> Option<String> {
    let message = record.split_once(';')?.1.lines().next()?;
    SIGNS.iter().any(|sign| message.starts_with(sign)).then(|| message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_told_from_what_else_is_said() {
        let of = |record| fault(record);
        assert_eq!(
            of("4,339,5140900,-;WARNING: CPU: 0 PID: 1 at kernel/dma/debug.c:1036\n SUBSYSTEM=x\n")
                .as_deref(),
            Some("WARNING: CPU: 0 PID: 1 at kernel/dma/debug.c:1036")
        );
        assert!(of("3,340,5140901,-;BUG: KASAN: slab-out-of-bounds in odma_map+0x1\n").is_some());
        assert!(of("0,341,5140902,-;watchdog: BUG: soft lockup - CPU#1 stuck for 22s!\n").is_none());
        assert!(of("6,342,5140903,-;DMA-API: debugging enabled by kernel config\n").is_none());
        assert!(of("6,343,5140904,-;a line; with WARNING: inside\n").is_none());
        assert!(of("rubbish").is_none());
    }
}
