//! `cargo xtask module`: the guest's kernel module for the lab's kernels, cross-built with the distribution's headers.

mod core_object;
mod headers;

use crate::debian::setup;
use crate::paths::Paths;
use crate::process::{self, Advise};
use crate::{progress, stamp};
use anyhow::{Context, Result, bail};
use headers::Headers;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use core_object::CROSS;
pub use headers::package_of;

/// Modules for tests, built beside the real one.
const TEST_MODULES: &str = "tests";

/// Where the built modules of a kernel are: the real one and those for tests.
pub struct Built {
    /// `.ko` files.
    pub files: Vec<PathBuf>,
}

/// Builds the modules for the newest kernel that Debian has.
pub fn build_newest(paths: &Paths) -> Result<Built> {
    prepare(paths)?;
    let object = core_object::build(paths)?;
    let headers = headers::prepare_newest(paths)?;
    build_one(paths, headers::NEWEST, &headers, &object, &sources(paths)?)
}

/// Builds the modules for the kernels whose image packages are `images` (name for the lab, package name with its version).
pub fn build(paths: &Paths, images: &[(String, String)]) -> Result<BTreeMap<String, Built>> {
    prepare(paths)?;
    let object = core_object::build(paths)?;
    let sources = sources(paths)?;
    let mut built = BTreeMap::new();
    for (name, image) in images {
        let headers = headers::prepare(paths, name, image)?;
        built.insert(name.clone(), build_one(paths, name, &headers, &object, &sources)?);
    }
    Ok(built)
}

/// Builds the modules for a kernel that somebody built in `folder`. `name` is the lab's for it.
pub fn build_for(paths: &Paths, name: &str, folder: &Path) -> Result<Built> {
    prepare(paths)?;
    let object = core_object::build(paths)?;
    let headers = Headers { build: folder.to_owned(), variables: Vec::new() };
    build_one(paths, name, &headers, &object, &sources(paths)?)
}

/// Everything but the sources: programs, and a word about where the work is done.
fn prepare(paths: &Paths) -> Result<()> {
    if paths.kbuild != paths.lab {
        progress::say(&format!(
            "A kernel module cannot be built below {}, because of a blank or another special character in that path: \
             its headers and build are in {}",
            paths.root.display(),
            paths.kbuild.display()
        ));
    }
    setup::ensure(paths, &setup::MODULE)
}

/// All files of the C half, relative to the clone.
fn sources(paths: &Paths) -> Result<Vec<PathBuf>> {
    let folder = paths.root.join("guest/module");
    let (mut files, mut folders) = (Vec::new(), vec![folder.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            let wanted = |ending: &std::ffi::OsStr| ["c", "h", "S"].iter().any(|one| ending == *one);
            if path.is_dir() && path.file_name().is_some_and(|name| name != "core") {
                folders.push(path);
            } else if path.file_name().is_some_and(|name| name == "Kbuild")
                || path.extension().is_some_and(wanted)
            {
                files.push(path);
            }
        }
    }
    files.push(paths.root.join("crates/abi/include/outboard_dma.h"));
    files.sort();
    Ok(files)
}

