//! A kernel's headers and its build programs, unpacked beside each other under `target/lab/headers`.

use crate::debian::{Apt, Status, UNSTABLE, unpack};
use crate::lab::RELEASE;
use crate::paths::Paths;
use crate::process::Advise;
use crate::{process, stamp};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The lab's name for the newest kernel.
pub const NEWEST: &str = "newest";

/// Unpacked headers, ready for `make -C`.
pub struct Headers {
    /// The folder that `/lib/modules/VERSION/build` would name.
    pub build: PathBuf,
    /// Variables for `make`.
    pub variables: Vec<(String, String)>,
}

/// The package's name, from the folder that it was unpacked to.
pub fn package_of(folder: &Path) -> Result<String> {
    let name = folder.file_name().context("a folder has a name")?.to_string_lossy();
    Ok(name.split('_').next().unwrap_or_default().to_owned())
}

/// Fetches what is missing for the kernel of package `image` (`linux-image-VERSION`).
pub fn prepare(paths: &Paths, name: &str, image: &str) -> Result<Headers> {
    let version = image.strip_prefix("linux-image-").context("a kernel's package is linux-image-…")?;
    let root = paths.kbuild.join("headers").join(name);
    let build = root.join("usr/src").join(format!("linux-headers-{version}"));
    let makefile = build.join("Makefile");
    // The number is raised when they are unpacked in another way.
    let inputs = format!("2 {image}");
    stamp::once(paths, &format!("headers-{name}"), &inputs, &[&makefile], || {
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fetch(paths, &root, version).advise(|| {
            format!(
                "If Debian has a newer kernel by now and no headers of {version} any more: delete {}",
                paths.packages().display()
            )
        })
    })?;
    relocate(paths, name, &root, &makefile)?;
    // The package would take the version of gcc that the kernel was built with.
    let compiler = format!("{}gcc", super::CROSS);
    Ok(Headers { build, variables: vec![("CC".into(), compiler)] })
}

/// The same for the newest kernel that Debian has at all, which only ever is compiled for. What is there
/// stays until `target/lab/headers/newest` is deleted.
pub fn prepare_newest(paths: &Paths) -> Result<Headers> {
    let root = paths.kbuild.join("headers").join(NEWEST);
    let place = root.join("build");
    // The folder too: it stands in scripts and a link. Few build this, so another download does not matter.
    let inputs = format!("6 {}", root.display());
    stamp::once(paths, "headers-newest", &inputs, &[&place], || {
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        let apt = Apt::new(paths.lab.join("apt-newest"), "arm64", UNSTABLE, Status::Empty)?;
        apt.update()?;
        let headers = apt.resolve("linux-headers-arm64", "linux-headers-")?;
        let common = apt.resolve(&headers, "linux-headers-")?;
        let programs = apt.resolve(&headers, "linux-kbuild-")?;
        let native =
            Apt::new(paths.lab.join("apt-newest-kbuild"), machine()?.trim(), UNSTABLE, Status::Empty)?;
        native.update()?;
        let mut files = apt.download(&[headers.clone(), common])?;
        files.extend(native.download(std::slice::from_ref(&programs))?);
        // The build programs want a C library that this machine may not have yet.
        files.extend(native.download_with_dependencies(std::slice::from_ref(&programs))?);
        for file in files {
            unpack(&file, &root)?;
        }
        let build = root.join("usr/src").join(&headers);
        relocate(paths, NEWEST, &root, &build.join("Makefile"))?;
        with_own_libraries(&root, &root.join("usr/lib").join(programs))?;
        std::os::unix::fs::symlink(&build, &place).with_context(|| format!("cannot make {}", place.display()))
    })?;
    let build = fs::canonicalize(&place)?;
    let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let variables = vec![
        set("CC", &format!("{}gcc", super::CROSS)),
        // Options and tools newer than this machine's. None of them changes what the module is made of.
        set("CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT", ""),
        set("CONFIG_DEBUG_INFO_BTF_MODULES", ""),
        set("KCFLAGS", "-Wno-attributes"),
    ];
    Ok(Headers { build, variables })
}

