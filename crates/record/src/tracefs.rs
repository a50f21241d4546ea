//! A tracing instance of our own under tracefs: made, set up, read, and removed, whatever happens.

use crate::error::Error;
use crate::event::{Printer, WANTED};
use crate::format::Format;
use crate::ring::Layout;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Instances are called this and the process number.
const PREFIX: &str = "outboard-";
/// The kernel's buffers together, MiB, and the bounds for each CPU.
const TOTAL_MIB: u32 = 256;
const EACH_MIB: (u32, u32) = (4, 32);

/// What the kernel lost because nobody read fast enough.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost(pub(crate) u64);

/// The instance. Dropping it ends the tracing.
pub(crate) struct Instance {
    folder: PathBuf,
    /// By event number.
    pub(crate) printers: HashMap<u16, Printer>,
    pub(crate) layout: Layout,
    /// MiB for each CPU.
    pub(crate) buffer_mib: u32,
}

impl Instance {
    /// Makes and sets up an instance that records nothing yet.
    pub(crate) fn new(device: Option<&str>, buffer_mib: Option<u32>) -> Result<Self, Error> {
        let root = mounted()?;
        events_exist(&root)?;
        let instances = root.join("instances");
        remove_stale(&instances);
        let folder = instances.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&folder).map_err(|source| refused(&folder, source))?;
        // From here on dropping it cleans up.
        let mut instance =
            Self { folder, printers: HashMap::new(), layout: Layout::default(), buffer_mib: 0 };
        instance.set_up(device, buffer_mib)?;
        Ok(instance)
    }

    fn set_up(&mut self, device: Option<&str>, buffer_mib: Option<u32>) -> Result<(), Error> {
        self.write("tracing_on", "0")?;
        // What is lost is the newest, and counted; a reader must not race with the writer for a page.
        self.write("options/overwrite", "0")?;
        // One clock for all CPUs: events are put into one order.
        self.write("trace_clock", "mono")?;
        let cpus = u32::try_from(self.cpus()?.len()).unwrap_or(u32::MAX).max(1);
        self.buffer_mib = buffer_mib.unwrap_or((TOTAL_MIB / cpus).clamp(EACH_MIB.0, EACH_MIB.1));
        self.write("buffer_size_kb", &(u64::from(self.buffer_mib) << 10).to_string())?;
        let header = Format::parse(&self.read("events/header_page")?);
        let unknown = |what: &str, detail: String| Error::Unknown { what: what.to_owned(), detail };
        self.layout = Layout::new(&header).ok_or_else(|| {
            unknown("ring buffer", "no timestamp, commit and data in events/header_page".into())
        })?;
        for name in WANTED {
            let event = format!("events/dma/{name}");
            if !self.folder.join(&event).is_dir() {
                continue;
            }
            let format = Format::parse(&self.read(&format!("{event}/format"))?);
            let printer = Printer::new(name, &format)
                .map_err(|field| unknown(&format!("event {name}"), format!("it has no field {field}")))?;
            self.printers.insert(format.id, printer);
            if let Some(device) = device {
                self.write(&format!("{event}/filter"), &format!("device == \"{device}\""))?;
            }
            self.write(&format!("{event}/enable"), "1")?;
        }
        Ok(())
    }

    /// Starts or stops the recording.
    pub(crate) fn switch(&self, on: bool) -> Result<(), Error> {
        self.write("tracing_on", if on { "1" } else { "0" })
    }

    /// Each CPU's number and its raw buffer.
    pub(crate) fn buffers(&self) -> Result<Vec<(usize, File)>, Error> {
        let mut buffers = Vec::new();
        for cpu in self.cpus()? {
            let path = self.folder.join(format!("per_cpu/cpu{cpu}/trace_pipe_raw"));
            let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&path);
            buffers.push((cpu, file.map_err(|source| trace("open", &path, source))?));
        }
        Ok(buffers)
    }

    /// What was lost so far.
    pub(crate) fn lost(&self) -> Result<Lost, Error> {
        let mut lost = 0;
        for cpu in self.cpus()? {
            lost += parse_lost(&self.read(&format!("per_cpu/cpu{cpu}/stats"))?);
        }
        Ok(Lost(lost))
    }

    fn cpus(&self) -> Result<Vec<usize>, Error> {
        let folder = self.folder.join("per_cpu");
        let entries = fs::read_dir(&folder).map_err(|source| trace("read", &folder, source))?;
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut cpus: Vec<usize> =
            names.filter_map(|name| name.strip_prefix("cpu").and_then(|n| n.parse().ok())).collect();
        cpus.sort_unstable();
        Ok(cpus)
    }

    fn read(&self, name: &str) -> Result<String, Error> {
        let path = self.folder.join(name);
        // Large reads: the kernel gives the page header's description to the first read and nothing to the next.
        let read = |mut file: File| {
            let (mut text, mut part) = (Vec::new(), vec![0; 1 << 16]);
            loop {
                match io::Read::read(&mut file, &mut part)? {
                    0 => return Ok(String::from_utf8_lossy(&text).into_owned()),
                    read => text.extend(&part[..read]),
                }
            }
        };
        File::open(&path).and_then(read).map_err(|source| trace("read", &path, source))
    }

    fn write(&self, name: &str, value: &str) -> Result<(), Error> {
        let path = self.folder.join(name);
        // The kernel judges each write by itself: one write, no truncation.
        let file = OpenOptions::new().write(true).open(&path);
        file.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
            .map_err(|source| trace("write to", &path, source))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.write("tracing_on", "0");
        let _ = self.write("events/dma/enable", "0");
        // Removing the instance frees its buffers. The kernel says busy while one of its files is open.
        if let Err(error) = fs::remove_dir(&self.folder) {
            let folder = self.folder.display();
            outboard_cli::say!(
                "outboard: the tracing instance {folder} stays: {error}; remove it with: rmdir {folder}"
            );
        }
    }
}

