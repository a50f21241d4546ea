//! From the CPUs' buffers into one file, in the order of time.

use crate::error::Error;
use crate::event::Printer;
use crate::ring::{Layout, records};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Lines not written yet, and the file.
pub(crate) struct Recording {
    path: PathBuf,
    file: BufWriter<File>,
    waiting: Vec<(u64, String)>,
    /// Latest time seen up to the round before this one.
    seen: u64,
    /// Events written and waiting.
    pub(crate) events: u64,
    /// Records that did not have the fields their format promises.
    pub(crate) damaged: u64,
    page: Vec<u8>,
    /// The file was made by us, and nothing has been recorded into it.
    is_new: bool,
}

impl Recording {
    /// Opens the file. What it has stays until [`Recording::begin`]; one that was made and never begun is removed again.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let output = |source| Error::Output { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.write(true);
        let (file, is_new) = match options.clone().create_new(true).open(path) {
            Ok(file) => (file, true),
            // Without O_EXCL also where a link leads nowhere.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                (options.create(true).truncate(false).open(path).map_err(output)?, false)
            }
            Err(error) => return Err(output(error)),
        };
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::with_capacity(1 << 18, file),
            is_new,
            waiting: Vec::new(),
            seen: 0,
            events: 0,
            damaged: 0,
            page: Vec::new(),
        })
    }

    /// From here on it is written, in place of what it had.
    pub(crate) fn begin(&mut self) -> Result<(), Error> {
        self.is_new = false;
        self.output(|file| match file.get_ref().metadata()?.is_file() {
            true => file.get_ref().set_len(0),
            // A pipe, say.
            false => Ok(()),
        })
    }

    /// A line of its own, which readers pass over.
    pub(crate) fn comment(&mut self, text: &str) -> Result<(), Error> {
        self.output(|file| writeln!(file, "# {text}"))
    }

    /// Reads every buffer until it is empty, and writes what no later event can come before: all that is older than what was
    /// seen one round ago, since every buffer was emptied after that.
    pub(crate) fn round(
        &mut self,
        layout: &Layout,
        printers: &HashMap<u16, Printer>,
        buffers: &mut [(usize, File)],
    ) -> Result<(), Error> {
        let before = self.seen;
        for (cpu, file) in buffers {
            self.drain(layout, printers, *cpu, file)?;
        }
        self.write_until(before)
    }

    fn drain(
        &mut self,
        layout: &Layout,
        printers: &HashMap<u16, Printer>,
        cpu: usize,
        file: &mut impl Read,
    ) -> Result<(), Error> {
        self.page.resize(layout.page, 0);
        loop {
            let read = match file.read(&mut self.page) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(source) => {
                    let path = PathBuf::from(format!("per_cpu/cpu{cpu}/trace_pipe_raw"));
                    return Err(Error::Trace { what: "read", path, source });
                }
            };
            let Self { waiting, seen, events, damaged, page, .. } = self;
            records(layout, &page[..read], |time, record| {
                let id = record.first_chunk().map_or(0, |id| u16::from_le_bytes(*id));
                // Others get into the buffer too, such as marks of the kernel's own.
                let Some(printer) = printers.get(&id) else { return };
                *seen = time.max(*seen);
                match printer.line(cpu, time, record) {
                    Some(line) => {
                        *events += 1;
                        waiting.push((time, line));
                    }
                    None => *damaged += 1,
                }
            });
        }
    }

    fn write_until(&mut self, time: u64) -> Result<(), Error> {
        // Stable: events of one CPU with the same time stay in order.
        self.waiting.sort_by_key(|(at, _)| *at);
        let count = self.waiting.partition_point(|(at, _)| *at <= time);
        let lines: Vec<_> = self.waiting.drain(..count).collect();
        self.output(|file| lines.iter().try_for_each(|(_, line)| file.write_all(line.as_bytes())))
    }

    /// Writes what is left.
    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        self.write_until(u64::MAX)
    }

    /// What was written is in the file.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        self.output(BufWriter::flush)
    }

    fn output(&mut self, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<(), Error> {
        write(&mut self.file).map_err(|source| Error::Output { path: self.path.clone(), source })
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.is_new {
            // It may be gone already.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;
    use crate::ring::tests::{layout, page};

    /// Gives one page after another, and would block in between.
    struct Pages(Vec<Option<Vec<u8>>>);

    impl Read for Pages {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match (!self.0.is_empty()).then(|| self.0.remove(0)).flatten() {
                Some(page) => {
                    buffer[..page.len()].copy_from_slice(&page);
                    Ok(page.len())
                }
                None => Err(io::ErrorKind::WouldBlock.into()),
            }
        }
    }

    /// A `dma_free` record of number 5 with bus address `bus`.
    fn event(bus: u32) -> Vec<u32> {
        vec![6, 5, bus, 4096, 0, (16 << 16) | 20, u32::from_le_bytes(*b"dev\0")]
    }

    #[test]
    fn cpus_are_merged_by_time() {
        let text = "ID: 5\n\tfield:u32 dma_addr;\toffset:4;\tsize:4;\tsigned:0;\n\
            \tfield:u32 size;\toffset:8;\tsize:4;\tsigned:0;\n\tfield:u32 virt_addr;\toffset:12;\tsize:4;\tsigned:0;\n\
            \tfield:__data_loc char[] device;\toffset:16;\tsize:4;\tsigned:0;\n";
        let printer = Printer::new("dma_free", &Format::parse(text)).expect("fields");
        let printers = HashMap::from([(5, printer)]);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.trace");
        let mut recording = Recording::open(&path).expect("opened");
        recording.begin().expect("emptied");
        let bus = |path| {
            let text = std::fs::read_to_string(path).expect("there");
            let number = |line: &str| line.split("dma_addr=").nth(1)?.split(' ').next().map(str::to_owned);
            text.lines().filter_map(number).collect::<Vec<_>>().join(" ")
        };
        let mut first = Pages(vec![Some(page(3000, &event(3))), Some(page(9000, &event(9))), None, None]);
        let mut second = Pages(vec![Some(page(1000, &event(1))), None, Some(page(4000, &event(4))), None]);
        for expected in ["", "1 3 4 9"] {
            let before = recording.seen;
            recording.drain(&layout(4096), &printers, 0, &mut first).expect("read");
            recording.drain(&layout(4096), &printers, 1, &mut second).expect("read");
            recording.write_until(before).expect("written");
            recording.flush().expect("written");
            assert_eq!(bus(&path), expected);
        }
        recording.finish().expect("written");
        assert_eq!((recording.events, recording.damaged), (4, 0));
    }
    #[test]
    fn nothing_is_overwritten_before_there_is_something_to_record() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.trace");
        drop(Recording::open(&path).expect("opened"));
        assert!(!path.exists());
        std::fs::write(&path, "the last recording").expect("written");
        let mut recording = Recording::open(&path).expect("opened");
        assert_eq!(std::fs::read(&path).expect("there"), b"the last recording");
        recording.begin().expect("emptied");
        recording.comment("new").expect("written");
        recording.flush().expect("written");
        drop(recording);
        assert_eq!(std::fs::read(&path).expect("there"), b"# new\n");
    }
}
