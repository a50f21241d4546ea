use std::io;
use std::path::PathBuf;

/// A disk image that cannot be opened as it was asked for. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is nothing at the path.
    #[error("disk image {} does not exist: check the path, or create one with `truncate -s 20G {}`", .0.display(), .0.display())]
    NotFound(PathBuf),
    /// The path is a directory.
    #[error("{} is a directory, not a disk image: name a file or a block device", .0.display())]
    IsDirectory(PathBuf),
    /// The path is a terminal, a socket, or the like.
    #[error("{} is neither a file nor a block device: name one of these", .0.display())]
    NotADisk(PathBuf),
    /// The image must not be written.
    #[error("disk image {} is read-only: make it writable (chmod u+w) or open it with `:ro`", .0.display())]
    ReadOnly(PathBuf),
    /// The image must not even be read.
    #[error("no permission to read disk image {}: check its owner and mode", .0.display())]
    Permission(PathBuf),
    /// Another process or another disk of this VM has it open.
    #[error("disk image {} is in use: stop the VM that uses it, or open it read-only in both", .0.display())]
    InUse(PathBuf),
    /// Nothing in the image.
    #[error("disk image {} is empty: give it a size with `truncate -s 20G {}`", .0.display(), .0.display())]
    Empty(PathBuf),
    /// A raw image that is not a whole number of sectors.
    #[error(
        "raw disk image {} has {len} bytes, which is not a multiple of 512: it may be truncated; \
         if not, round it up with `truncate -s %512 {}`", .path.display(), .path.display()
    )]
    BadSize {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        len: u64,
    },
    /// The name says qcow2, the content does not.
    #[error(
        "{} is called qcow2 but does not start like one: it may be damaged; if it is a raw image, say `format=raw`",
        .0.display()
    )]
    NotQcow2(PathBuf),
    /// The content says qcow2, the name does not.
    #[error(
        "{} starts like a qcow2 image but is not called .qcow2, and a guest could have written that into a raw \
         image: say `format=qcow2` or `format=raw`", .0.display()
    )]
    LooksLikeQcow2(PathBuf),
    /// Another program's format.
    #[error("{} is in a format that is not supported: convert it with `qemu-img convert -O qcow2 {} disk.qcow2`",
        .0.display(), .0.display())]
    UnknownFormat(PathBuf),
    /// A qcow2 image whose structure is wrong.
    #[error("qcow2 image {} is damaged or truncated: look at it with `qemu-img check {}`", .path.display(), .path.display())]
    BadQcow2 {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// A backing file is not there.
    #[error(
        "backing file {} of {} does not exist: put it back, or point the image at its new place with \
         `qemu-img rebase -u`", .backing.display(), .image.display()
    )]
    BackingNotFound {
        /// The image that names it.
        image: PathBuf,
        /// The missing file.
        backing: PathBuf,
    },
    /// The chain of backing files comes back to where it was.
    #[error(
        "backing file {} of {} leads back to itself: point the image at the right one with `qemu-img rebase -u`",
        .backing.display(), .image.display()
    )]
    BackingCycle {
        /// The image whose backing file was seen before.
        image: PathBuf,
        /// That file.
        backing: PathBuf,
    },
    /// A chain of more than [`super::MAX_BACKING_FILES`] files.
    #[error(
        "{} has more than {} backing files behind it: merge some with `qemu-img commit` or `qemu-img rebase`",
        .0.display(), super::MAX_BACKING_FILES
    )]
    BackingTooDeep(PathBuf),
    /// The image does not say what its backing file is, or says something else than raw and qcow2.
    #[error(
        "{} does not say whether its backing file is raw or qcow2 (it says {format}): record it with \
         `qemu-img rebase -u -b BACKING -F raw|qcow2 {}`", .image.display(), .image.display()
    )]
    BackingFormat {
        /// The image that names the backing file.
        image: PathBuf,
        /// What it says.
        format: String,
    },
    /// A qcow2 image that keeps its data elsewhere.
    #[error("{} keeps its data in an external data file, which is not supported: convert it with `qemu-img convert`",
        .0.display())]
    ExternalData(PathBuf),
    /// The operating system's answer.
    #[error("cannot {action} {}", .path.display())]
    Host {
        /// What failed.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
