//! Makes things once: each has a stamp with the sum of its inputs, and is made again when that changes.

use crate::paths::Paths;
use crate::process;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs `make` unless it has run with the same `inputs` and all `outputs` are still there. Whether it ran.
pub fn once(
    paths: &Paths,
    name: &str,
    inputs: &str,
    outputs: &[&Path],
    make: impl FnOnce() -> Result<()>,
) -> Result<bool> {
    let stamp = paths.stamps().join(name);
    let fresh = fs::read_to_string(&stamp).is_ok_and(|old| old == inputs);
    if fresh && outputs.iter().all(|path| path.exists()) {
        return Ok(false);
    }
    // Without the stamp first: if making fails in the middle, the next run starts over.
    if stamp.exists() {
        fs::remove_file(&stamp)?;
    }
    make()?;
    write_whole(&stamp, inputs.as_bytes())?;
    Ok(true)
}

/// SHA-256 of files, as text.
pub fn sum(files: &[&Path]) -> Result<String> {
    process::output(Command::new("sha256sum").args(files), "sha256sum")
}

/// Writes a file in one step: nobody sees half of it.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file has a folder")?;
    fs::create_dir_all(folder)?;
    let name = path.file_name().context("a file has a name")?.to_string_lossy();
    let part = folder.join(format!(".{name}.part"));
    fs::write(&part, bytes)
        .and_then(|()| fs::rename(&part, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Copies a file unless the target already has the same bytes.
pub fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    write_whole(to, &bytes)?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_are_made_when_inputs_or_outputs_say_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = Paths::of(folder.path().into()).expect("folders");
        let output = folder.path().join("thing");
        let make = |inputs: &str| {
            once(&paths, "thing", inputs, &[&output], || write_whole(&output, b"x")).expect("is made")
        };
        assert!(make("a"));
        assert!(!make("a"));
        assert!(make("b"));
        fs::remove_file(&output).expect("was there");
        assert!(make("b"), "a lost output is made again");
        let failed = once(&paths, "thing", "c", &[&output], || anyhow::bail!("half way"));
        assert!(failed.is_err());
        assert!(make("b"), "after a failure nothing counts as made");
    }
}
