//! Compressed kernels, unpacked as a stream.

use super::BootError;
use ruzstd::decoding::StreamingDecoder;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

/// How a kernel file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// Reads the unpacked bytes of `payload` within `file`. Whatever follows the first gzip member or zstd frame is ignored:
/// a zboot payload ends with four bytes that hold its unpacked length.
pub(super) struct Unpacker<'a> {
    decoder: Decoder<'a>,
    compression: Compression,
    path: &'a Path,
}

type Payload<'a> = io::Take<BufReader<&'a File>>;

enum Decoder<'a> {
    Gzip(Box<flate2::bufread::GzDecoder<Payload<'a>>>),
    Zstd(Box<StreamingDecoder<Payload<'a>, ruzstd::decoding::FrameDecoder>>),
}

impl<'a> Unpacker<'a> {
    pub(super) fn new(
        file: &'a File,
        payload: &Range<u64>,
        compression: Compression,
        path: &'a Path,
    ) -> Result<Self, BootError> {
        let mut reader = BufReader::with_capacity(64 * 1024, file);
        reader.seek(SeekFrom::Start(payload.start)).map_err(|source| BootError::Unreadable {
            what: "kernel",
            path: path.to_owned(),
            source,
        })?;
        let input = reader.take(payload.end - payload.start);
        let decoder = match compression {
            Compression::Gzip => Decoder::Gzip(Box::new(flate2::bufread::GzDecoder::new(input))),
            Compression::Zstd => {
                let decoder = StreamingDecoder::new(input).map_err(|e| BootError::Corrupt {
                    path: path.to_owned(),
                    format: compression.name(),
                    reason: e.to_string(),
                })?;
                Decoder::Zstd(Box::new(decoder))
            }
        };
        Ok(Self { decoder, compression, path })
    }

    /// Fills `buffer` as far as the payload goes; returns how many bytes that was.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, BootError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let n = match &mut self.decoder {
                Decoder::Gzip(decoder) => decoder.read(&mut buffer[filled..]),
                Decoder::Zstd(decoder) => decoder.read(&mut buffer[filled..]),
            };
            match n {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) => return Err(self.corrupt(e.to_string())),
            }
        }
        if filled < buffer.len() {
            self.check_sum()?;
        }
        Ok(filled)
    }

    /// gzip's checksum is checked by its decoder at the end of the stream; zstd's, where there is one, is left to us.
    fn check_sum(&self) -> Result<(), BootError> {
        let Decoder::Zstd(streaming) = &self.decoder else { return Ok(()) };
        let frame = &streaming.decoder;
        match (frame.get_checksum_from_data(), frame.get_calculated_checksum()) {
            (Some(stored), Some(found)) if stored != found => {
                Err(self.corrupt("its checksum is wrong".to_owned()))
            }
            _ => Ok(()),
        }
    }

    fn corrupt(&self, reason: String) -> BootError {
        BootError::Corrupt { path: self.path.to_owned(), format: self.compression.name(), reason }
    }
}
