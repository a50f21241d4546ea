//! apt with its own sources, lists and cache under `target/lab`: nothing of the machine's own state is changed, and a
//! broken third-party source in it does no harm.

use super::mirrors::{self, Mirrors, Source};
use crate::process::Advise;
use crate::{process, progress};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Key of the distribution, from the package `debian-archive-keyring`; a Debian machine has it.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The suite that packages enter first.
pub const UNSTABLE: &str = "sid";

/// Which packages count as installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Those of the machine: for what is installed into it.
    System,
    /// None: for what is only unpacked.
    Empty,
}

/// An apt of our own.
pub struct Apt {
    folder: PathBuf,
    architecture: String,
    status: Status,
}

impl Apt {
    /// For `architecture` and the suites of `release`, with its state in `folder`.
    pub fn new(folder: PathBuf, architecture: &str, release: &str, status: Status) -> Result<Self> {
        let machine = codename()?;
        let mirrors = mirrors::find(Path::new("/etc/apt"), &machine)?;
        for part in ["lists/partial", "cache/archives/partial", "deb"] {
            fs::create_dir_all(folder.join(part))?;
        }
        fs::write(folder.join("sources.list"), sources(&mirrors, release, architecture))?;
        fs::write(folder.join("status"), "")?;
        let apt = Self { folder, architecture: architecture.to_owned(), status };
        fs::write(apt.folder.join("apt.conf"), apt.configuration()?)?;
        Ok(apt)
    }

    fn configuration(&self) -> Result<String> {
        let folder = self.folder.to_str().context("the clone's path is not valid UTF-8; move it")?;
        let status = match self.status {
            Status::System => "/var/lib/dpkg/status".to_owned(),
            Status::Empty => format!("{folder}/status"),
        };
        // The sandbox user could not read a clone in a private home folder.
        Ok(format!(
            "APT::Architecture \"{arch}\";\nAPT::Architectures {{ \"{arch}\"; }};\n\
             Dir::State::Lists \"{folder}/lists\";\nDir::State::status \"{status}\";\n\
             Dir::Cache \"{folder}/cache\";\n\
             Dir::Etc::sourcelist \"{folder}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
             Acquire::Languages \"none\";\nAPT::Sandbox::User \"\";\nAPT::Install-Recommends \"false\";\n\
             Acquire::Retries \"3\";\n",
            arch = self.architecture
        ))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt.conf")).env("LC_ALL", "C");
        command
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    /// Fetches the lists of packages.
    pub fn update(&self) -> Result<()> {
        let mut command = self.command("apt-get");
        // Without this option apt-get warns about unreachable mirrors and says that all is well.
        command.args(["update", "-q", "-o", "APT::Update::Error-Mode=any"]);
        process::run_logged(&mut command, "fetching Debian's lists of packages", &self.log("update"))
            .advise(|| "Is the machine on the network, and its mirror in /etc/apt reachable?")
    }

    /// The package that metapackage `name` stands for: the first it depends on that starts with `prefix`.
    pub fn resolve(&self, name: &str, prefix: &str) -> Result<String> {
        let mut command = self.command("apt-cache");
        let text = process::output(
            command.args(["show", "--no-all-versions", name]),
            &format!("looking for {name}"),
        )?;
        let depends = text.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default();
        let names = depends.split(',').filter_map(|one| one.split_whitespace().next());
        names.into_iter().find(|one| one.starts_with(prefix)).map(str::to_owned).with_context(|| {
            format!("Debian's {name} depends on no package {prefix}…; it depends on:{depends}")
        })
    }

    /// Downloads exactly these packages. Returns their files, in an order of their own.
    pub fn download(&self, names: &[String]) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join("deb");
        let before = list(&folder)?;
        let mut command = self.command("apt-get");
        command.args(["download", "-q"]).args(names).current_dir(&folder);
        process::run_logged(&mut command, "downloading Debian packages", &self.log("download"))?;
        let mut files = Vec::new();
        for name in names {
            let prefix = format!("{name}_");
            let is =
                |path: &&PathBuf| path.file_name().is_some_and(|f| f.to_string_lossy().starts_with(&prefix));
            let all = list(&folder)?;
            let new = all.iter().filter(|path| !before.contains(path)).find(is);
            let file = new
                .or_else(|| all.iter().rev().find(is))
                .with_context(|| format!("apt brought no {name}"))?;
            files.push(file.clone());
        }
        Ok(files)
    }

    /// Downloads these packages and all they depend on.
    pub fn download_with_dependencies(&self, names: &[String]) -> Result<Vec<PathBuf>> {
        let mut command = self.command("apt-get");
        command.args(["install", "-y", "-q", "--download-only"]).args(names);
        process::run_logged(&mut command, "downloading Debian packages", &self.log("download"))?;
        list(&self.folder.join("cache/archives"))
    }

    /// Installs these packages into the machine, with sudo unless this is root. Returns what apt says it did.
    pub fn install(&self, names: &[&str]) -> Result<String> {
        if self.status != Status::System {
            bail!("only an apt that knows the machine's packages may install into it");
        }
        let log = self.log("install");
        let mut command =
            install_command(&self.folder.join("apt.conf"), nix::unistd::geteuid().is_root(), names);
        let what = "installing Debian packages";
        if sudo_will_ask_again()? {
            // It keeps no password: the question must stay readable.
            progress::hide(|| process::run_logged(&mut command, what, &log))?;
        } else {
            process::run_logged(&mut command, what, &log)?;
        }
        Ok(summary(&String::from_utf8_lossy(&fs::read(&log).unwrap_or_default())))
    }
}

