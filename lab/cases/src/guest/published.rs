//! A driver for the published version-2 protocol, written from `dart-and-dma.md` 1.1 to 1.3 and nothing else, and what it must see.
//!
//! Also compiled into the unit tests of `crates/companion`, so it uses nothing but `core` and `alloc`'s types.

/// Registers of BAR 0 (1.1).
const VERSION: u32 = 0x00;
const MANAGED_BDF: u32 = 0x04;
const MAX_ENTRIES: u32 = 0x08;
const STATUS: u32 = 0x0c;
const CMD_GPA_LO: u32 = 0x10;
const CMD_GPA_HI: u32 = 0x14;
const DOORBELL: u32 = 0x18;
/// Commands.
pub const MAP: u32 = 1;
/// Commands.
pub const UNMAP: u32 = 2;
/// Status codes.
pub const OK: u32 = 0;
/// An entry failed.
pub const IOERR: u32 = 1;
/// The command is malformed.
pub const INVAL: u32 = 3;
/// What the driver fills memory with that the device is to write.
const STALE: u8 = 0xa5;

/// The two layouts that exist (1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// 32-bit lengths.
    A,
    /// 64-bit lengths, packed.
    B,
}

/// What the driver runs on: the function's registers, and guest memory by its physical addresses.
pub trait Hardware {
    /// Reads a register.
    fn read(&self, register: u32) -> u32;
    /// Writes a register.
    fn write(&self, register: u32, value: u32);
    /// Writes guest memory.
    fn store(&self, at: u64, bytes: &[u8]);
    /// Reads guest memory.
    fn load(&self, at: u64, len: usize) -> Vec<u8>;
}

/// Pages of guest memory that the driver has for itself.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    /// The command page.
    pub command: u64,
    /// Requests; 4 KiB.
    pub requests: u64,
    /// Responses; 4 KiB.
    pub responses: u64,
}

/// The driver.
pub struct Driver<'a> {
    hardware: &'a dyn Hardware,
    layout: Layout,
    pages: Pages,
}

/// An entry's response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// Name of the mapping.
    pub id: u64,
    /// Bus address; 0 of an unmapping.
    pub bus: u64,
    /// Bytes; 0 of an unmapping.
    pub len: u64,
    /// Status code.
    pub status: u32,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl<'a> Driver<'a> {
    /// Takes the function over.
    ///
    /// # Errors
    /// When it speaks another version.
    pub fn new(hardware: &'a dyn Hardware, layout: Layout, pages: Pages) -> Result<Self, String> {
        match hardware.read(VERSION) {
            2 => Ok(Self { hardware, layout, pages }),
            version => Err(format!("version {version}")),
        }
    }

    /// Bus, device and function of the device that it serves.
    pub fn managed(&self) -> u32 {
        self.hardware.read(MANAGED_BDF)
    }

    /// Most entries of a command.
    pub fn max_entries(&self) -> u32 {
        self.hardware.read(MAX_ENTRIES)
    }

    /// Status register.
    pub fn status(&self) -> u32 {
        self.hardware.read(STATUS)
    }

    /// Runs whatever command stands at `at`; the status register afterwards.
    pub fn ring(&self, at: u64) -> u32 {
        self.hardware.write(CMD_GPA_LO, at as u32);
        self.hardware.write(CMD_GPA_HI, (at >> 32) as u32);
        self.hardware.write(DOORBELL, 1);
        self.status()
    }

    /// Runs a command with these fields; the status register and the status in the command page.
    pub fn command(&self, kind: u32, count: u32, requests: u64, responses: u64) -> (u32, u32) {
        let mut page = Vec::new();
        for word in [kind, count, u32::from_ne_bytes([STALE; 4]), 0] {
            page.extend_from_slice(&word.to_le_bytes());
        }
        page.extend_from_slice(&requests.to_le_bytes());
        page.extend_from_slice(&responses.to_le_bytes());
        self.hardware.store(self.pages.command, &page);
        let status = self.ring(self.pages.command);
        (status, number(&self.hardware.load(self.pages.command + 8, 4)) as u32)
    }

    fn len_bytes(&self) -> usize {
        if self.layout == Layout::A { 4 } else { 8 }
    }

    /// Maps ranges (address, bytes), as many as fit a page; the batch's status and the responses.
    pub fn map(&self, ranges: &[(u64, u64)]) -> (u32, Vec<Response>) {
        let (len, size) = (self.len_bytes(), 20 + self.len_bytes());
        let mut requests = Vec::new();
        for (address, bytes) in ranges {
            requests.extend_from_slice(&address.to_le_bytes());
            requests.extend_from_slice(&bytes.to_le_bytes()[..len]);
            requests.extend_from_slice(&0u32.to_le_bytes());
        }
        let (status, bytes) = self.batch(MAP, ranges.len(), &requests, size);
        let response = |r: &[u8]| Response {
            id: number(&r[..8]),
            bus: number(&r[8..16]),
            len: number(&r[16..16 + len]),
            status: number(&r[16 + len..20 + len]) as u32,
        };
        (status, bytes.chunks_exact(size).map(response).collect())
    }

    /// Takes mappings down, as many as fit a page.
    pub fn unmap(&self, ids: &[u64]) -> (u32, Vec<Response>) {
        let requests: Vec<u8> =
            ids.iter().flat_map(|id| [id.to_le_bytes(), 0u64.to_le_bytes()].concat()).collect();
        let (status, bytes) = self.batch(UNMAP, ids.len(), &requests, 16);
        let response =
            |r: &[u8]| Response { id: number(&r[..8]), bus: 0, len: 0, status: number(&r[8..12]) as u32 };
        (status, bytes.chunks_exact(16).map(response).collect())
    }

    fn batch(&self, kind: u32, count: usize, requests: &[u8], response: usize) -> (u32, Vec<u8>) {
        assert!(requests.len() <= 4096 && count * response <= 4096);
        self.hardware.store(self.pages.requests, requests);
        self.hardware.store(self.pages.responses, &vec![STALE; count * response]);
        let (status, written) = self.command(kind, count as u32, self.pages.requests, self.pages.responses);
        assert_eq!(status, written, "register and command page differ");
        (status, self.hardware.load(self.pages.responses, count * response))
    }
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should_be: T) -> Result<(), String> {
    if is == should_be { Ok(()) } else { Err(format!("{what}: {is:x?}, not {should_be:x?}")) }
}

