//! Files that grow with what a guest or a log says, kept to a size.

use crate::descriptor::write_all;
use crate::size::{KIB, MIB, parse_size};
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Size at which a file is put aside unless the user says otherwise.
const DEFAULT_LIMIT: u64 = 64 * MIB;
/// Smallest size a user may give: below it there would be more files than lines.
const LEAST_LIMIT: u64 = 64 * KIB;

/// A file for output, as users name it: `PATH[,limit=SIZE|off]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTarget {
    /// The file.
    pub path: PathBuf,
    /// Bytes at which it becomes `PATH.1` and a new one begins; `None` for never.
    pub limit: Option<u64>,
}

impl FromStr for FileTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Only a known ending is taken off, so that a path may hold commas.
        let (path, limit) = match text.rsplit_once(",limit=") {
            None => (text, Some(DEFAULT_LIMIT)),
            Some((path, "off")) => (path, None),
            Some((path, size)) => {
                let limit = parse_size(size, MIB)?;
                if limit < LEAST_LIMIT {
                    return Err(format!("limit={size} is too small: give 64K or more, or off"));
                }
                (path, Some(limit))
            }
        };
        if path.is_empty() {
            return Err("no path is given; write PATH[,limit=SIZE|off]".into());
        }
        Ok(Self { path: path.into(), limit })
    }
}

impl fmt::Display for FileTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        match self.limit {
            Some(DEFAULT_LIMIT) => Ok(()),
            Some(limit) => write!(f, ",limit={}K", limit / KIB),
            None => f.write_str(",limit=off"),
        }
    }
}

/// How a file begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Emptied.
    Empty,
    /// After what it has.
    Append,
}

/// An open file for output. What it had stays until [`RotatingFile::begin`]; one that was made and never begun is removed again.
#[derive(Debug)]
pub struct RotatingFile {
    file: File,
    target: FileTarget,
    written: u64,
    is_new: bool,
}

impl RotatingFile {
    /// Opens `target`, and makes it if it is not there. What is no file (a terminal, a pipe) has no limit.
    ///
    /// # Errors
    /// The operating system's; a pipe that nobody reads.
    pub fn open(target: &FileTarget) -> io::Result<Self> {
        let mut target = target.clone();
        let mut options = OpenOptions::new();
        options.append(true);
        let is_special = fs::metadata(&target.path).is_ok_and(|found| !found.is_file() && !found.is_dir());
        let (file, is_new) = if is_special {
            target.limit = None;
            // A pipe without a reader would keep us waiting for one.
            options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
            (options.open(&target.path).map_err(|error| explain(&target.path, error))?, false)
        } else {
            match options.clone().create_new(true).open(&target.path) {
                Ok(file) => (file, true),
                // Without O_EXCL also where a link leads nowhere.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    (options.create(true).open(&target.path)?, false)
                }
                Err(error) => return Err(error),
            }
        };
        Ok(Self { file, target, written: 0, is_new })
    }

    /// Device and inode, by which it can be told apart from other files.
    ///
    /// # Errors
    /// The operating system's.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        self.file.metadata().map(|found| (found.dev(), found.ino()))
    }

    /// From here on it is written.
    ///
    /// # Errors
    /// The operating system's.
    pub fn begin(&mut self, how: Begin) -> io::Result<()> {
        self.is_new = false;
        let found = self.file.metadata()?;
        if how == Begin::Empty && found.is_file() {
            self.file.set_len(0)?;
        }
        self.written = if how == Begin::Append && found.is_file() { found.len() } else { 0 };
        Ok(())
    }

    /// Writes all of `data`, into a new file if this one would become too large. Returns how much was written, and the error that ended it.
    pub(crate) fn write(&mut self, data: &[u8]) -> (usize, io::Result<()>) {
        let is_full = self.written > 0
            && self.target.limit.is_some_and(|limit| self.written + data.len() as u64 > limit);
        if is_full && let Err(error) = self.rotate() {
            // A folder that may not be changed, or a full disk: what is new counts more than what is old.
            tracing::warn!(
                "{} starts over, since it cannot be put aside as {}.1: {error}",
                self.target.path.display(),
                self.target.path.display()
            );
            if let Err(error) = self.file.set_len(0) {
                return (0, Err(error));
            }
            self.written = 0;
        }
        let (done, result) = write_all(&self.file, data);
        self.written += done as u64;
        (done, result)
    }

    /// Puts the file aside as `PATH.1`, in place of the one before, and begins a new one. Until that is open nothing has changed.
    fn rotate(&mut self) -> io::Result<()> {
        let path = &self.target.path;
        let ours = self.identity()?;
        let is_ours = fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == ours);
        if !is_ours {
            // Somebody else has put it aside, logrotate for instance: go on in what is there now.
            self.file = OpenOptions::new().append(true).create(true).open(path)?;
            self.written = self.file.metadata()?.len();
            return Ok(());
        }
        let (fresh, aside) = (with_ending(path, ".new"), with_ending(path, ".1"));
        let file = OpenOptions::new().append(true).create_new(true).open(&fresh)?;
        let swapped = self
            .file
            .metadata()
            .and_then(|found| file.set_permissions(found.permissions()))
            .and_then(|()| fs::rename(path, &aside))
            .and_then(|()| fs::rename(&fresh, path));
        if let Err(error) = swapped {
            let _ = fs::remove_file(&fresh);
            return Err(error);
        }
        self.file = file;
        self.written = 0;
        Ok(())
    }
}

