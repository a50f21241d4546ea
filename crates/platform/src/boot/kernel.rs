use super::error::{BootError, open_file};
use super::unpack::{Compression, Unpacker};
use crate::GuestMemory;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};

/// Bytes of an arm64 `Image`'s header (booting.rst, section 4).
const HEADER_LEN: usize = 64;
/// `ARM\x64` at offset 56.
const IMAGE_MAGIC: &[u8] = b"ARM\x64";
/// flags bit 0: big-endian kernel.
const FLAG_BIG_ENDIAN: u64 = 1;
/// Unpacked piece by piece, so that a compressed kernel needs no second copy of itself.
const CHUNK: usize = 256 * 1024;

/// Container of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// Flat arm64 `Image`.
    Image,
    /// gzip-compressed `Image` (`Image.gz`).
    GzipImage,
    /// EFI zboot image with a gzip payload.
    ZbootGzip,
    /// EFI zboot image with a zstd payload.
    ZbootZstd,
}

impl fmt::Display for KernelFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Image => "arm64 Image",
            Self::GzipImage => "gzip-compressed arm64 Image",
            Self::ZbootGzip => "EFI zboot image (gzip)",
            Self::ZbootZstd => "EFI zboot image (zstd)",
        })
    }
}

/// A kernel file, opened, recognised and its header checked.
#[derive(Debug)]
pub struct Kernel {
    file: File,
    path: PathBuf,
    format: KernelFormat,
    /// The bytes of the file that hold the `Image`, packed or not.
    payload: Range<u64>,
    header: ImageHeader,
}

/// The fields of an `Image`'s header that a loader needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ImageHeader {
    text_offset: u64,
    /// Memory that the kernel occupies from its first byte, its zeroed data included.
    image_size: u64,
}

impl Kernel {
    /// Opens `path` and finds out what it is.
    ///
    /// # Errors
    /// [`BootError`] that says what the file is instead, or what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let (file, len) = open_file("kernel", path)?;
        let mut start = [0; 0x400];
        let n = read_start(&file, &mut start).map_err(|source| unreadable(path, source))?;
        let (format, payload) = recognise(&start[..n], len, path)?;
        let image_start = match format.compression() {
            None => start[..n.min(HEADER_LEN)].to_vec(),
            Some(compression) => {
                let mut header = vec![0; HEADER_LEN];
                let n = Unpacker::new(&file, &payload, compression, path)?.fill(&mut header)?;
                header.truncate(n);
                header
            }
        };
        let header = ImageHeader::parse(&image_start, path)?;
        if format == KernelFormat::Image {
            check_complete(&file, &start[..n], len, path)?;
        }
        Ok(Self { file, path: path.to_owned(), format, payload, header })
    }

    /// What kind of file it is.
    pub fn format(&self) -> KernelFormat {
        self.format
    }

    /// Puts the kernel into guest RAM, `text_offset` above the 2 MiB aligned `base`; returns the memory it occupies.
    pub(super) fn load(
        &self,
        memory: &GuestMemory,
        base: u64,
        ram_end: u64,
    ) -> Result<Range<u64>, BootError> {
        let no_room =
            |end: u64| BootError::NoRoom { what: "the kernel", needs: end - base, ram: ram_end - base };
        let start = base.saturating_add(self.header.text_offset);
        let end = start.saturating_add(self.header.image_size);
        if end > ram_end {
            return Err(no_room(end));
        }
        let loaded = match self.format.compression() {
            None => self.copy_flat(memory, start, ram_end)?,
            Some(compression) => self.unpack(compression, memory, start, ram_end)?,
        };
        // An old kernel's header has no image_size; then its file's length must do.
        Ok(start..end.max(start + loaded))
    }

    fn copy_flat(&self, memory: &GuestMemory, start: u64, ram_end: u64) -> Result<u64, BootError> {
        let len = self.payload.end;
        if len > ram_end - start {
            return Err(BootError::NoRoom { what: "the kernel", needs: len, ram: ram_end - start });
        }
        let mut file = &self.file;
        io::Seek::seek(&mut file, io::SeekFrom::Start(0)).map_err(|e| unreadable(&self.path, e))?;
        memory
            .read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
            .map_err(|e| unreadable(&self.path, io::Error::other(e)))?;
        Ok(len)
    }

    fn unpack(
        &self,
        compression: Compression,
        memory: &GuestMemory,
        start: u64,
        ram_end: u64,
    ) -> Result<u64, BootError> {
        let mut unpacker = Unpacker::new(&self.file, &self.payload, compression, &self.path)?;
        let mut chunk = vec![0; CHUNK];
        let mut at = start;
        loop {
            let n = unpacker.fill(&mut chunk)?;
            if n as u64 > ram_end - at {
                return Err(BootError::NoRoom {
                    what: "the unpacked kernel",
                    needs: at - start + n as u64,
                    ram: ram_end - start,
                });
            }
            memory
                .write_slice(&chunk[..n], GuestAddress(at))
                .map_err(|_| BootError::OutsideRam { address: at })?;
            at += n as u64;
            if n < chunk.len() {
                return Ok(at - start);
            }
        }
    }
}

impl KernelFormat {
    fn compression(self) -> Option<Compression> {
        match self {
            Self::Image => None,
            Self::GzipImage | Self::ZbootGzip => Some(Compression::Gzip),
            Self::ZbootZstd => Some(Compression::Zstd),
        }
    }
}

