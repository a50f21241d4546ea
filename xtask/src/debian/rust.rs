//! Debian's own Rust, unpacked under `target/lab`: for targets that rustup does not bring.

use super::{Apt, Status, unpack};
use crate::paths::Paths;
use crate::{process, progress, stamp};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A stand-in for the crate that the compiler links into everything: what it would bring, a kernel has itself. Linux's own build of Rust code
/// does the same (`rust/compiler_builtins.rs`).
const NO_BUILTINS: &str =
    "#![feature(compiler_builtins)]\n#![compiler_builtins]\n#![no_builtins]\n#![no_std]\n";

/// Unpacks the compiler with its standard library and that of arm64 Linux. Returns the program that cargo takes for rustc.
pub fn compiler(paths: &Paths) -> Result<PathBuf> {
    progress::say("Using Debian's rustc-web and libstd-rust-web-dev:arm64, unpacked under target/lab");
    let root = root(paths);
    let wrapper = root.join("rustc");
    stamp::once(paths, "rust-web", "3", &[&root.join("usr/bin/rustc")], || unpack_compiler(paths, &root))?;
    // It names the folder, which may have moved.
    let here = root.display().to_string();
    stamp::once(paths, "rust-web-wrapper", &here, &[&wrapper], || write_wrapper(&root, &wrapper))?;
    Ok(wrapper)
}

/// The same compiler with `core` for `target`, which has no system, built from Debian's sources of it with `flags`.
pub fn compiler_for_bare(paths: &Paths, target: &str, flags: &[&str]) -> Result<PathBuf> {
    let rustc = compiler(paths)?;
    progress::say(&format!("Building core for {target} from Debian's rust-web-src"));
    let root = root(paths);
    let library = root.join("usr/lib/rustlib").join(target).join("lib");
    let inputs = format!("1 {flags:?}");
    stamp::once(paths, &format!("rust-web-{target}"), &inputs, &[&library.join("libcore.rlib")], || {
        let source = core_source(paths, &root)?;
        fs::create_dir_all(&library)?;
        let builtins = root.join("compiler_builtins.rs");
        stamp::write_whole(&builtins, NO_BUILTINS.as_bytes())?;
        let build = |name: &str, source: &Path| {
            let mut command = Command::new(&rustc);
            command.args(["--target", target, "--out-dir"]).arg(&library).arg("-L").arg(&library).args(flags);
            build_crate(paths, command, name, source)
        };
        build("core", &source.join("core/src/lib.rs"))?;
        build("compiler_builtins", &builtins)
    })?;
    Ok(rustc)
}

fn root(paths: &Paths) -> PathBuf {
    paths.lab.join("rust-web")
}

fn machine() -> Result<String> {
    let text = process::output(Command::new("dpkg").arg("--print-architecture"), "dpkg")?;
    Ok(text.trim().to_owned())
}

fn unpack_compiler(paths: &Paths, root: &Path) -> Result<()> {
    let machine = machine()?;
    let release = crate::lab::RELEASE;
    let native = Apt::new(paths.lab.join("apt-rust"), &machine, release, Status::Empty)?;
    native.update()?;
    let mut files = native.download_with_dependencies(&["rustc-web".into()])?;
    // The machine's own C library is newer or the same; a second one beside it would not fit its loader.
    files.retain(|file| !file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libc6")));
    if machine != "arm64" {
        let arm64 = Apt::new(paths.lab.join("apt-arm64"), "arm64", release, Status::Empty)?;
        arm64.update()?;
        files.extend(arm64.download(&["libstd-rust-web-dev".into()])?);
    }
    for file in files {
        unpack(&file, root)?;
    }
    Ok(())
}

/// Debian's sources of the standard library: the folder `library`.
fn core_source(paths: &Paths, root: &Path) -> Result<PathBuf> {
    let native = Apt::new(paths.lab.join("apt-rust"), &machine()?, crate::lab::RELEASE, Status::Empty)?;
    native.update()?;
    for file in native.download(&["rust-web-src".into()])? {
        unpack(&file, root)?;
        fs::remove_file(&file)?;
    }
    let places = fs::read_dir(root.join("usr/src")).context("rust-web-src has no usr/src")?.flatten();
    let mut places = places.map(|entry| entry.path().join("library"));
    places.find(|path| path.join("core/src/lib.rs").is_file()).context("rust-web-src has no library/core")
}

fn build_crate(paths: &Paths, mut rustc: Command, name: &str, source: &Path) -> Result<()> {
    let edition = match source.parent().and_then(Path::parent).map(|folder| folder.join("Cargo.toml")) {
        Some(manifest) if manifest.is_file() => edition(&fs::read_to_string(manifest)?),
        _ => "2021".to_owned(),
    };
    rustc.args(["--crate-name", name, "--crate-type", "rlib", "--edition", &edition]);
    // As a released core is built, so that link-time optimization works; the last for all that is unstable in it.
    rustc.args(["-Copt-level=3", "-Cpanic=abort", "-Cembed-bitcode=yes", "-Zforce-unstable-if-unmarked"]);
    rustc.args(["--cap-lints", "allow"]).arg(source).env("RUSTC_BOOTSTRAP", "1");
    let log = paths.lab.join(format!("rust-web-{name}.log"));
    process::run_logged(&mut rustc, &format!("building {name} from Debian's sources"), &log)
}

/// The edition that a crate's manifest asks for.
fn edition(manifest: &str) -> String {
    let value = manifest.lines().find_map(|line| line.strip_prefix("edition")?.split('"').nth(1));
    value.unwrap_or("2021").to_owned()
}

/// A script that starts the unpacked compiler with the unpacked libraries. Not by a variable of the environment: the
/// compiler would hand that on to the linker, which is the machine's own and wants the machine's own libraries.
fn write_wrapper(root: &Path, wrapper: &Path) -> Result<()> {
    let loaders = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    let loader =
        loaders.iter().find(|path| Path::new(path).exists()).context("this machine has no known loader")?;
    let mut folders = Vec::new();
    for machine in ["x86_64-linux-gnu", "aarch64-linux-gnu"] {
        folders.push(root.join("usr/lib").join(machine).display().to_string());
        folders.push(root.join("lib").join(machine).display().to_string());
    }
    let usr = root.join("usr");
    let script = format!(
        "#!/bin/sh\nexec {loader} --library-path {} {} --sysroot {} \"$@\"\n",
        process::quoted(&folders.join(":")),
        process::quoted(&usr.join("bin/rustc").display().to_string()),
        process::quoted(&usr.display().to_string())
    );
    stamp::write_whole(wrapper, script.as_bytes())?;
    fs::set_permissions(wrapper, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_names_its_edition() {
        assert_eq!(edition("[package]\nname = \"core\"\nedition = \"2024\"\n"), "2024");
        assert_eq!(edition("[package]\n"), "2021");
    }
}