impl Drop for RotatingFile {
    fn drop(&mut self) {
        if self.is_new {
            // It may be gone already.
            let _ = fs::remove_file(&self.target.path);
        }
    }
}

/// Writes `data` to the file at `path`, which keeps what it had if that fails. What is no file is just written to.
///
/// # Errors
/// The operating system's.
pub fn replace_file(path: &Path, data: &[u8]) -> io::Result<()> {
    // Through links, so that they stay what they are.
    let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if fs::metadata(&place).is_ok_and(|found| !found.is_file()) {
        return fs::write(&place, data);
    }
    let fresh = with_ending(&place, &format!(".{}.new", std::process::id()));
    let written = OpenOptions::new().write(true).create_new(true).open(&fresh).and_then(|mut file| {
        if let Ok(found) = fs::metadata(&place) {
            file.set_permissions(found.permissions())?;
        }
        file.write_all(data)
    });
    let replaced = written.and_then(|()| fs::rename(&fresh, &place));
    if replaced.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    replaced
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

fn explain(path: &Path, error: io::Error) -> io::Error {
    let is_pipe = fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
    if error.raw_os_error() == Some(libc::ENXIO) && is_pipe {
        return io::Error::new(error.kind(), "it is a pipe that nobody reads; start its reader first");
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(path: &Path, limit: Option<u64>) -> FileTarget {
        FileTarget { path: path.to_owned(), limit }
    }

    #[test]
    fn targets_are_a_path_with_a_known_ending() {
        let parse = |text: &str| text.parse::<FileTarget>();
        assert_eq!(parse("a,b").unwrap(), target(Path::new("a,b"), Some(DEFAULT_LIMIT)));
        assert_eq!(parse("a,limit=off").unwrap().limit, None);
        assert_eq!(parse("a,limit=1M").unwrap().limit, Some(MIB));
        for text in ["a", "a,limit=off", "a,limit=1024K"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        for text in ["", ",limit=1M", "a,limit=", "a,limit=0", "a,limit=1K", "a,limit=512iB", "a,limit=on"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_file_is_kept_to_its_size_and_loses_only_the_oldest() {
        let folder = tempfile::tempdir().unwrap();
        let (path, aside) = (folder.path().join("log"), folder.path().join("log.1"));
        fs::write(&path, "before\n").unwrap();
        let mut file = RotatingFile::open(&target(&path, Some(100))).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"before\n", "nothing is lost by looking");
        file.begin(Begin::Append).unwrap();
        let line = |n: u32| format!("{n:030}\n");
        for n in 0..10 {
            file.write(line(n).as_bytes()).1.unwrap();
        }
        // 7 and 3 times 31 bytes are 100 and go into the first; then three at a time.
        assert_eq!(fs::read_to_string(&aside).unwrap(), (6..9).map(line).collect::<String>());
        assert_eq!(fs::read_to_string(&path).unwrap(), line(9));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_file_that_cannot_be_put_aside_starts_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = RotatingFile::open(&target(&path, Some(100))).unwrap();
        file.begin(Begin::Empty).unwrap();
        // In the way of the new file.
        fs::create_dir(folder.path().join("log.new")).unwrap();
        for _ in 0..5 {
            file.write(&[b'x'; 60]).1.unwrap();
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 60);
    }

    #[test]
    fn what_was_never_begun_leaves_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        drop(RotatingFile::open(&target(&path, None)).unwrap());
        assert!(!path.exists());
        fs::write(&path, "old").unwrap();
        drop(RotatingFile::open(&target(&path, None)).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let mut file = RotatingFile::open(&target(&path, None)).unwrap();
        file.begin(Begin::Empty).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert!(RotatingFile::open(&target(&folder.path().join("missing/x"), None)).is_err());
        assert!(RotatingFile::open(&target(folder.path(), None)).is_err());
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("x"), folder.path().join("link"));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        replace_file(&path, b"one").unwrap();
        replace_file(&link, b"two").unwrap();
        assert_eq!((fs::read(&path).unwrap(), link.is_symlink()), (b"two".to_vec(), true));
        let missing = folder.path().join("missing/x");
        assert!(replace_file(&missing, b"three").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_an_error_and_not_a_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        let error = RotatingFile::open(&target(&path, Some(100))).unwrap_err();
        assert!(error.to_string().contains("nobody reads"), "{error}");
    }
}
