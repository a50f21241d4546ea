//! The Debian mirror of this machine, from its own apt configuration. Other sources in there are ignored.

use anyhow::{Result, bail};
use std::fs;
use std::path::Path;

/// Where the suites come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirrors {
    /// For `CODENAME` and `CODENAME-updates`.
    pub main: Source,
    /// For `CODENAME-security`.
    pub security: Source,
}

/// An address and the options that its mirror needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// As apt takes it.
    pub uri: String,
    /// Options in the one-line form, such as `check-valid-until=no`.
    pub options: Vec<String>,
}

/// One source in the configuration.
struct Entry {
    source: Source,
    suite: String,
    components: Vec<String>,
    signed_by: Option<String>,
}

/// Reads the configuration under `etc` (`/etc/apt`) of a machine that runs release `codename`.
pub fn find(etc: &Path, codename: &str) -> Result<Mirrors> {
    let mut entries = Vec::new();
    let mut files = vec![etc.join("sources.list")];
    if let Ok(folder) = fs::read_dir(etc.join("sources.list.d")) {
        files.extend(folder.flatten().map(|entry| entry.path()));
    }
    files.sort();
    for file in &files {
        let Ok(text) = fs::read_to_string(file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => entries.extend(text.lines().filter_map(parse_line)),
            Some("sources") => entries.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    entries.retain(is_debian);
    let with_suite =
        |suite: &str| entries.iter().find(|entry| entry.suite == suite).map(|entry| entry.source.clone());
    let Some(main) = with_suite(codename).or_else(|| with_suite("stable")) else {
        bail!(
            "{} names no Debian mirror for '{codename}'. Add a line such as \
             `deb MIRROR {codename} main` to {}/sources.list and run this again",
            etc.display(),
            etc.display()
        );
    };
    let security = with_suite(&format!("{codename}-security")).or_else(|| with_suite("stable-security"));
    let security =
        security.unwrap_or_else(|| Source { uri: beside(&main.uri), options: main.options.clone() });
    Ok(Mirrors { main, security })
}

/// Where a mirror of `debian` usually has `debian-security`.
fn beside(uri: &str) -> String {
    format!("{}-security", uri.trim_end_matches('/'))
}

/// Others offer a suite `bookworm` too; Debian's has the component `main` and is signed with Debian's key, which is
/// the default or comes from the package `debian-archive-keyring`.
fn is_debian(entry: &Entry) -> bool {
    let key = entry.signed_by.as_deref();
    entry.components.iter().any(|component| component == "main")
        && key.is_none_or(|path| path.contains("debian-archive") || path.contains("debian-"))
}

/// A line `deb [options] URI SUITE COMPONENT…` (sources.list(5)).
fn parse_line(line: &str) -> Option<Entry> {
    let rest = line.split('#').next()?.trim().strip_prefix("deb")?;
    let rest = rest.strip_prefix(char::is_whitespace)?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => ("", rest),
    };
    let option = |name: &str| {
        options
            .split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .map(str::to_owned)
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?.to_owned(), words.next()?.to_owned());
    let keep = ["check-valid-until", "trusted"];
    let kept = keep.iter().filter_map(|name| Some(format!("{name}={}", option(name)?))).collect();
    Some(Entry {
        source: Source { uri, options: kept },
        suite: suite.trim_end_matches('/').to_owned(),
        components: words.map(str::to_owned).collect(),
        signed_by: option("signed-by"),
    })
}

/// Stanzas of `Field: value` lines (sources.list(5), deb822 format).
fn parse_deb822(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |name: &str| {
            let prefix = format!("{name}:");
            let starts =
                |line: &&str| line.get(..prefix.len()).is_some_and(|p| p.eq_ignore_ascii_case(&prefix));
            let at = stanza.iter().position(starts)?;
            let more = stanza[at + 1..].iter().take_while(|line| line.starts_with([' ', '\t']));
            let value =
                more.fold(stanza[at][prefix.len()..].to_owned(), |value, line| value + " " + line.trim());
            Some(value.trim().to_owned())
        };
        let words = |name: &str| field(name).map_or_else(Vec::new, |value| split(&value));
        let off = field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if off || !words("Types").iter().any(|kind| kind == "deb") {
            continue;
        }
        let mut options = Vec::new();
        for (name, option) in [("Check-Valid-Until", "check-valid-until"), ("Trusted", "trusted")] {
            options.extend(field(name).map(|value| format!("{option}={value}")));
        }
        for uri in words("URIs") {
            for suite in words("Suites") {
                entries.push(Entry {
                    source: Source { uri: uri.clone(), options: options.clone() },
                    suite,
                    components: words("Components"),
                    signed_by: field("Signed-By"),
                });
            }
        }
    }
    entries
}

fn split(value: &str) -> Vec<String> {
    value.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etc(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir(folder.path().join("sources.list.d")).expect("a folder");
        for (name, text) in files {
            fs::write(folder.path().join(name), text).expect("a file");
        }
        folder
    }

    #[test]
    fn deb822_among_others() {
        let folder = etc(&[
            ("sources.list.d/other.list", "deb https://other.test/apt bookworm stable\n"),
            (
                "sources.list.d/a.sources",
                "Types: deb\nURIs: https://third.test/x\nSuites: bookworm\nComponents: main\nSigned-By: /usr/share/keyrings/third.gpg\n",
            ),
            (
                "sources.list.d/debian.sources",
                "# a comment\nTypes: deb deb-src\nURIs: http://m.test/debian\nSuites: bookworm bookworm-updates\n\
                 Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
                 Types: deb\n# inside\nURIs: http://s.test/debian-security\nSuites: bookworm-security\nComponents: main\n\
                 Check-Valid-Until: no\n",
            ),
        ]);
        let found = find(folder.path(), "bookworm").expect("a mirror");
        assert_eq!(found.main.uri, "http://m.test/debian");
        assert_eq!(found.security.uri, "http://s.test/debian-security");
        assert_eq!(found.security.options, ["check-valid-until=no"]);
    }

    #[test]
    fn one_line_form_without_a_security_source() {
        let text = "# deb http://old.test/debian trixie main\ndeb-src http://m.test/debian trixie main\n\
                    deb [arch=amd64 trusted=yes] mirror+file:/etc/apt/mirrors.list trixie main contrib # fast\n";
        let folder = etc(&[("sources.list", text)]);
        let found = find(folder.path(), "trixie").expect("a mirror");
        assert_eq!(found.main.uri, "mirror+file:/etc/apt/mirrors.list");
        assert_eq!(found.main.options, ["trusted=yes"]);
        assert_eq!(found.security.uri, "mirror+file:/etc/apt/mirrors.list-security");
    }

    #[test]
    fn a_disabled_or_missing_mirror_is_an_error_that_says_what_to_add() {
        let stanza =
            "Enabled: no\nTypes: deb\nURIs: http://m.test/debian\nSuites: bookworm\nComponents: main\n";
        let folder = etc(&[("sources.list.d/debian.sources", stanza)]);
        let error = find(folder.path(), "bookworm").expect_err("no mirror").to_string();
        assert!(error.contains("deb MIRROR bookworm main"), "{error}");
    }
}
