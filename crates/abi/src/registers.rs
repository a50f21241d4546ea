//! Registers of BAR 0, and the constants of the C header.

/// Defines constants, and lists them for the C header.
macro_rules! constants {
    ($list:ident: $($(#[doc = $doc:literal])+ $name:ident: $type:ty = $value:expr;)+) => {
        $($(#[doc = $doc])+ pub const $name: $type = $value;)+
        /// The constants above as the C header shows them: name, value, comment.
        pub const $list: &[(&str, u64, &[&str])] = &[$((stringify!($name), $value as u64, &[$($doc),+])),+];
    };
}
pub(crate) use constants;

constants! { REGISTERS:
    /// PCI vendor of the device. Not assigned to anybody: provisional until the project has an id of its own.
    PCI_VENDOR: u16 = 0x1234;
    /// PCI device id of the device.
    PCI_DEVICE: u16 = 0x0bd0;
    /// PCI class code: system peripheral, other.
    PCI_CLASS: u32 = 0x08_8000;
    /// Bytes of BAR 0.
    BAR_BYTES: u32 = 0x1000;
    /// R, 32 bits: [`MAGIC_VALUE`].
    MAGIC: u32 = 0x000;
    /// What [`MAGIC`] reads.
    MAGIC_VALUE: u32 = 0x414d_444f;
    /// R, 32 bits: protocol version, major in bits 31:16, minor in bits 15:0. Another major number is another protocol.
    VERSION: u32 = 0x004;
    /// The version described here.
    VERSION_VALUE: u32 = 0x0001_0000;
    /// R, 32 bits: feature bits. Unknown ones are to be ignored.
    FEATURES: u32 = 0x008;
    /// Feature: [`QUEUE_DOORBELL_LATER`] works.
    FEATURE_LATER: u32 = 1 << 0;
    /// Feature: [`CONTROL_PANICKED`] is understood.
    FEATURE_PANICKED: u32 = 1 << 1;
    /// R, 32 bits: the root port whose slot is served: device number in bits 7:3, function number in bits 2:0, on bus 0.
    SERVED: u32 = 0x00c;
    /// R, 64 bits: most bytes mapped at a time.
    LIMIT_BYTES: u32 = 0x010;
    /// R, 32 bits: most mappings at a time.
    LIMIT_ENTRIES: u32 = 0x018;
    /// R, 32 bits: addresses and lengths are multiples of this many bytes.
    GRANULE: u32 = 0x01c;
    /// R, 32 bits: width of the bus addresses that come back.
    ADDRESS_BITS: u32 = 0x020;
    /// R, 32 bits: number of queues, 2 to [`MAX_QUEUES`]: one for each vCPU, and one for what nobody waits for.
    QUEUES: u32 = 0x024;
    /// Most queues there can be.
    MAX_QUEUES: u32 = 33;
    /// R, 32 bits: most entries of a batch.
    BATCH: u32 = 0x028;
    /// Entries of a batch that every device takes.
    MAX_BATCH: u32 = 256;
    /// W, 32 bits: [`CONTROL_ENABLE`], [`CONTROL_RESET`] or [`CONTROL_PANICKED`]; anything else is ignored.
    CONTROL: u32 = 0x030;
    /// The guest asks for mappings from now on. Until then the served functions may not start DMA.
    CONTROL_ENABLE: u32 = 1;
    /// Stops and resets the served functions, takes down every mapping and disables the device. Done when the store retires. The functions keep
    /// their BARs and memory decoding; bus master, interrupts and everything else are as after power-on.
    CONTROL_RESET: u32 = 2;
    /// The guest's kernel has panicked. Changes nothing on the device: the host takes note of it.
    CONTROL_PANICKED: u32 = 3;
    /// R, 32 bits: state of the device.
    STATE: u32 = 0x034;
    /// Not enabled.
    STATE_OFF: u32 = 0;
    /// Enabled.
    STATE_ON: u32 = 1;
    /// The slot is empty, or its device has failed: mappings can only be taken down. A device that is added to the slot makes it [`STATE_OFF`] again,
    /// with limits of its own.
    STATE_GONE: u32 = 2;
    /// R, 64 bits: bytes mapped now.
    STAT_BYTES: u32 = 0x080;
    /// R, 64 bits: mappings now.
    STAT_ENTRIES: u32 = 0x088;
    /// R, 64 bits: mappings made.
    STAT_MAPS: u32 = 0x090;
    /// R, 64 bits: mappings taken down.
    STAT_UNMAPS: u32 = 0x098;
    /// R, 64 bits: entries refused.
    STAT_REFUSED: u32 = 0x0a0;
    /// R, 64 bits: batches taken, of both kinds.
    STAT_BATCHES: u32 = 0x0a8;
    /// First queue's registers; queue n is n times [`QUEUE_STRIDE`] further.
    QUEUE_FIRST: u32 = 0x400;
    /// Bytes of a queue's registers.
    QUEUE_STRIDE: u32 = 0x20;
    /// RW, 64 bits (or two halves), in the queue: guest-physical address of its entries, a multiple of 64.
    QUEUE_BASE: u32 = 0x00;
    /// W, 32 bits, in the queue: work through this many entries now.
    QUEUE_DOORBELL: u32 = 0x08;
    /// W, 32 bits, in the queue: take down this many mappings when there is time.
    QUEUE_DOORBELL_LATER: u32 = 0x0c;
    /// R, 32 bits, in the queue: [`Status`](crate::Status) of the last batch: the first that is not success.
    QUEUE_STATUS: u32 = 0x10;
    /// R, 32 bits, in the queue: number of the last batch's entries that did not succeed.
    QUEUE_FAILED: u32 = 0x14;
    /// Bytes of an entry.
    ENTRY_BYTES: u32 = 64;
}
