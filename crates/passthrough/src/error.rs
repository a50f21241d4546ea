use outboard_host_pci::PciAddress;

/// Why a function cannot be passed through.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host's function failed.
    #[error("{address} cannot be prepared for the guest")]
    Host {
        /// Where it is.
        address: PciAddress,
        /// The host's reason.
        #[source]
        source: outboard_host_pci::Error,
    },
    /// It is a bridge.
    #[error("{address} is a bridge (header type {header_type}); pass through the devices behind it instead")]
    NotAnEndpoint {
        /// Where it is.
        address: PciAddress,
        /// As its config space says.
        header_type: u8,
    },
    /// Its registers contradict themselves.
    #[error(
        "{address} cannot be passed through: {why}; if it was just plugged in or reset, power-cycle it and try again"
    )]
    Malformed {
        /// Where it is.
        address: PciAddress,
        /// What is wrong.
        why: String,
    },
    /// The host is out of file descriptors or threads.
    #[error("{what} could not be made; raise the limit of open files (`ulimit -n`) or of threads")]
    Resources {
        /// What was to be made.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// The slot's place in the guest is not free.
    #[error("no place for {name} in the guest")]
    Place {
        /// The function.
        name: String,
        /// Why.
        #[source]
        source: outboard_pci::AddError,
    },
}
