//! A trace's file as text: unpacked where it is packed with xz, gzip or zstd, and refused by name where it is anything else.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::read::ReadError;

/// Bytes by which a kind of file is told: as far as a tar archive's mark reaches.
const HEAD: u64 = 512;
/// Memory the xz decoder may take, KiB. Its largest preset (-9) needs 65 MiB.
const XZ_MEMORY_KIB: u32 = 512 << 10;

/// A file's text, and how it was packed.
pub(crate) struct Text {
    /// The text, unpacked.
    pub(crate) text: Box<dyn BufRead>,
    /// `xz`, `gzip` or `zstd`.
    pub(crate) packing: Option<&'static str>,
}

/// Opens `path` as text.
pub(crate) fn open(path: &Path) -> Result<Text, ReadError> {
    let io = |source| ReadError::Io { path: path.to_owned(), source };
    let (head, file) = begin(File::open(path).map_err(io)?).map_err(io)?;
    let (packing, unpacked): (_, Box<dyn Read>) = match kind(&head) {
        Kind::Text => return Ok(Text { text: Box::new(BufReader::new(file)), packing: None }),
        Kind::Other(what, advice) => return Err(refused(path, what.to_owned(), advice)),
        Kind::Xz => {
            let packed = BufReader::new(file);
            ("xz", Box::new(lzma_rust2::XzReader::new_mem_limit(packed, true, XZ_MEMORY_KIB)))
        }
        Kind::Gzip => ("gzip", Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(file)))),
        Kind::Zstd => ("zstd", Box::new(Zstd::new(BufReader::new(file)))),
    };
    let (head, text) = begin(unpacked).map_err(|source| ReadError::Packed {
        path: path.to_owned(),
        packing,
        line: 1,
        source,
    })?;
    let inside = match kind(&head) {
        Kind::Text => return Ok(Text { text: Box::new(BufReader::new(text)), packing: Some(packing) }),
        Kind::Other(what, advice) => (what, advice),
        Kind::Xz => ("an xz file", "unpack it first"),
        Kind::Gzip => ("a gzip file", "unpack it first"),
        Kind::Zstd => ("a zstd file", "unpack it first"),
    };
    Err(refused(path, format!("{} inside {packing}", inside.0), inside.1))
}

fn refused(path: &Path, what: String, advice: &'static str) -> ReadError {
    ReadError::Kind { path: path.to_owned(), what, advice }
}

/// A reader whose first bytes are known.
type Begun<R> = io::Chain<Cursor<Vec<u8>>, R>;

/// The first bytes, and a reader of everything with them.
fn begin<R: Read>(mut file: R) -> io::Result<(Vec<u8>, Begun<R>)> {
    let mut head = Vec::new();
    file.by_ref().take(HEAD).read_to_end(&mut head)?;
    Ok((head.clone(), Cursor::new(head).chain(file)))
}

enum Kind {
    Text,
    Xz,
    Gzip,
    Zstd,
    /// Nothing that is read: what it is, and what to do.
    Other(&'static str, &'static str),
}

const NO_TRACE: &str = "a trace is text, as `outboard record` writes it";