/// Maps, unmaps, batches, and every error. `ram` holds different pages of 4 KiB of the guest, at least 64; `not_ram` is a range that is none.
///
/// # Errors
/// What is not as the fact sheet says.
pub fn exercise(driver: &Driver<'_>, ram: &[u64], not_ram: u64) -> Result<(), String> {
    expect("most entries", driver.max_entries(), 4096)?;
    maps(driver, ram)?;
    failing_entries(driver, ram, not_ram)?;
    malformed(driver, ram, not_ram)
}

fn maps(driver: &Driver<'_>, ram: &[u64]) -> Result<(), String> {
    let ranges: Vec<(u64, u64)> = ram.iter().take(64).map(|address| (*address, 4096)).collect();
    for _ in 0..3 {
        let (status, one) = driver.map(&ranges[..1]);
        expect("status of a map", status, OK)?;
        let bus = one[0].bus;
        expect("a map's response", one[0], Response { id: ranges[0].0, bus, len: 4096, status: OK })?;
        let (status, rest) = driver.map(&ranges[1..]);
        expect("status of a batch", status, OK)?;
        for (response, (address, _)) in rest.iter().zip(&ranges[1..]) {
            let bus = response.bus;
            expect("of a batch", *response, Response { id: *address, bus, len: 4096, status: OK })?;
        }
        let mut buses: Vec<u64> = rest.iter().chain(&one).map(|response| response.bus).collect();
        buses.sort_unstable();
        buses.dedup();
        expect("different bus addresses", buses.len(), ranges.len())?;
        let ids: Vec<u64> = ranges.iter().map(|(address, _)| *address).collect();
        let (status, done) = driver.unmap(&ids);
        expect("status of an unmap", status, OK)?;
        for (response, id) in done.iter().zip(&ids) {
            expect("an unmap's response", *response, Response { id: *id, bus: 0, len: 0, status: OK })?;
        }
    }
    Ok(())
}

/// Neither the first failure stops a batch nor is what was done before taken back; of a failed map only the status is written.
fn failing_entries(driver: &Driver<'_>, ram: &[u64], not_ram: u64) -> Result<(), String> {
    let untouched = number(&[STALE; 8]);
    let untouched_len = if driver.layout == Layout::A { number(&[STALE; 4]) } else { untouched };
    let failed = Response { id: untouched, bus: untouched, len: untouched_len, status: IOERR };
    let batch = [
        (ram[0], 4096),
        (not_ram, 4096),
        (ram[0], 4096),
        (ram[1], 0),
        (!4095, 4096),
        (ram[1], u64::from(u32::MAX) & !4095),
        (ram[2], 4096),
    ];
    let (status, responses) = driver.map(&batch);
    expect("status of a batch with failures", status, IOERR)?;
    for (index, good) in [true, false, false, false, false, false, true].into_iter().enumerate() {
        if good {
            expect("a good entry's status", (index, responses[index].status), (index, OK))?;
        } else {
            expect("a failed entry", (index, responses[index]), (index, failed))?;
        }
    }
    let (status, responses) = driver.unmap(&[ram[0], ram[1], ram[2], ram[2]]);
    expect("status of an unmap with failures", status, IOERR)?;
    let codes: Vec<u32> = responses.iter().map(|response| response.status).collect();
    expect("unmaps of what is mapped and what is not", codes, vec![OK, IOERR, OK, IOERR])
}

/// No entry of these is touched.
fn malformed(driver: &Driver<'_>, ram: &[u64], not_ram: u64) -> Result<(), String> {
    expect("a good one before", driver.map(&[(ram[0], 4096)]).0, OK)?;
    let Pages { requests, responses, .. } = driver.pages;
    let cases = [
        ("unknown type", (0, 1, requests, responses)),
        ("unknown type", (3, 1, requests, responses)),
        ("count 0", (UNMAP, 0, requests, responses)),
        ("count beyond the limit", (UNMAP, 4097, requests, responses)),
        ("count beyond any limit", (UNMAP, u32::MAX, requests, responses)),
        ("no requests", (UNMAP, 1, 0, responses)),
        ("no responses", (UNMAP, 1, requests, 0)),
        ("requests outside RAM", (UNMAP, 1, not_ram, responses)),
        ("responses outside RAM", (UNMAP, 1, requests, not_ram)),
        ("requests that wrap", (UNMAP, 2, u64::MAX - 15, responses)),
    ];
    for (what, (kind, count, requests, responses)) in cases {
        // The request that a device would find which looked at it after all.
        driver.hardware.store(driver.pages.requests, &[ram[0].to_le_bytes(), [0; 8]].concat());
        expect(what, driver.command(kind, count, requests, responses), (INVAL, INVAL))?;
    }
    expect("no command", driver.ring(0), INVAL)?;
    expect("a good command", driver.map(&[(ram[1], 4096)]).0, OK)?;
    expect("a command outside RAM", driver.ring(not_ram), INVAL)?;
    expect("a command that wraps", driver.ring(u64::MAX - 8), INVAL)?;
    expect("nothing was touched", driver.unmap(&[ram[0], ram[1]]).0, OK)
}
