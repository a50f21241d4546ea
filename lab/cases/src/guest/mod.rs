//! What the guest half of a case works with.

pub mod config;
pub mod disk;
pub mod dma;
pub mod dma_device;
pub mod dma_trace;
pub mod function;
pub mod input;
pub mod kernel_log;
pub mod kexec;
mod mmio;
pub mod net;
pub mod nvme;
pub mod nvme_ioctl;
pub mod pci;
pub mod pressure;
pub mod published;
pub mod sound;
pub mod virtio;
pub mod vsock;

use crate::protocol::{GuestLine, MARK};
use anyhow::{Context, Result, bail};
use nix::kmod::{DeleteModuleFlags, ModuleInitFlags, delete_module, finit_module};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::reboot::RebootMode;
use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

/// In the initramfs: which modules a module needs, in the order in which they load (written by `xtask`).
const MODULE_LIST: &str = "/etc/modules.load";

/// The guest, as its init sees it.
pub struct Guest {
    args: HashMap<String, String>,
    /// Whether the case looks at the DMA module's statistics itself.
    own_dma_check: bool,
}

impl Guest {
    /// From the kernel's command line.
    pub fn new(cmdline: &str) -> Self {
        let args = cmdline
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("lab.")?.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Self { args, own_dma_check: false }
    }

    /// The value that the host half gave for `key`.
    pub fn arg(&self, key: &str) -> Result<&str> {
        let value = self.args.get(key).map(String::as_str);
        value.with_context(|| format!("the host half gave no '{key}'"))
    }

    /// The number that the host half gave for `key`.
    pub fn number(&self, key: &str) -> Result<u64> {
        self.arg(key)?.parse().with_context(|| format!("'{key}' is no number"))
    }

    /// Tells the host half a fact.
    pub fn note(&self, key: &str, value: impl Into<serde_json::Value>) {
        say(&GuestLine::Note(key.into(), value.into()));
    }

    /// Unloads a module.
    pub fn unload(&self, name: &str) -> Result<()> {
        let c_name = std::ffi::CString::new(name)?;
        delete_module(&c_name, DeleteModuleFlags::O_NONBLOCK)
            .with_context(|| format!("cannot unload the module {name}"))?;
        Ok(())
    }

    /// The case looks at the DMA module's statistics itself, and they need not show that all went well.
    pub fn check_dma_myself(&mut self) {
        self.own_dma_check = true;
    }

    /// Reboots; does not come back.
    pub fn reboot(&self) -> Result<()> {
        drain_console();
        let never = nix::sys::reboot::reboot(RebootMode::RB_AUTOBOOT).context("cannot reboot")?;
        match never {}
    }

    /// A line typed on the console.
    pub fn read_line(&self) -> Result<String> {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).context("cannot read the console")?;
        Ok(line.trim().to_owned())
    }

    /// A line typed on the console within `limit`.
    pub fn line_within(&self, limit: Duration) -> Result<Option<String>> {
        let stdin = std::io::stdin();
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(limit).context("the limit is too long")?;
        if poll(&mut fds, timeout)? == 0 { Ok(None) } else { self.read_line().map(Some) }
    }

    /// Loads a module that must be there.
    pub fn need(&mut self, name: &str) -> Result<()> {
        if !load_module(name)? {
            bail!("{MODULE_LIST} has no module {name}");
        }
        Ok(())
    }
}

/// Loads a module of the kernel and what it needs. A module that this kernel has built in, or does not have, is `Ok(false)`.
pub fn load_module(name: &str) -> Result<bool> {
    let list = fs::read_to_string(MODULE_LIST).with_context(|| format!("cannot read {MODULE_LIST}"))?;
    let Some(files) = list.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')) else {
        return Ok(false);
    };
    files.split_whitespace().try_for_each(load_file)?;
    Ok(true)
}

/// The same, but for the module's own file, which is left to the caller: its path.
pub fn load_needs_of(name: &str) -> Result<String> {
    let list = fs::read_to_string(MODULE_LIST).with_context(|| format!("cannot read {MODULE_LIST}"))?;
    let files = list.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let mut files: Vec<&str> =
        files.with_context(|| format!("no module {name}"))?.split_whitespace().collect();
    let own = files.pop().with_context(|| format!("{name} has no file"))?;
    files.into_iter().try_for_each(load_file)?;
    Ok(own.to_owned())
}

/// Loads one module file; one that is there already is left as it is.
pub fn load_file(path: &str) -> Result<()> {
    let file = fs::File::open(path).with_context(|| format!("cannot open the module {path}"))?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot load the module {path}")),
    }
}

/// Prints a line for the host half. Starts on a line of its own, whatever is on the console, and is one write.
pub fn say(line: &GuestLine) {
    let json = serde_json::to_string(line).expect("guest lines serialize");
    let text = format!("\n{MARK}{json}\n");
    let mut console = std::io::stdout().lock();
    // If the console is gone there is nobody to tell.
    let _ = console.write_all(text.as_bytes());
    let _ = console.flush();
}

/// Waits until the kernel has given everything printed so far to the serial port. To be called before the end of the machine, which
/// does not wait for it: Linux 6.12 leaves a line that is written while the idle port wakes up (`serial_port_runtime_resume`) in its buffer
/// until the port goes idle again, half a second later.
pub fn drain_console() {
    // On what is no terminal there is nothing to wait for.
    let _ = nix::sys::termios::tcdrain(std::io::stdout());
}

/// Waits until `test` gives a value.
pub fn wait_for<T>(what: &str, limit: Duration, mut test: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = test() {
            return Ok(value);
        }
        if Instant::now() > deadline {
            bail!("no {what} after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a program of busybox and returns what it printed.
pub fn busybox(args: &[&str]) -> Result<String> {
    let output = Command::new("/bin/busybox").args(args).output().context("cannot start busybox")?;
    if !output.status.success() {
        bail!("busybox {}: {}", args.join(" "), crate::host::describe(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_come_from_the_command_line() {
        let guest = Guest::new("console=ttyAMA0 quiet lab.case=demo lab.stage=2 lab.url=http://a/?b=c");
        assert_eq!(guest.arg("case").expect("there"), "demo");
        assert_eq!(guest.number("stage").expect("a number"), 2);
        assert_eq!(guest.arg("url").expect("there"), "http://a/?b=c");
        assert!(guest.arg("console").is_err());
        assert!(guest.number("case").is_err());
    }
}
