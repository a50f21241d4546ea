//! A guest's PCI function made out of a function of the host.
