//! Where the sockets are.

use crate::{Error, Name};
use rustix::process::geteuid;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The folder of this user's sockets: only the user may enter it, so whoever connects may do what the user may.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// This user's: `$XDG_RUNTIME_DIR/outboard`, `/run/outboard` for root, otherwise `/tmp/outboard-UID`. It need not be there.
    pub fn of_user() -> Self {
        let user = geteuid().as_raw();
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        // sudo may leave the variable of the user who called it: root's VMs are not that user's.
        let own = |path: &PathBuf| {
            path.is_absolute() && fs::metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == user)
        };
        Self(match runtime.filter(own) {
            Some(path) => path.join("outboard"),
            None if user == 0 && Path::new("/run").is_dir() => "/run/outboard".into(),
            None => format!("/tmp/outboard-{user}").into(),
        })
    }

    /// The folder at `path`.
    pub fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it if it is not there, and checks it.
    ///
    /// # Errors
    /// [`Error::Unsafe`], [`Error::File`].
    pub(crate) fn create(&self) -> Result<(), Error> {
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(Error::File { what: "creating", path: self.0.clone(), source })
            }
            _ => self.check().map(drop),
        }
    }

    /// Whether it is there; a folder in which somebody else could put a socket of theirs is refused.
    ///
    /// # Errors
    /// [`Error::Unsafe`], [`Error::File`].
    pub(crate) fn check(&self) -> Result<bool, Error> {
        // Not through a link: in /tmp anybody can have made one.
        let found = match fs::symlink_metadata(&self.0) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(Error::File { what: "looking at", path: self.0.clone(), source }),
        };
        let unsafe_because = |why| Err(Error::Unsafe { path: self.0.clone(), why });
        if !found.is_dir() {
            unsafe_because("is no folder")
        } else if found.uid() != geteuid().as_raw() {
            unsafe_because("belongs to another user")
        } else if found.mode() & 0o077 != 0 {
            unsafe_because("is open to other users")
        } else {
            Ok(true)
        }
    }

    /// Where the VM `name` listens.
    pub(crate) fn socket(&self, name: &Name) -> PathBuf {
        self.0.join(format!("{name}.sock"))
    }

    /// What the VM `name` keeps locked while it runs.
    pub(crate) fn lock(&self, name: &Name) -> PathBuf {
        self.0.join(format!("{name}.lock"))
    }

    /// Names that have a socket, sorted; whether somebody listens there is another question.
    pub(crate) fn names(&self) -> Result<Vec<Name>, Error> {
        if !self.check()? {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&self.0).map_err(|source| Error::File {
            what: "reading",
            path: self.0.clone(),
            source,
        })?;
        let name = |file: std::ffi::OsString| file.to_str()?.strip_suffix(".sock")?.parse().ok();
        let mut names: Vec<Name> = entries.flatten().filter_map(|entry| name(entry.file_name())).collect();
        names.sort();
        Ok(names)
    }
}
