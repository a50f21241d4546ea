//! Who chooses where a device finds memory.

use outboard_dart::Config;
use std::str::FromStr;

/// Who chooses where a device finds memory, and how much of it there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaPolicy {
    /// At the guest's own addresses, all of its memory for as long as it runs. What VMMs on Linux usually do.
    Identity,
    /// As a Mac does: nothing but what the guest asks for, where the DART puts it. On Linux its addresses are programmed into the real IOMMU.
    Mac(Config),
}

/// A DMA policy that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// No such policy.
    #[error("there is no dma={0}; known are identity and mac")]
    Unknown(String),
}

impl DmaPolicy {
    /// A Mac's limits.
    pub const MAC: Self = Self::Mac(Config::MAC);

    /// Whether the guest has to ask for each mapping.
    pub fn asks(self) -> bool {
        matches!(self, Self::Mac(_))
    }
}

impl Default for DmaPolicy {
    /// What the host does by nature.
    fn default() -> Self {
        if cfg!(target_os = "macos") { Self::MAC } else { Self::Identity }
    }
}

impl FromStr for DmaPolicy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "identity" => Ok(Self::Identity),
            "mac" => Ok(Self::MAC),
            _ => Err(PolicyError::Unknown(text.into())),
        }
    }
}