/// Has sudo ask for the password now, where nothing else is on the terminal, unless this is root. True if the next sudo will ask once more.
fn sudo_will_ask_again() -> Result<bool> {
    if nix::unistd::geteuid().is_root() {
        return Ok(false);
    }
    // The program that apt is started with too: rules in sudoers may name it.
    let asked = progress::hide(|| Command::new("sudo").args(["env", "true"]).status());
    if !asked.context("cannot start sudo")?.success() {
        bail!("sudo did not let this user become root");
    }
    let silent = Command::new("sudo").args(["-n", "env", "true"]).output().context("cannot start sudo")?;
    Ok(!silent.status.success())
}

/// apt-get with the configuration `config`. sudo hands on no variables, so `env` behind it sets them.
fn install_command(config: &Path, root: bool, names: &[&str]) -> Command {
    let mut command = Command::new(if root { "env" } else { "sudo" });
    if !root {
        command.arg("env");
    }
    command.arg(format!("APT_CONFIG={}", config.display()));
    command.args(["DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "apt-get", "install", "-y", "-q"]);
    // A machine that has just started may be at its own updates.
    command.args(["-o", "DPkg::Lock::Timeout=300"]).args(names);
    command
}

/// apt's own count of what it installed, and what room that takes.
fn summary(said: &str) -> String {
    let wanted = |line: &&str| line.contains(" newly installed") || line.starts_with("After this operation");
    said.lines().filter(wanted).map(str::trim).collect::<Vec<_>>().join(" ")
}

/// Unpacks a package file into `to`.
pub fn unpack(file: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let what = format!("unpacking {}", file.display());
    process::output(Command::new("dpkg-deb").arg("-x").arg(file).arg(to), &what)
        .advise(|| "If the disk is full: the lab needs about 3 GB under target/")?;
    Ok(())
}

/// The machine's release, such as `bookworm`.
pub fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    if field("ID") != Some("debian") {
        bail!(
            "the lab prepares itself on Debian 12 or 13 (this machine says {}). Run it in a Debian container or \
             virtual machine",
            field("PRETTY_NAME").unwrap_or("nothing about itself")
        );
    }
    Ok(field("VERSION_CODENAME")
        .context("/etc/os-release has no VERSION_CODENAME")?
        .trim_matches('"')
        .to_owned())
}

fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    files.sort();
    Ok(files)
}

fn sources(mirrors: &Mirrors, release: &str, architecture: &str) -> String {
    let key = Path::new(KEYRING).exists().then(|| format!("signed-by={KEYRING}"));
    let line = |source: &Source, suite: &str| {
        let mut options = vec![format!("arch={architecture}")];
        options.extend(key.clone());
        options.extend(source.options.iter().cloned());
        format!("deb [{}] {} {suite} main\n", options.join(" "), source.uri)
    };
    if release == UNSTABLE {
        // It has no updates beside it.
        return line(&mirrors.main, release);
    }
    line(&mirrors.main, release)
        + &line(&mirrors.main, &format!("{release}-updates"))
        + &line(&mirrors.security, &format!("{release}-security"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_must_know_survives_sudo() {
        let words = |root| -> Vec<String> {
            let command = install_command(Path::new("/a clone/apt.conf"), root, &["make"]);
            let all = std::iter::once(command.get_program()).chain(command.get_args());
            all.map(|word| word.to_string_lossy().into_owned()).collect()
        };
        let user = words(false);
        assert_eq!(user[..3], ["sudo", "env", "APT_CONFIG=/a clone/apt.conf"]);
        assert!(user.contains(&"DEBIAN_FRONTEND=noninteractive".to_owned()), "{user:?}");
        assert_eq!(user[1..], words(true)[..]);
    }

    #[test]
    fn apt_says_what_it_installed() {
        let said = "Reading\n0 upgraded, 57 newly installed, 0 to remove and 3 not upgraded.\nNeed to get 1 MB\n\
                    After this operation, 210 MB of additional disk space will be used.\nGet:1";
        assert_eq!(
            summary(said),
            "0 upgraded, 57 newly installed, 0 to remove and 3 not upgraded. \
             After this operation, 210 MB of additional disk space will be used."
        );
    }

    #[test]
    fn sources_keep_the_machines_mirror_and_change_the_release() {
        let main =
            Source { uri: "http://m.test/debian".into(), options: vec!["check-valid-until=no".into()] };
        let security = Source { uri: "http://s.test/sec".into(), options: Vec::new() };
        let text = sources(&Mirrors { main, security }, "bookworm", "arm64");
        assert_eq!(text.lines().count(), 3);
        assert!(text.lines().all(|line| line.starts_with("deb [arch=arm64")));
        assert!(text.contains("check-valid-until=no] http://m.test/debian bookworm-updates main"));
        assert!(text.contains("http://s.test/sec bookworm-security main"));
    }
}
