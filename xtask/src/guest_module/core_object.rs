//! The Rust half as one object file that kbuild links like one of its own.

use crate::debian::rust;
use crate::paths::Paths;
use crate::rustup::BARE;
use crate::{process, stamp};
use anyhow::{Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Prefix of the cross tools.
pub const CROSS: &str = "aarch64-linux-gnu-";
/// kbuild copies a `_shipped` file to the name without that.
pub const NAME: &str = "outboard_core.o_shipped";
const CRATE: &str = "outboard-dma-core";
/// As the kernel builds its own Rust code: x18 belongs to the shadow call stack, indirect calls land on a BTI. Both options need a nightly
/// compiler or `RUSTC_BOOTSTRAP`, which the kernel's build sets too.
const FLAGS: [&str; 3] = ["-Cforce-frame-pointers=yes", "-Zfixed-x18", "-Zbranch-protection=bti"];
/// Those of them that a compiler may want to be the same in `core`, which comes without.
const MODIFIERS: [&str; 2] = ["fixed-x18", "branch-protection"];
/// What the linker may leave open: the kernel has these. Above all not the panic handler.
const OPEN: [&str; 5] = ["memcpy", "memmove", "memset", "memcmp", "bcmp"];

/// Builds it; the file.
pub fn build(paths: &Paths) -> Result<PathBuf> {
    let mut command = crate::cargo(paths);
    let rustc = if BARE.ensure(paths)? {
        PathBuf::from("rustc")
    } else {
        let rustc = rust::compiler_for_bare(paths, BARE.name(), &FLAGS)?;
        command.env("RUSTC", &rustc);
        rustc
    };
    command.args(["rustc", "--package", CRATE, "--target", BARE.name(), "--profile", "kernel"]);
    command.args(["--crate-type", "staticlib"]);
    let mut flags: Vec<String> = FLAGS.iter().map(|flag| (*flag).to_owned()).collect();
    let allowed: Vec<&str> =
        MODIFIERS.into_iter().filter(|name| is_modifier(&rustc, name, &paths.lab)).collect();
    flags.push(format!("-Cunsafe-allow-abi-mismatch={}", allowed.join(",")));
    command.env("RUSTC_BOOTSTRAP", "1").env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    process::run_logged(&mut command, "building the module's Rust half", &paths.lab.join("module-core.log"))?;
    let library = paths.target().join(BARE.name()).join("kernel/liboutboard_dma_core.a");
    let folder = paths.lab.join("module-core");
    let object = folder.join(NAME);
    let script = paths.root.join("guest/module/core/link.lds");
    let inputs = stamp::sum(&[&library, &script])?;
    stamp::once(paths, "module-core", &inputs, &[&object], || link(&folder, &library, &script, &object))?;
    Ok(object)
}

/// Whether this compiler wants option `name` to be the same in all crates: Rust 1.96 added `branch-protection` to these, and older ones refuse names
/// that they do not know. The compiler is asked with an empty crate, which goes into `folder`.
fn is_modifier(rustc: &Path, name: &str, folder: &Path) -> bool {
    let mut command = Command::new(rustc);
    // Into a folder of ours: rustc replaces what `-o` names, even a device file.
    command
        .args(["--crate-name", "probe", "--crate-type", "lib", "--emit", "metadata", "--out-dir"])
        .arg(folder);
    command.arg(format!("-Cunsafe-allow-abi-mismatch={name}")).arg("-").env("RUSTC_BOOTSTRAP", "1");
    process::output(&mut command, "rustc").is_ok()
}

/// Takes the crate's own object out of the library (the rest is what the kernel has itself), keeps what the C half calls, and checks that
/// nothing else is asked for.
fn link(folder: &Path, library: &Path, script: &Path, object: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    let tool = |name: &str| {
        let mut command = Command::new(format!("{CROSS}{name}"));
        process::in_c_locale(&mut command);
        command
    };
    let names = process::output(tool("ar").arg("t").arg(library), "ar t")?;
    let own: Vec<&str> = names.lines().filter(|name| name.starts_with("outboard_dma_core")).collect();
    let [own] = own[..] else { bail!("{} has {} objects of {CRATE}, not one", library.display(), own.len()) };
    process::output(tool("ar").arg("x").arg(library).arg(own).current_dir(folder), "ar x")?;
    let own = folder.join(own);
    let symbols = process::output(tool("readelf").args(["-sW"]).arg(&own), "readelf -s")?;
    let entries: Vec<&str> = symbols.lines().filter_map(|line| entry(line, false)).collect();
    let linked = folder.join("linked.o");
    let mut command = tool("ld");
    command.args(["-r", "--gc-sections", "-T"]).arg(script).arg("-o").arg(&linked).arg(&own);
    command.args(entries.iter().flat_map(|name| ["-u", name]));
    process::output(&mut command, "linking the module's Rust half")?;
    let mut command = tool("objcopy");
    command
        .args(["--strip-debug", "--wildcard", "--keep-global-symbol=odma_core_*"])
        .arg(&linked)
        .arg(object);
    process::output(&mut command, "objcopy")?;
    let symbols = process::output(tool("readelf").args(["-sW"]).arg(object), "readelf -s")?;
    let open: Vec<&str> = symbols.lines().filter_map(|line| entry(line, true)).collect();
    if let Some(name) = open.iter().find(|name| !OPEN.contains(name)) {
        bail!(
            "the module's Rust half needs '{name}'. Only {OPEN:?} may be left open; 'outboard_fatal' means that some path \
             can panic: find it with `{CROSS}objdump -dr {}`",
            linked.display()
        );
    }
    let code = process::output(tool("objdump").arg("-d").arg(object), "objdump")?;
    // As a register: not the number 0x18, not a name.
    let taken = |line: &&str| {
        let words = line.rsplit('\t').next().unwrap_or_default().split(|c: char| !c.is_ascii_alphanumeric());
        words.into_iter().any(|word| word == "x18" || word == "w18")
    };
    if let Some(line) = code.lines().find(taken) {
        bail!("the module's Rust half uses x18, which some kernels keep for their shadow call stack: {line}");
    }
    Ok(())
}

/// The name in a line of `readelf -sW` (`NUM: VALUE SIZE TYPE BIND VIS NDX NAME`), if it is global: of what is missing if `open`, else of an
/// entry point.
fn entry(line: &str, open: bool) -> Option<&str> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (bind, index, name) = (words.get(4)?, words.get(6)?, words.get(7)?);
    let global = *bind == "GLOBAL" || *bind == "WEAK";
    let undefined = *index == "UND";
    (global && undefined == open && (open || name.starts_with("odma_core_"))).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_is_asked_only_for_modifiers_that_it_knows() {
        let (rustc, folder) = (Path::new("rustc"), tempfile::tempdir().expect("a folder"));
        assert!(is_modifier(rustc, "fixed-x18", folder.path()));
        assert!(!is_modifier(rustc, "no-such-modifier", folder.path()));
    }
}
