use crate::descriptor::{duplicate, write_all};
use std::fs::File;
use std::io::{self, Write};

/// Standard output, for results. Waits for a reader that is slow; one that is gone (`| head`) has seen enough, so that what follows goes nowhere
/// without an error.
#[derive(Debug)]
pub struct Stdout {
    file: Option<File>,
}

/// Standard output.
pub fn stdout() -> Stdout {
    Stdout { file: duplicate(&io::stdout()).ok() }
}

impl Write for Stdout {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Some(file) = &self.file else { return Ok(data.len()) };
        match write_all(file, data).1 {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.file = None,
            other => other?,
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    #[test]
    fn a_reader_that_is_gone_is_no_error_and_a_full_disk_is() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut out = Stdout { file: Some(File::from(OwnedFd::from(writer))) };
        out.write_all(b"first\n").unwrap();
        out.write_all(b"second\n").unwrap();
        if let Ok(full) = File::options().write(true).open("/dev/full") {
            let error = Stdout { file: Some(full) }.write_all(b"x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        }
    }
}
