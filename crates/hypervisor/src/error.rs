use std::io;

/// What a hypervisor back end can refuse or fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This host has no hypervisor that can be used.
    #[error("{why}; {next}")]
    Unavailable {
        /// What is missing.
        why: String,
        /// What the user can do about it.
        next: &'static str,
    },
    /// The back end has no such feature.
    #[error("{backend} on this host cannot provide {what}")]
    Unsupported {
        /// Name of the back end.
        backend: &'static str,
        /// What was asked for.
        what: String,
    },
    /// Not a multiple of [`crate::GRANULE`].
    #[error(
        "mapping {len:#x} bytes at guest address {ipa:#x}: address, host address and length must be multiples of 16 KiB"
    )]
    Unaligned {
        /// Guest-physical address.
        ipa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range is, in part, mapped already.
    #[error("mapping {len:#x} bytes at guest address {ipa:#x} would overlap another mapping")]
    Overlap {
        /// Guest-physical address.
        ipa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Exactly this range was not mapped (or bound) before.
    #[error("nothing was mapped as {len:#x} bytes at guest address {ipa:#x}")]
    NotMapped {
        /// Guest-physical address.
        ipa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range ends above the VM's address width.
    #[error("{len:#x} bytes at guest address {ipa:#x} end beyond the VM's {ipa_bits}-bit address space")]
    BeyondAddressLimit {
        /// Guest-physical address.
        ipa: u64,
        /// Length in bytes.
        len: u64,
        /// Width of the VM's guest-physical addresses.
        ipa_bits: u8,
    },
    /// The interrupt controller has no such interrupt for this use.
    #[error("interrupt {intid} cannot be raised this way")]
    NoSuchInterrupt {
        /// Interrupt number (INTID).
        intid: u32,
    },
    /// A call came before or after its phase.
    #[error("{0}")]
    WrongPhase(&'static str),
    /// The host's kernel or framework failed a call.
    #[error("{call}: {source}")]
    Host {
        /// The call, with what it was about.
        call: String,
        /// The host's own reason.
        #[source]
        source: io::Error,
    },
}

/// Result of a hypervisor call.
pub type Result<T> = std::result::Result<T, Error>;
