//! The PCI functions of this host: what there is, whether a guest can have it, and taking it from the host's driver and back.
//!
//! Everything is read below a root folder, so tests bring a host of their own.

mod bind;
mod enumerate;
mod names;
#[cfg(target_os = "linux")]
mod open;
mod refusal;
#[cfg(test)]
mod tests;
mod usage;

pub use enumerate::{BarInfo, BarSpace, Function};
pub use names::Names;
#[cfg(target_os = "linux")]
pub use open::Opened;
pub use refusal::Refusal;

use std::io;
use std::path::{Path, PathBuf};

/// The driver that hands a function over.
pub const VFIO_DRIVER: &str = "vfio-pci";

/// A host, as its sysfs and proc tell.
pub struct Host {
    root: PathBuf,
    writer: Box<dyn SysfsWriter>,
}

/// Writes to sysfs, where a write makes the kernel do something.
pub trait SysfsWriter: Send + Sync {
    /// Writes `text` to the existing file at `path`.
    ///
    /// # Errors
    /// The kernel's.
    fn write(&self, path: &Path, text: &str) -> io::Result<()>;
}

/// Writes to the files themselves.
struct Files;

impl SysfsWriter for Files {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        use std::io::Write;
        // Never creates: a file that sysfs does not have is one that the kernel does not know.
        std::fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
    }
}

impl Host {
    /// The host that this process runs on.
    ///
    /// # Errors
    /// [`Refusal::NotYet`] where Outboard cannot hand out PCI devices yet.
    pub fn this() -> Result<Self, Refusal> {
        if cfg!(target_os = "linux") {
            Ok(Self::at(Path::new("/"), Box::new(Files)))
        } else {
            Err(Refusal::NotYet)
        }
    }

    /// A host whose files are below `root`.
    pub fn at(root: &Path, writer: Box<dyn SysfsWriter>) -> Self {
        Self { root: root.to_owned(), writer }
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// Folder of a function in sysfs.
    fn function_path(&self, address: crate::PciAddress) -> PathBuf {
        self.path("sys/bus/pci/devices").join(address.to_string())
    }

    fn write(&self, path: &Path, text: &str) -> Result<(), Refusal> {
        self.writer.write(path, text).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => Refusal::Denied { path: path.to_owned() },
            _ => Refusal::Sysfs { path: path.to_owned(), source },
        })
    }
}

/// Names of the entries of a folder, sorted; none if it is not there.
fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return vec![] };
    let mut names: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// A small file's text without the space around it; empty if it is not there.
fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Last part of where a link points to.
fn link_name(path: &Path) -> Option<String> {
    Some(std::fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}
