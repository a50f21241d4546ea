/// A message-signalled interrupt as a PCI function sends it: a 32-bit write of `data` to `address`
/// (PCI Local Bus 3.0, section 6.8). On this machine the address is the v2m frame's doorbell and the data an SPI's INTID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Guest-physical address of the doorbell.
    pub address: u64,
    /// Value written.
    pub data: u32,
}

/// Takes message-signalled interrupts, from any thread, without blocking.
pub trait MsiSink: Send + Sync {
    /// Delivers `message` to the guest. A message that names no interrupt of the guest is dropped and counted by the sink.
    fn send(&self, message: MsiMessage);
}

/// A level-triggered interrupt line of one device, from any thread, without blocking.
pub trait IrqLine: Send + Sync {
    /// Drives the line: `true` asserts it, `false` releases it.
    fn set(&self, asserted: bool);
}