fn build_one(
    paths: &Paths,
    name: &str,
    headers: &Headers,
    object: &Path,
    sources: &[PathBuf],
) -> Result<Built> {
    let folder = paths.kbuild.join("module").join(name);
    let done = folder.join("built");
    let mut inputs: Vec<&Path> = sources.iter().map(PathBuf::as_path).collect();
    inputs.push(object);
    // A kernel that somebody builds again keeps its folder.
    let kernel = [".config", "Module.symvers"].map(|name| headers.build.join(name));
    inputs.extend(kernel.iter().map(PathBuf::as_path));
    let inputs = format!("{}{}", stamp::sum(&inputs)?, headers.build.display());
    stamp::once(paths, &format!("module-{name}"), &inputs, &[&done], || {
        progress::say(&format!("  building the guest's kernel module for {name}"));
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        lay_out(paths, &folder, object, sources)?;
        let log = paths.lab.join(format!("module-{name}.log"));
        process::run_logged(&mut make(headers, &folder), &format!("building the module for {name}"), &log)?;
        let said = fs::read_to_string(&log)?;
        // Not what the headers or kbuild say of compilers and tools that differ from the kernel's.
        let ours = |line: &&str| {
            let warning = line.to_lowercase().contains("warning:");
            warning && !line.contains("differs from") && !line.contains("/headers/")
        };
        if let Some(warning) = said.lines().find(ours) {
            bail!(
                "the module for {name} builds with a warning: {warning}\nThe whole output: {}",
                log.display()
            );
        }
        stamp::write_whole(&done, b"")
    })?;
    let mut files = Vec::new();
    for folder in [folder.clone(), folder.join(TEST_MODULES)] {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.retain(|path| path.extension().is_some_and(|ending| ending == "ko"));
    files.sort();
    Ok(Built { files })
}

/// The sources as they stand in a source package: kbuild writes beside them, so never into the clone.
fn lay_out(paths: &Paths, folder: &Path, object: &Path, sources: &[PathBuf]) -> Result<()> {
    let root = paths.root.join("guest/module");
    for file in sources {
        let place = file.strip_prefix(&root).unwrap_or_else(|_| Path::new("abi.h"));
        let to = folder.join(place);
        fs::create_dir_all(to.parent().context("a file has a folder")?)?;
        fs::copy(file, &to).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    fs::copy(object, folder.join(core_object::NAME))?;
    Ok(())
}

/// Puts the sources and the Rust half into `folder`, as they go into a source package: without the tests.
pub fn lay_out_package(paths: &Paths, folder: &Path) -> Result<()> {
    prepare(paths)?;
    let object = core_object::build(paths)?;
    let tests = paths.root.join("guest/module").join(TEST_MODULES);
    let mut sources = sources(paths)?;
    sources.retain(|file| !file.starts_with(&tests));
    lay_out(paths, folder, &object, &sources)
}

/// Builds a package's `source` as DKMS does it, by its `dkms.conf`, for the kernel of package `image`; `tree` is what DKMS would call its tree.
/// Returns the module.
pub fn build_by_dkms(paths: &Paths, name: &str, image: &str, source: &Path, tree: &Path) -> Result<PathBuf> {
    let headers = headers::prepare(paths, name, image)?;
    // The names that DKMS gives the configuration, and then its steps: copy, PRE_BUILD, MAKE.
    let script = "set -e; source \"$1/dkms.conf\"; build=\"$dkms_tree/$PACKAGE_NAME/$PACKAGE_VERSION/build\"; \
         rm -rf \"$build\"; mkdir -p \"${build%/build}\"; cp -r \"$1\" \"$build\"; cd \"$build\"; \
         eval \"./$PRE_BUILD\"; eval \"${MAKE[0]}\"; test -f \"${BUILT_MODULE_NAME[0]}.ko\"; ls \"$PWD/${BUILT_MODULE_NAME[0]}.ko\" >&3";
    let mut command = Command::new("bash");
    command.args(["-c", &format!("{{ {script}; }} 3>&1 >\"$2\" 2>&1"), "dkms"]).arg(source);
    let log = paths.lab.join(format!("package-{name}.log"));
    command.arg(&log).env("dkms_tree", tree).env("kernel_source_dir", &headers.build);
    command.env("kernelver", image.trim_start_matches("linux-image-"));
    // The only difference to a guest: the compiler is a cross compiler.
    let variables =
        headers.variables.iter().map(|(key, value)| format!(" {key}={value}")).collect::<String>();
    command.env("ARCH", "arm64").env("CROSS_COMPILE", CROSS).env("MAKEFLAGS", variables.trim());
    process::in_c_locale(&mut command).env_remove("MFLAGS").env_remove("CARGO_MAKEFLAGS");
    let what = format!("building the module for {name} as DKMS does");
    let module = progress::follow(&log, || process::output(&mut command, &what)).advise(|| {
        let said = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
        format!("{}\nThe whole output: {}", process::essence(&said), log.display())
    })?;
    Ok(PathBuf::from(module.trim()))
}

fn make(headers: &Headers, folder: &Path) -> Command {
    let mut command = Command::new("make");
    command.arg("-C").arg(&headers.build).arg(format!("M={}", folder.display()));
    command.args(["ARCH=arm64", "W=1", "OUTBOARD_TESTS=1"]).arg(format!("CROSS_COMPILE={CROSS}"));
    command.args(headers.variables.iter().map(|(key, value)| format!("{key}={value}")));
    command.arg("modules");
    // What cargo sets for its own programs must not reach kbuild.
    command.env_remove("MAKEFLAGS").env_remove("MFLAGS").env_remove("CARGO_MAKEFLAGS");
    // Its warnings are looked for, in English.
    process::in_c_locale(&mut command);
    command
}
