//! Where things are in the clone.

use crate::process::Advise;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The folders of a clone.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The clone.
    pub root: PathBuf,
    /// Everything of the lab.
    pub lab: PathBuf,
    /// Where the guest's kernel module is built and what that needs of the kernels: below [`Paths::lab`], unless the kernel's own build cannot
    /// work there.
    pub kbuild: PathBuf,
}

impl Paths {
    /// Of the clone that this program was built from.
    pub fn new() -> Result<Self> {
        // cargo sets it at run time too, so that a clone may move; without cargo the place of the build is meant.
        let manifest =
            std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest).parent().context("xtask has no parent folder")?.to_owned();
        Self::of(root)
    }

    /// Of the clone in `root`; makes the folders.
    pub fn of(root: PathBuf) -> Result<Self> {
        if let Some(reason) = unusable(&root) {
            bail!("the path of this clone, {}, {reason}; move or rename it", root.display());
        }
        let lab = root.join("target/lab");
        let kbuild = if is_plain(&lab) { lab.clone() } else { elsewhere(&root)? };
        let paths = Self { root, lab, kbuild };
        for folder in [paths.packages(), paths.share(), paths.logs(), paths.stamps()] {
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot create {}", folder.display()))
                .advise(|| "If another user, or root, owns target/: delete it as that user, or work in a clone of your own")?;
        }
        Ok(paths)
    }

    /// Packages of the distribution, unpacked.
    pub fn packages(&self) -> PathBuf {
        self.lab.join("packages")
    }

    /// What the emulated host sees, read-only.
    pub fn share(&self) -> PathBuf {
        self.lab.join("share")
    }

    /// What the emulated host may write.
    pub fn out(&self) -> PathBuf {
        self.lab.join("out")
    }

    /// Consoles and other logs of the last run.
    pub fn logs(&self) -> PathBuf {
        self.out().join("logs")
    }

    /// One file for each prepared thing, with the sum of what it was made from.
    pub fn stamps(&self) -> PathBuf {
        self.lab.join("stamps")
    }

    /// Where cargo puts what it builds.
    pub fn target(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.root.join("target"), PathBuf::from)
    }
}

/// Why nothing here can work in a clone with this path.
fn unusable(root: &Path) -> Option<&'static str> {
    let Some(text) = root.to_str() else { return Some("is not valid UTF-8") };
    // apt's configuration has no way to write them.
    text.contains(|c: char| c.is_control() || c == '"' || c == '\\')
        .then_some("has a quotation mark, a backslash or a control character in it")
}

/// Whether the kernel's build works below `path`: make and the shell take it apart at blanks and read other characters as their own, and Linux's
/// Makefile refuses blanks and colons.
fn is_plain(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.chars().all(|c| c.is_alphanumeric() || "/._-+@".contains(c)))
}

/// A folder of the user's for the clone in `root`, whose path is plain.
fn elsewhere(root: &Path) -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = [variable("XDG_CACHE_HOME"), variable("HOME").map(|home| home.join(".cache"))];
    let user = nix::unistd::geteuid();
    let shared = PathBuf::from(format!("/var/tmp/outboard-{user}"));
    let own = caches.into_iter().flatten().map(|cache| cache.join("outboard"));
    for folder in own.chain([shared]).filter(|folder| is_plain(folder)) {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        // In a folder that everybody may write to, somebody else may have made it.
        if made.is_ok()
            && fs::symlink_metadata(&folder).is_ok_and(|it| it.is_dir() && it.uid() == user.as_raw())
        {
            return Ok(folder.join(format!("kbuild-{:016x}", hash(root))));
        }
    }
    bail!(
        "the guest's kernel module cannot be built in {}, nor in the user's cache or /var/tmp; move the clone to a path \
         of letters, digits and . _ - + @",
        root.display()
    )
}

/// FNV-1a (draft-eastlake-fnv-17): the same for the same path in every run.
fn hash(path: &Path) -> u64 {
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blank_in_the_path_moves_only_the_kernels_build() {
        let folder = tempfile::tempdir().expect("a folder");
        let plain = Paths::of(folder.path().join("plain-1.0_b")).expect("is usable");
        assert_eq!(plain.kbuild, plain.lab);
        for name in ["with blank", "colon:x", "dollar$x", "it's"] {
            let paths = Paths::of(folder.path().join(name)).expect("is usable");
            assert!(paths.lab.starts_with(&paths.root));
            assert!(!paths.kbuild.starts_with(&paths.root) && is_plain(&paths.kbuild), "{name}");
        }
        let kbuild = |name: &str| Paths::of(folder.path().join(name)).expect("is usable").kbuild;
        assert_eq!(kbuild("a b"), kbuild("a b"));
        assert_ne!(kbuild("a b"), kbuild("a c"), "two clones do not share it");
    }

    #[test]
    fn a_path_that_nothing_can_work_in_is_refused_at_once() {
        for name in ["quote\"", "back\\slash", "line\nbreak"] {
            let error = Paths::of(Path::new("/nowhere").join(name)).expect_err("is refused").to_string();
            assert!(error.contains("move or rename it"), "{error}");
        }
    }
}