impl ImageHeader {
    fn parse(start: &[u8], path: &Path) -> Result<Self, BootError> {
        let not = |found: &str| BootError::NotAKernel { path: path.to_owned(), found: found.to_owned() };
        if start.len() < HEADER_LEN || &start[56..60] != IMAGE_MAGIC {
            return Err(not("the unpacked file has no arm64 `Image` header"));
        }
        let word = |at: usize| u64_at(start, at);
        let (text_offset, image_size, flags) = (word(8), word(16), word(24));
        if flags & FLAG_BIG_ENDIAN != 0 {
            return Err(not("this is a big-endian kernel, which is not supported"));
        }
        if image_size == 0 {
            // Kernels before 3.17: text_offset is 0x80000 whatever the field says (booting.rst).
            return Ok(Self { text_offset: 0x8_0000, image_size: 0 });
        }
        Ok(Self { text_offset, image_size })
    }
}

/// What the file is, by its first bytes, and which part of it holds the `Image`.
fn recognise(start: &[u8], len: u64, path: &Path) -> Result<(KernelFormat, Range<u64>), BootError> {
    let wrong = |found| Err(BootError::WrongArchitecture { path: path.to_owned(), found });
    if start.len() < HEADER_LEN {
        return Err(BootError::Truncated { path: path.to_owned(), needs: HEADER_LEN as u64, has: len });
    }
    if &start[56..60] == IMAGE_MAGIC {
        return Ok((KernelFormat::Image, 0..len));
    }
    if start.starts_with(b"MZ") && &start[4..8] == b"zimg" {
        return recognise_zboot(start, len, path);
    }
    if start.starts_with(&[0x1f, 0x8b]) {
        return Ok((KernelFormat::GzipImage, 0..len));
    }
    // x86 boot protocol: "HdrS" at 0x202.
    if start.get(0x202..0x206) == Some(b"HdrS") {
        return wrong("an x86 kernel (bzImage)");
    }
    if start.starts_with(b"\x7fELF") {
        return match u16_at(start, 18) {
            62 => wrong("an x86-64 ELF file (vmlinux)"),
            _ => Err(BootError::NotAKernel {
                path: path.to_owned(),
                found: "this is an ELF file (vmlinux?)".into(),
            }),
        };
    }
    let found = "the file has no arm64 `Image`, gzip or zboot header".into();
    Err(BootError::NotAKernel { path: path.to_owned(), found })
}

/// EFI zboot header (Linux drivers/firmware/efi/libstub/zboot-header.S): payload offset at 8, length at 12, name of the
/// compression at 24, zero-terminated.
fn recognise_zboot(start: &[u8], len: u64, path: &Path) -> Result<(KernelFormat, Range<u64>), BootError> {
    let (offset, size) = (u64::from(u32_at(start, 8)), u64::from(u32_at(start, 12)));
    let name = start[24..56].split(|b| *b == 0).next().unwrap_or_default();
    let format = match name {
        b"gzip" => KernelFormat::ZbootGzip,
        b"zstd" | b"zstd22" => KernelFormat::ZbootZstd,
        other => {
            let name = String::from_utf8_lossy(other).escape_debug().to_string();
            let found = format!("a zboot image compressed with '{name}' (known: gzip, zstd)");
            return Err(BootError::NotAKernel { path: path.to_owned(), found });
        }
    };
    // The PE header, at the offset held at 60, names the machine: 0xaa64 is arm64.
    let pe = u32_at(start, 60) as usize;
    if let Some(header) = start.get(pe..pe.saturating_add(6))
        && header.starts_with(b"PE\0\0")
        && u16_at(header, 4) != 0xaa64
    {
        return Err(BootError::WrongArchitecture {
            path: path.to_owned(),
            found: "a zboot image for another processor",
        });
    }
    let needs = offset + size;
    if needs > len {
        return Err(BootError::Truncated { path: path.to_owned(), needs, has: len });
    }
    Ok((format, offset..needs))
}

/// A flat `Image` does not say how long its file is, but its EFI header does: the end of the last section's data.
fn check_complete(file: &File, start: &[u8], len: u64, path: &Path) -> Result<(), BootError> {
    let pe = u32_at(start, 60) as usize;
    if !start.starts_with(b"MZ") || start.get(pe..pe.saturating_add(4)) != Some(b"PE\0\0".as_slice()) {
        return Ok(());
    }
    // PE/COFF: sections at +6, size of the optional header at +20, section table after it, 40 bytes each.
    let mut coff = [0; 24];
    if file.read_exact_at(&mut coff, pe as u64).is_err() {
        return Err(BootError::Truncated { path: path.to_owned(), needs: pe as u64 + 24, has: len });
    }
    let table = pe as u64 + 24 + u64::from(u16_at(&coff, 20));
    let mut needs = 0;
    for index in 0..u64::from(u16_at(&coff, 6)).min(16) {
        let mut section = [0; 40];
        if file.read_exact_at(&mut section, table + 40 * index).is_err() {
            return Err(BootError::Truncated {
                path: path.to_owned(),
                needs: table + 40 * (index + 1),
                has: len,
            });
        }
        needs = needs.max(u64::from(u32_at(&section, 16)) + u64::from(u32_at(&section, 20)));
    }
    if needs > len {
        return Err(BootError::Truncated { path: path.to_owned(), needs, has: len });
    }
    Ok(())
}

fn read_start(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], filled as u64)? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

fn unreadable(path: &Path, source: io::Error) -> BootError {
    BootError::Unreadable { what: "kernel", path: path.to_owned(), source }
}

/// Little-endian fields of headers; `at` is within the bytes by the callers' own checks.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | (u32::from(u16_at(bytes, at + 2)) << 16)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}