/// What files begin with, what they are, and what to do with them.
const OTHERS: [(&[u8], &str, &str); 29] = [
    (
        b"\x17\x08\x44tracing",
        "a binary recording of trace-cmd (trace.dat)",
        "print it first: trace-cmd report -i FILE > FILE.txt",
    ),
    (b"PERFILE2", "a binary recording of perf (perf.data)", "print it first: perf script -i FILE > FILE.txt"),
    (b"2ELIFREP", "a binary recording of perf (perf.data)", "print it first: perf script -i FILE > FILE.txt"),
    (b"PERFFILE", "a binary recording of an old perf (perf.data)", "print it with perf script"),
    (b"\xc1\x1f\xfc\xc1", "a binary recording in the Common Trace Format (LTTng)", NO_TRACE),
    (b"\xff\xfe", "text in UTF-16", "convert it first: iconv -f UTF-16 -t UTF-8 FILE > FILE.txt"),
    (b"\xfe\xff", "text in UTF-16", "convert it first: iconv -f UTF-16 -t UTF-8 FILE > FILE.txt"),
    (b"BZh", "packed with bzip2", "unpack it first: bunzip2 FILE"),
    (b"\x04\x22\x4d\x18", "packed with lz4", "unpack it first: unlz4 FILE"),
    (b"\x02\x21\x4c\x18", "packed with lz4", "unpack it first: unlz4 FILE"),
    (b"\x5d\0\0", "packed with lzma", "unpack it first: unlzma FILE"),
    (b"LZIP", "packed with lzip", "unpack it first: lzip -d FILE"),
    (b"\x89LZO", "packed with lzop", "unpack it first: lzop -d FILE"),
    (b"\x1f\x9d", "packed with compress (.Z)", "unpack it first: gunzip FILE"),
    (b"PK\x03\x04", "a zip archive", "unpack it first: unzip FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first: 7z x FILE"),
    (b"Rar!\x1a", "a RAR archive", "unpack it first"),
    (b"\x7fELF", "a program (ELF)", NO_TRACE),
    (b"\xcf\xfa\xed\xfe", "a program (Mach-O)", NO_TRACE),
    (b"\xca\xfe\xba\xbe", "a program (Mach-O)", NO_TRACE),
    (b"MZ\x90", "a program of Windows", NO_TRACE),
    (b"%PDF-", "a PDF document", NO_TRACE),
    (b"\x89PNG", "a picture (PNG)", NO_TRACE),
    (b"\xff\xd8\xff", "a picture (JPEG)", NO_TRACE),
    (b"GIF8", "a picture (GIF)", NO_TRACE),
    (b"QFI\xfb", "a qcow2 disk image", NO_TRACE),
    (b"SQLite format 3\0", "a database (SQLite)", NO_TRACE),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it: git lfs pull"),
    (b"\xa7\x0d\x0d\x0a", "a program (Python bytecode)", NO_TRACE),
];

/// Where a tar archive says that it is one.
const TAR: std::ops::Range<usize> = 257..262;

fn kind(head: &[u8]) -> Kind {
    const SKIPPABLE: std::ops::RangeInclusive<u8> = 0x50..=0x5f;
    match head {
        [] => return Kind::Other("empty", "nothing was recorded, or nothing was copied"),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => return Kind::Xz,
        [0x1f, 0x8b, ..] => return Kind::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => return Kind::Zstd,
        [mark, 0x2a, 0x4d, 0x18, ..] if SKIPPABLE.contains(mark) => return Kind::Zstd,
        _ => {}
    }
    if let Some((_, what, advice)) = OTHERS.iter().find(|(magic, ..)| head.starts_with(magic)) {
        return Kind::Other(what, advice);
    }
    if head.get(TAR).is_some_and(|mark| mark == b"ustar") {
        return Kind::Other("a tar archive", "unpack it first: tar xf FILE");
    }
    match head {
        // Latin letters in UTF-16, without the mark that says so.
        [0, 1..=0x7f, 0, 1..=0x7f, ..] | [1..=0x7f, 0, 1..=0x7f, 0, ..] => {
            Kind::Other("text in UTF-16", "convert it first: iconv -f UTF-16LE -t UTF-8 FILE > FILE.txt")
        }
        // In the first line; behind it the file may be a damaged text.
        _ if head.split(|byte| *byte == b'\n').next().is_some_and(|line| line.contains(&0)) => {
            Kind::Other("binary data of a kind that is not known here", NO_TRACE)
        }
        _ => Kind::Text,
    }
}

/// All frames of a zstd file, one behind the other, with their checksums; the decoder by itself ends with the first.
struct Zstd<R> {
    packed: R,
    decoder: FrameDecoder,
    within: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(packed: R) -> Self {
        Self { packed, decoder: FrameDecoder::new(), within: false }
    }

    /// Begins the next frame; false at the end of the file.
    fn begin_frame(&mut self) -> io::Result<bool> {
        while !self.packed.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.packed) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut self.packed.by_ref().take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(false)
    }

    fn end_frame(&self) -> io::Result<()> {
        match (self.decoder.get_checksum_from_data(), self.decoder.get_calculated_checksum()) {
            (Some(stored), Some(found)) if stored != found => Err(io::Error::other("its checksum is wrong")),
            _ => Ok(()),
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !buffer.is_empty() {
            if !self.within {
                self.within = self.begin_frame()?;
                if !self.within {
                    return Ok(0);
                }
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let some = BlockDecodingStrategy::UptoBytes(buffer.len());
                self.decoder.decode_blocks(&mut self.packed, some).map_err(io::Error::other)?;
            }
            let read = self.decoder.read(buffer)?;
            if read != 0 {
                return Ok(read);
            }
            self.end_frame()?;
            self.within = false;
        }
        Ok(0)
    }
}
