use std::fmt;

/// What a thread does, and with that what it may ask of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Builds machines, waits for what becomes of them, takes them apart.
    Main,
    /// Waits for SIGTERM and its like.
    Signals,
    /// Serves `outboard status` and `outboard device`.
    Control,
    /// Runs a vCPU and serves its accesses to devices.
    Vcpu,
    /// A queue of a disk.
    Block,
    /// The user-mode network.
    Net,
    /// Sockets between host and guest.
    Vsock,
    /// Carries bytes between a guest console and the host.
    Console,
    /// Random numbers for the guest.
    Entropy,
    /// Watches a device of the host and its interrupts.
    Pci,
    /// Maps guest memory for a device of the host.
    Dma,
    /// Writes log files.
    Log,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Main,
        Self::Signals,
        Self::Control,
        Self::Vcpu,
        Self::Block,
        Self::Net,
        Self::Vsock,
        Self::Console,
        Self::Entropy,
        Self::Pci,
        Self::Dma,
        Self::Log,
    ];

    /// Its name in messages and in docs/jail.md.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Signals => "signals",
            Self::Control => "control",
            Self::Vcpu => "vcpu",
            Self::Block => "block",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Console => "console",
            Self::Entropy => "entropy",
            Self::Pci => "pci",
            Self::Dma => "dma",
            Self::Log => "log",
        }
    }
}

impl fmt::Display for ThreadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
