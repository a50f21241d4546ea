use std::io;
use std::path::PathBuf;

/// What is wrong inside an image, as the end of a sentence that begins with the image's name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Fault(pub String);

/// A disk image that cannot be opened as it was asked for. Each message says what to do; what lies behind it is its source.
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
    /// The block device takes no writes.
    #[error("block device {} is read-only: open it with `:ro`, or make it writable with `blockdev --setrw {}`", .0.display(), .0.display())]
    ReadOnlyDevice(PathBuf),
    /// The image must not even be read.
    #[error("no permission to read disk image {}: check its owner and mode", .0.display())]
    Permission(PathBuf),
    /// Another process or another disk of this VM has it open.
    #[error(
        "disk image {} is in use ({by}): stop the program that uses it, or open it read-only in both", .path.display()
    )]
    InUse {
        /// The image.
        path: PathBuf,
        /// Whose lock it is, as far as can be told.
        by: &'static str,
    },
    /// The host itself uses the block device, the disk that it is a part of, or a part of it.
    #[error("block device {} is in use by the host: {by}", .path.display())]
    DeviceInUse {
        /// The device.
        path: PathBuf,
        /// Mount points and the like, and what to do.
        by: String,
    },
    /// Nothing in the image.
    #[error("disk image {} is empty: give it a size with `truncate -s 20G {}`", .0.display(), .0.display())]
    Empty(PathBuf),
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
    #[error("{} is a {format} image, which is not supported: convert it with `qemu-img convert -O qcow2 {} disk.qcow2`",
        .path.display(), .path.display())]
    UnknownFormat {
        /// The image.
        path: PathBuf,
        /// The format's name.
        format: String,
    },
    /// A qcow2 image that cannot be read without telling lies.
    #[error("qcow2 image {} is damaged or truncated: look at it with `qemu-img check {}`, and take it from a backup if it cannot be mended",
        .path.display(), .path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: Fault,
    },
    /// A qcow2 image that can be read, but in which a write could hit something else.
    #[error(
        "qcow2 image {} cannot be written to safely: copy it and mend it with `qemu-img check -r all {}`, or open it with `:ro`",
        .path.display(), .path.display()
    )]
    Unsound {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: Fault,
    },
    /// A qcow2 image whose tables take too long to be looked at.
    #[error(
        "qcow2 image {} is too large to be checked: convert it with `qemu-img convert -O qcow2 -o cluster_size=2M {} new.qcow2`, \
         or to a raw image", .path.display(), .path.display()
    )]
    TooLarge {
        /// The image.
        path: PathBuf,
        /// By which measure.
        source: Fault,
    },
    /// A qcow2 image that its last user did not close.
    #[error(
        "qcow2 image {} was not closed properly, so its refcounts may be wrong: mend it with `qemu-img check -r all {}`, or open it \
         with `:ro`", .0.display(), .0.display()
    )]
    Dirty(PathBuf),
    /// A qcow2 image that another program has found to be damaged.
    #[error(
        "qcow2 image {} is marked as corrupt: copy it and mend it with `qemu-img check -r all {}`, or open it with `:ro`",
        .0.display(), .0.display()
    )]
    MarkedCorrupt(PathBuf),
    /// A sound qcow2 image that uses what is not supported.
    #[error("qcow2 image {} {feature}, which is not supported: {help}", .path.display())]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What it has, as the end of a sentence.
        feature: String,
        /// The command that helps.
        help: String,
    },
    /// The image names a backing file, and the user did not.
    #[error(
        "{} names {} as its backing file, which a guest could then read: if you trust the image, allow it with \
         `backing={}` after the path of the disk", .image.display(), .backing.display(), .backing.display()
    )]
    BackingNotAllowed {
        /// The image that names it.
        image: PathBuf,
        /// The file that it names, relative to the folder of the image.
        backing: PathBuf,
    },
    /// The user named a backing file, the image another.
    #[error(
        "{} names {} as its backing file, but `backing={}` was given: give the name of that file, or point the image at yours with \
         `qemu-img rebase -u -b {} -F FORMAT {}`",
        .image.display(), .backing.display(), .given.display(), .given.display(), .image.display()
    )]
    BackingDiffers {
        /// The image that names it.
        image: PathBuf,
        /// The file that it names.
        backing: PathBuf,
        /// What the user named.
        given: PathBuf,
    },
    /// The user named a backing file, but there is none.
    #[error("{} has no backing file, but `backing={}` was given: leave that out", .image.display(), .given.display())]
    NoBacking {
        /// The image at the end of the chain.
        image: PathBuf,
        /// What the user named.
        given: PathBuf,
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
    /// The backing file is no file of the host.
    #[error(
        "{} gives its backing file as {kind} ({name}), and only files are supported: point it at one with \
         `qemu-img rebase -b FILE -F raw|qcow2 {}`", .image.display(), .image.display()
    )]
    BackingName {
        /// The image that names it.
        image: PathBuf,
        /// What it says.
        name: String,
        /// What that is.
        kind: String,
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
    /// The image does not say what its backing file is.
    #[error(
        "{} does not say whether its backing file is raw or qcow2: record it with \
         `qemu-img rebase -u -b BACKING -F raw|qcow2 {}`", .0.display(), .0.display()
    )]
    BackingFormatMissing(PathBuf),
    /// The backing file is an image of another program.
    #[error(
        "the backing file of {} is a {format} image, which is not supported: convert the whole with \
         `qemu-img convert -O qcow2 {} new.qcow2`", .image.display(), .image.display()
    )]
    BackingFormat {
        /// The image that names the backing file.
        image: PathBuf,
        /// What it says.
        format: String,
    },
    /// A qcow2 image that keeps its data elsewhere.
    #[error("{} keeps its data in another file ({data_file}), which is not supported: convert it with `qemu-img convert -O qcow2 {} new.qcow2`",
        .image.display(), .image.display())]
    ExternalData {
        /// The image.
        image: PathBuf,
        /// What it says about the other file.
        data_file: String,
    },
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