/// Has each program below `folder` start with the libraries unpacked in `root`.
fn with_own_libraries(root: &Path, folder: &Path) -> Result<()> {
    let candidates = ["usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu"].map(|name| root.join(name));
    let libraries = candidates.iter().find(|folder| folder.join("libc.so.6").exists());
    let libraries = libraries.context("the newest C library has no libc.so.6")?;
    let loaders = ["ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"].map(|name| libraries.join(name));
    let loader = loaders.iter().find(|path| path.exists()).context("the newest C library has no loader")?;
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            let library = path.extension().is_some_and(|ending| ending == "so" || ending == "o");
            let program = path.is_file() && !library;
            if path.is_dir() && !path.is_symlink() {
                folders.push(path);
            } else if program && fs::read(&path)?.starts_with(b"\x7fELF") {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let own = folder.join(format!(".{name}"));
                fs::rename(&path, &own)?;
                let (loader, libraries, own) = (loader.display(), libraries.display(), own.display());
                // Some start others that are named after them.
                let head = format!("#!/bin/sh\nexec '{loader}' --argv0 \"$0\" --library-path '{libraries}'");
                let script = format!("{head} '{own}' \"$@\"\n");
                stamp::write_whole(&path, script.as_bytes())?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            }
        }
    }
    Ok(())
}

fn machine() -> Result<String> {
    process::output(Command::new("dpkg").arg("--print-architecture"), "dpkg")
}

fn fetch(paths: &Paths, root: &Path, version: &str) -> Result<()> {
    let headers = format!("linux-headers-{version}");
    let arm64 = Apt::new(paths.lab.join("apt-arm64"), "arm64", RELEASE, Status::Empty)?;
    arm64.update()?;
    let common = arm64.resolve(&headers, "linux-headers-")?;
    let programs = arm64.resolve(&headers, "linux-kbuild-")?;
    let mut files = arm64.download(&[headers, common])?;
    // They run here, so they are this machine's.
    let native = Apt::new(paths.lab.join("apt-kbuild"), machine()?.trim(), RELEASE, Status::Empty)?;
    native.update()?;
    files.extend(native.download(&[programs])?);
    for file in files {
        unpack(&file, root)?;
        fs::remove_file(&file)?;
    }
    Ok(())
}

/// The headers' Makefile includes another by its place in an installed system. Where the headers are is written into it, again when they have
/// moved: the clone was renamed, or copied.
fn relocate(paths: &Paths, name: &str, root: &Path, makefile: &Path) -> Result<()> {
    let original = makefile.with_extension("debian");
    if !original.exists() {
        fs::rename(makefile, &original).with_context(|| format!("there is no {}", makefile.display()))?;
    }
    let place = root.join("usr/src").display().to_string();
    stamp::once(paths, &format!("headers-place-{name}"), &place, &[makefile], || {
        let text =
            fs::read_to_string(&original).with_context(|| format!("cannot read {}", original.display()))?;
        stamp::write_whole(makefile, text.replace("/usr/src/", &format!("{place}/")).as_bytes())
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_moved_name_their_new_place() {
        let folder = tempfile::tempdir().expect("a folder");
        let headers_in = |clone: &str| {
            let paths = Paths::of(folder.path().join(clone)).expect("folders");
            let root = paths.kbuild.join("headers/6.1");
            let makefile = root.join("usr/src/linux-headers-6.1/Makefile");
            (paths, root, makefile)
        };
        let (paths, root, makefile) = headers_in("old");
        fs::create_dir_all(makefile.parent().expect("a folder")).expect("a folder");
        fs::write(&makefile, "include /usr/src/linux-headers-common/Makefile\n").expect("written");
        relocate(&paths, "6.1", &root, &makefile).expect("is relocated");
        let include =
            |root: &Path| format!("include {}/usr/src/linux-headers-common/Makefile\n", root.display());
        assert_eq!(fs::read_to_string(&makefile).expect("is there"), include(&root));

        fs::rename(folder.path().join("old"), folder.path().join("new")).expect("is moved");
        let (paths, root, makefile) = headers_in("new");
        relocate(&paths, "6.1", &root, &makefile).expect("is relocated");
        assert_eq!(fs::read_to_string(&makefile).expect("is there"), include(&root));
    }
}
