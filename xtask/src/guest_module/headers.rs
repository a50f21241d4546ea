//! A kernel's headers and its build programs, unpacked beside each other under `target/lab/headers`.

use crate::debian::{Apt, Status, unpack};
use crate::lab::RELEASE;
use crate::paths::Paths;
use crate::{process, stamp};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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
    let root = paths.lab.join("headers").join(name);
    let build = root.join("usr/src").join(format!("linux-headers-{version}"));
    let makefile = build.join("Makefile");
    stamp::once(paths, &format!("headers-{name}"), image, &[&makefile], || {
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fetch(paths, &root, version).with_context(|| {
            format!(
                "if Debian has a newer kernel by now and no headers of {version} any more: delete {}",
                paths.packages().display()
            )
        })?;
        relocate(&root, &makefile)
    })?;
    // The package would take the version of gcc that the kernel was built with.
    let compiler = format!("{}gcc", super::CROSS);
    Ok(Headers { build, variables: vec![("CC".into(), compiler)] })
}

fn fetch(paths: &Paths, root: &Path, version: &str) -> Result<()> {
    let headers = format!("linux-headers-{version}");
    let arm64 = Apt::new(paths.lab.join("apt-arm64"), "arm64", RELEASE, Status::Empty)?;
    arm64.update()?;
    let common = arm64.resolve(&headers, "linux-headers-")?;
    let programs = arm64.resolve(&headers, "linux-kbuild-")?;
    let mut files = arm64.download(&[headers, common])?;
    // They run here, so they are this machine's.
    let machine = process::output(Command::new("dpkg").arg("--print-architecture"), "dpkg")?;
    let native = Apt::new(paths.lab.join("apt-kbuild"), machine.trim(), RELEASE, Status::Empty)?;
    native.update()?;
    files.extend(native.download(&[programs])?);
    for file in files {
        unpack(&file, root)?;
        fs::remove_file(&file)?;
    }
    Ok(())
}

/// The headers' Makefile includes another by its place in an installed system.
fn relocate(root: &Path, makefile: &Path) -> Result<()> {
    let text = fs::read_to_string(makefile).with_context(|| format!("there is no {}", makefile.display()))?;
    let place = root.join("usr/src");
    let text = text.replace("/usr/src/", &format!("{}/", place.display()));
    stamp::write_whole(makefile, text.as_bytes())
}
