//! One block request (virtio 1.2, section 5.2.6).

use super::{Disk, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR, Scratch};
use crate::queue::Buffers;
use crate::{Health, QueueError, Request, Stop};
use outboard_bus::warn_limited;
use std::io;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Flag of a discard or write-zeroes range: the room may go.
const UNMAP: u32 = 1;
/// Most bytes that go to the image in one piece: a request may have 4 GiB, and a reset waits for no more than one piece.
const PIECE: u64 = 4 << 20;
/// Bytes of a disk's serial number.
pub const ID_LEN: usize = 20;

/// What a queue's worker needs to serve requests.
pub struct Server<'a> {
    pub name: &'a str,
    pub disk: &'a Disk,
    pub id: [u8; ID_LEN],
    /// The driver cannot flush, so every write must be durable by itself (virtio 1.2, section 5.2.6.2).
    pub write_through: bool,
    /// The worker is to end: a request that is not done fails.
    pub stop: &'a Stop,
    pub scratch: Scratch,
    /// A disk whose code has panicked once is in an unknown state: from then on every request is an I/O error.
    pub health: &'a Health,
}

enum Failure {
    Io(io::Error),
    /// The driver asked for what cannot be: beyond the end, odd lengths.
    Refused,
    Unsupported,
    /// The device has failed before.
    DeviceFailed,
    /// The device is being reset.
    Stopped,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::Unsupported { Self::Unsupported } else { Self::Io(error) }
    }
}

impl Server<'_> {
    /// Does what `request` says and writes its status; the number of bytes written.
    pub fn serve(&mut self, request: &mut Request<'_>) -> Result<u32, QueueError> {
        let too_short = QueueError::TooShort(request.head);
        let mut header = [0; 16];
        let got = request.readable.read(&mut header);
        let Some(status) = request.writable.pop_last_byte().filter(|_| got == header.len()) else {
            return Err(too_short);
        };
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector));
        let (code, written) = match self.contained(kind, sector, request) {
            Ok(written) => (S_OK, written + 1),
            Err(Failure::Unsupported) => (S_UNSUPP, 0),
            Err(Failure::Refused | Failure::Stopped | Failure::DeviceFailed) => (S_IOERR, 0),
            Err(Failure::Io(error)) => {
                warn_limited!("{}: request {kind} at sector {sector} failed: {error}", self.name);
                (S_IOERR, 0)
            }
        };
        status.copy_from(&[code]);
        Ok(written)
    }

    /// As [`Server::dispatch`], where a panic of the image's code fails the device and not the machine.
    fn contained(&mut self, kind: u32, sector: u64, request: &mut Request<'_>) -> Result<u32, Failure> {
        let (health, name) = (self.health, self.name);
        if health.failure().is_some() {
            return Err(Failure::DeviceFailed);
        }
        health.contain(name, || self.dispatch(kind, sector, request)).unwrap_or(Err(Failure::DeviceFailed))
    }

    /// The number of bytes written before the status.
    fn dispatch(&mut self, kind: u32, sector: u64, request: &mut Request<'_>) -> Result<u32, Failure> {
        match kind {
            T_IN => {
                let len = request.writable.len();
                let offset = self.checked(sector, len)?;
                self.in_pieces(&mut request.writable, offset, Disk::read)?;
                // A chain is shorter than 4 GiB.
                Ok(len as u32)
            }
            T_OUT => {
                let offset = self.checked(sector, request.readable.len())?;
                self.in_pieces(&mut request.readable, offset, Disk::write)?;
                self.settle()?;
                Ok(0)
            }
            T_FLUSH => self.disk.flush().map(|()| 0).map_err(Failure::from),
            T_GET_ID => Ok(request.writable.write(&self.id) as u32),
            T_DISCARD | T_WRITE_ZEROES => {
                self.ranges(kind, request)?;
                self.settle()?;
                Ok(0)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Moves `buffers` to or from the disk at `offset`, piece by piece.
    fn in_pieces(
        &mut self,
        buffers: &mut Buffers<'_>,
        mut offset: u64,
        transfer: fn(&Disk, &[crate::GuestSlice<'_>], u64, &mut Scratch) -> io::Result<()>,
    ) -> Result<(), Failure> {
        if buffers.len() <= PIECE {
            return Ok(transfer(self.disk, buffers.slices(), offset, &mut self.scratch)?);
        }
        let mut piece = Vec::new();
        while !buffers.is_empty() {
            self.go_on()?;
            piece.clear();
            let len = buffers.take(PIECE, &mut piece);
            transfer(self.disk, &piece, offset, &mut self.scratch)?;
            offset += len;
        }
        Ok(())
    }

    fn go_on(&self) -> Result<(), Failure> {
        if self.stop.requested() { Err(Failure::Stopped) } else { Ok(()) }
    }

    fn settle(&self) -> io::Result<()> {
        if self.write_through { self.disk.flush() } else { Ok(()) }
    }

    /// Byte offset of `len` bytes from `sector`, if they are whole sectors within the disk.
    fn checked(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(Failure::Refused)?;
        let end = offset.checked_add(len).ok_or(Failure::Refused)?;
        if len.is_multiple_of(SECTOR) && end <= self.disk.len() { Ok(offset) } else { Err(Failure::Refused) }
    }

    /// Discard or write-zeroes: a list of (sector, number of sectors, flags).
    fn ranges(&self, kind: u32, request: &mut Request<'_>) -> Result<(), Failure> {
        const RANGE_LEN: u64 = 16;
        let len = request.readable.len();
        if len == 0 || !len.is_multiple_of(RANGE_LEN) || len / RANGE_LEN > MAX_RANGES.into() {
            return Err(Failure::Refused);
        }
        for _ in 0..len / RANGE_LEN {
            let mut raw = [0; RANGE_LEN as usize];
            request.readable.read(&mut raw);
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = raw;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            let known = if kind == T_WRITE_ZEROES { UNMAP } else { 0 };
            if flags & !known != 0 {
                return Err(Failure::Unsupported);
            }
            let bytes = u64::from(sectors) * SECTOR;
            let offset = self.checked(sector, bytes)?;
            if sectors > MAX_RANGE_SECTORS {
                return Err(Failure::Refused);
            }
            if bytes == 0 {
                continue;
            }
            self.go_on()?;
            match kind {
                T_DISCARD => self.disk.discard(offset, bytes)?,
                _ => self.disk.write_zeroes(offset, bytes, flags & UNMAP != 0)?,
            }
        }
        Ok(())
    }
}
