use std::io;

/// What a function of the host or its DMA domain can refuse or fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device is no longer there.
    #[error("{0} is gone: it was unplugged or its link is down")]
    Gone(crate::PciAddress),
    /// Offset, index or count beyond what the function has.
    #[error("{what} is out of range")]
    OutOfRange {
        /// What was asked for.
        what: String,
    },
    /// Not a multiple of the granule.
    #[error("{what} must be a multiple of 16 KiB")]
    Unaligned {
        /// What was asked for.
        what: String,
    },
    /// The host cannot map this part of the BAR.
    #[error("BAR {bar} at {offset:#x}+{len:#x} cannot be mapped: {why}")]
    NotMappable {
        /// Index of the BAR.
        bar: usize,
        /// Offset within it.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The reason.
        why: &'static str,
    },
    /// The device does not finish what it does.
    #[error("{0} still has transactions pending; power-cycle it if it stays so")]
    Busy(crate::PciAddress),
    /// The device did not come back from a reset as it was.
    #[error(
        "{address} did not come back from a reset ({why}); it is not used again until it is released: power-cycle it"
    )]
    ResetFailed {
        /// Where it is.
        address: crate::PciAddress,
        /// What was seen.
        why: String,
    },
    /// Nothing the host knows resets the device.
    #[error(
        "{0} has no reset that the host can do (no function-level reset, and others share its bus); what one guest left in it the next one finds"
    )]
    NoReset(crate::PciAddress),
    /// The device cannot use these addresses.
    #[error("the IOMMU cannot map {len:#x} bytes at {address:#x} for DMA; it can map {usable}")]
    Reserved {
        /// Bus address.
        address: u64,
        /// Bytes.
        len: u64,
        /// What it can map.
        usable: String,
    },
    /// The domain's bytes are used up.
    #[error("no {len:#x} bytes are left for DMA: {mapped:#x} of {limit:#x} are mapped")]
    OutOfBytes {
        /// Asked for.
        len: u64,
        /// In use.
        mapped: u64,
        /// All there is.
        limit: u64,
    },
    /// The domain's mappings are used up.
    #[error("all {limit} DMA mappings are in use")]
    OutOfEntries {
        /// All there are.
        limit: u32,
    },
    /// There is room, but not in one piece.
    #[error("no {len:#x} bytes of DMA addresses are free in one piece")]
    Fragmented {
        /// Asked for.
        len: u64,
    },
    /// There is room once addresses that were unmapped have returned.
    #[error(
        "no {len:#x} bytes of DMA addresses are free until ones that were unmapped have returned, in {until:?}"
    )]
    Returning {
        /// Asked for.
        len: u64,
        /// Until the next ones return.
        until: std::time::Duration,
    },
    /// Exactly this was not mapped.
    #[error("nothing is mapped for DMA as {len:#x} bytes at bus address {address:#x}")]
    NotMapped {
        /// Bus address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// The host's kernel or driver failed a call.
    #[error("{call}: {source}")]
    Host {
        /// The call, with what it was about.
        call: String,
        /// The host's own reason.
        #[source]
        source: io::Error,
    },
}

/// Result of a call to a function of the host or its DMA domain.
pub type Result<T> = std::result::Result<T, Error>;
