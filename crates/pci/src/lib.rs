//! Config space, capabilities, MSI-X, ECAM and root ports.
