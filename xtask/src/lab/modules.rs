//! Kernel modules: which files a module needs, from the modules themselves (Debian's package has no `modules.dep`; its
//! installation would make one).

use anyhow::{Context, Result};
use object::{Object, ObjectSection};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A module, ready for an initramfs.
pub struct Module {
    /// Path in the initramfs.
    pub path: String,
    /// The ELF file.
    pub bytes: Vec<u8>,
}

/// The modules of one kernel.
pub struct Modules {
    files: HashMap<String, PathBuf>,
    read: HashMap<String, (Vec<u8>, Vec<String>)>,
}

impl Modules {
    /// Those under `root/lib/modules`; where there is no such folder, `root` is where the kernel was built.
    pub fn scan(root: &Path) -> Result<Self> {
        let mut files = HashMap::new();
        let installed = root.join("lib/modules");
        let mut folders = vec![if installed.is_dir() { installed } else { root.to_owned() }];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if let Some((stem, _)) = name.split_once(".ko") {
                    files.insert(plain(stem), entry.path());
                }
            }
        }
        Ok(Self { files, read: HashMap::new() })
    }

    /// Adds a module that did not come with the kernel; its name.
    pub fn add_file(&mut self, file: &Path) -> Result<String> {
        let stem = file.file_stem().context("a module's file has a name")?;
        let name = plain(&stem.to_string_lossy());
        self.files.insert(name.clone(), file.to_owned());
        Ok(name)
    }

    /// Makes `/etc/modules.load` for the `wanted` modules (those that this kernel lacks or has built in are left out):
    /// a line `NAME:FILE FILE …` each, in the order in which they load; and the files themselves.
    pub fn pack(&mut self, wanted: &[impl AsRef<str>]) -> Result<(String, Vec<Module>)> {
        let mut list = String::new();
        let mut packed = HashSet::new();
        let mut modules = Vec::new();
        for name in wanted {
            let name = name.as_ref();
            if !self.files.contains_key(name) {
                continue;
            }
            let mut order = Vec::new();
            self.add(name, &mut order)?;
            let paths: Vec<String> = order.iter().map(|one| format!("/lib/modules/{one}.ko")).collect();
            list.push_str(&format!("{name}:{}\n", paths.join(" ")));
            for (one, path) in order.into_iter().zip(paths) {
                if packed.insert(one.clone()) {
                    modules.push(Module { path, bytes: self.read[&one].0.clone() });
                }
            }
        }
        Ok((list, modules))
    }

    /// Appends `name` to `order` behind everything it depends on.
    fn add(&mut self, name: &str, order: &mut Vec<String>) -> Result<()> {
        let name = plain(name);
        if order.contains(&name) || !self.files.contains_key(&name) {
            return Ok(());
        }
        for needed in self.read(&name)? {
            self.add(&needed, order)?;
        }
        order.push(name);
        Ok(())
    }

    /// Reads a module once; returns what it depends on.
    fn read(&mut self, name: &str) -> Result<Vec<String>> {
        if let Some((_, depends)) = self.read.get(name) {
            return Ok(depends.clone());
        }
        let path = &self.files[name];
        let bytes = if path.extension().is_some_and(|extension| extension == "xz") {
            let output = Command::new("xz").arg("-dc").arg(path).output().context("cannot start xz")?;
            anyhow::ensure!(output.status.success(), "xz cannot unpack {}", path.display());
            output.stdout
        } else {
            fs::read(path)?
        };
        let depends = depends(&bytes).with_context(|| format!("{} is no kernel module", path.display()))?;
        self.read.insert(name.to_owned(), (bytes, depends.clone()));
        Ok(depends)
    }
}

/// The kernel takes `-` and `_` in a module's name for the same.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// The field `depends=` of the section `.modinfo` (zero-terminated `key=value` strings).
fn depends(elf: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(elf)?;
    let section = file.section_by_name(".modinfo").context("it has no section .modinfo")?;
    let mut names = Vec::new();
    for field in section.data()?.split(|byte| *byte == 0) {
        if let Some(list) = std::str::from_utf8(field).ok().and_then(|text| text.strip_prefix("depends=")) {
            names.extend(list.split(',').filter(|name| !name.is_empty()).map(plain));
        }
    }
    Ok(names)
}
