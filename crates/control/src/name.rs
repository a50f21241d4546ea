use crate::Error;
use std::fmt;
use std::str::FromStr;

/// Most bytes of a name: a socket's whole path has to fit into 104 (macOS) or 108 bytes (Linux).
const MOST: usize = 32;

/// Name of a VM: fit for a file name and a command line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// The name `vmN`.
    pub fn numbered(n: u32) -> Self {
        Self(format!("vm{n}"))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let begins = text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if plain && begins && text.len() <= MOST {
            Ok(Self(text.into()))
        } else {
            Err(Error::BadName(text.into()))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