fn trace(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Trace { what, path: path.to_owned(), source }
}

/// Why the first thing that needs rights failed.
fn refused(path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::PermissionDenied if !nix::unistd::geteuid().is_root() => {
            Error::NotRoot { path, source }
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::Refused { path, source }
        }
        _ => Error::Trace { what: "create", path, source },
    }
}

/// Where tracefs is mounted: its usual place, or any other.
fn mounted() -> Result<PathBuf, Error> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let found = find_tracefs(&mounts);
    let usable = found.into_iter().find(|path| path.join("events").exists() || !readable(path));
    usable.ok_or_else(|| {
        let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let tracing = known.lines().any(|line| line.ends_with("\ttracefs"));
        if tracing { Error::NoTracefs } else { Error::NoTracing { release: release() } }
    })
}

/// Without rights not even its content shows; then the rights are what is missing, not tracefs.
fn readable(path: &Path) -> bool {
    !fs::read_dir(path).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

fn find_tracefs(mounts: &str) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        if let (Some(path), Some("tracefs")) = (words.next(), words.next()) {
            paths.push(PathBuf::from(path.replace("\\040", " ")));
        }
    }
    paths
}

fn events_exist(root: &Path) -> Result<(), Error> {
    let path = root.join("events/dma");
    match fs::metadata(&path) {
        Ok(_) => return Ok(()),
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
            return Err(refused(&path, source));
        }
        Err(_) => {}
    }
    let release = release();
    if old(&release) { Err(Error::TooOld { release }) } else { Err(Error::NoEvents { release, path }) }
}

/// The running kernel's release.
pub(crate) fn release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_else(|_| "of unknown release".into())
}

/// Whether a release is older than 6.12, which brought the events.
fn old(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    (numbers.next().unwrap_or(u32::MAX), numbers.next().unwrap_or(0)) < (6, 12)
}

/// Removes instances whose process is gone: it was killed before it could.
fn remove_stale(instances: &Path) {
    for entry in fs::read_dir(instances).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(PREFIX).and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if !Path::new("/proc").join(pid.to_string()).exists() {
            let _ = fs::write(entry.path().join("tracing_on"), "0");
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// `overrun` (oldest lost), `dropped events` (newest lost) and `commit overrun` (lost in nested writes) of a `stats` file.
fn parse_lost(stats: &str) -> u64 {
    let counts = ["overrun", "dropped events", "commit overrun"];
    let number = |line: &str| {
        let (name, number) = line.split_once(':')?;
        counts.contains(&name.trim()).then(|| number.trim().parse::<u64>().ok())?
    };
    stats.lines().filter_map(number).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_events_are_counted() {
        let stats = "entries: 7\noverrun: 3\ncommit overrun: 2\nbytes: 99\noldest event ts: 1.0\n\
            now ts: 2.0\ndropped events: 40\nread events: 5\n";
        assert_eq!(parse_lost(stats), 45);
        assert_eq!(parse_lost(""), 0);
    }

    #[test]
    fn kernels_too_old() {
        for release in ["6.1.0-56-arm64", "6.11.4", "5.15.0-generic"] {
            assert!(old(release), "{release}");
        }
        for release in ["6.12.117+deb12-arm64", "6.18.44-fc-v669", "7.0.0-14-generic", "10.1", "?"] {
            assert!(!old(release), "{release}");
        }
    }

    #[test]
    fn tracefs_is_found_where_it_is() {
        let mounts = "proc /proc proc rw 0 0\nnodev /sys/kernel/tracing tracefs rw 0 0\ntrace /my\\040dir tracefs rw 0 0\n";
        assert_eq!(find_tracefs(mounts), [Path::new("/sys/kernel/tracing"), Path::new("/my dir")]);
    }
}
