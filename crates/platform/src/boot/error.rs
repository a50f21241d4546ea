use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Why a guest's boot files cannot be used. Each message names the file and the next step.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Missing, not permitted, not a file, or the disk failed.
    #[error("{what} {}: {source}; check the path given with --{what}", path.display())]
    Unreadable {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A directory, socket or the like.
    #[error("{what} {}: not a regular file; give --{what} the path of a file", path.display())]
    NotAFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A kernel for another processor.
    #[error("kernel {}: this is {found}; Outboard runs arm64 guests, give an arm64 `Image` (Debian: linux-image-arm64)", path.display())]
    WrongArchitecture {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// Not a kernel in any format known here.
    #[error(
        "kernel {}: {found}; give an arm64 `Image`, plain or gzip-compressed, or an EFI zboot image (Debian: /boot/vmlinuz-*)",
        path.display()
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
    },
    /// The file ends before the kernel does.
    #[error("kernel {}: the file has {has} bytes, its header says {needs}; it is truncated, copy or download it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that the header promises.
        needs: u64,
        /// Bytes there are.
        has: u64,
    },
    /// The compressed payload cannot be unpacked.
    #[error("kernel {}: its {format} payload is corrupt ({reason}); copy or download it again", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// `gzip` or `zstd`.
        format: &'static str,
        /// The decoder's words.
        reason: String,
    },
    /// It does not fit into RAM.
    #[error("{what} needs {} MiB, the guest has {} MiB; give more --memory", needs.div_ceil(1 << 20), ram >> 20)]
    NoRoom {
        /// What does not fit.
        what: &'static str,
        /// Bytes needed.
        needs: u64,
        /// Bytes there are.
        ram: u64,
    },
    /// Our own layout points outside RAM.
    #[error("guest address {address:#x} is outside RAM; this is a bug in Outboard, please report it")]
    OutsideRam {
        /// The address.
        address: u64,
    },
}

/// Opens a regular file and tells its length.
pub(super) fn open_file(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let unreadable = |source| BootError::Unreadable { what, path: path.to_owned(), source };
    // Looked at before opening: opening a FIFO would wait for its other end.
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(BootError::NotAFile { what, path: path.to_owned() });
    }
    Ok((File::open(path).map_err(unreadable)?, metadata.len()))
}
