//! From the CPUs' buffers into one file, in the order of time.

use crate::error::Error;
use crate::event::Printer;
use crate::ring::{Layout, records};
use crate::tracefs::Lost;
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
    /// Records that did not have the fields their format promises, and pages that were not as the kernel lays them out.
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

    /// From here on the file is written, in place of what it had. By its very first line `outboard fit` knows that a last one
    /// must come.
    pub(crate) fn begin(&mut self, release: &str, command: &str) -> Result<(), Error> {
        self.is_new = false;
        self.output(|file| match file.get_ref().metadata()?.is_file() {
            true => file.get_ref().set_len(0),
            // A pipe, say.
            false => Ok(()),
        })?;
        let command = command.replace(char::is_control, " ");
        self.output(|file| writeln!(file, "# outboard record, Linux {release}\n# command: {command}"))
    }

    /// Writes what is left and, last, what was lost: whoever gets the file later must know. Everything is in the file then.
    pub(crate) fn end(&mut self, lost: Lost) -> Result<(), Error> {
        self.write_until(u64::MAX)?;
        let lost = lost.0 + self.damaged;
        self.output(|file| writeln!(file, "# lost {lost} events"))?;
        self.output(BufWriter::flush)
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
            let whole = records(layout, &page[..read], |time, record| {
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
            // Of how many events is not known; at least one.
            *damaged += u64::from(whole.is_err());
        }
    }

    fn write_until(&mut self, time: u64) -> Result<(), Error> {
        // Stable: events of one CPU with the same time stay in order.
        self.waiting.sort_by_key(|(at, _)| *at);
        let count = self.waiting.partition_point(|(at, _)| *at <= time);
        let lines: Vec<_> = self.waiting.drain(..count).collect();
        self.output(|file| lines.iter().try_for_each(|(_, line)| file.write_all(line.as_bytes())))
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

    /// A printer of `event`'s records, as event number 5.
    fn printers(event: &'static str) -> HashMap<u16, Printer> {
        let text = "ID: 5\n\tfield:u32 dma_addr;\toffset:4;\tsize:4;\tsigned:0;\n\
            \tfield:u32 size;\toffset:8;\tsize:4;\tsigned:0;\n\tfield:u32 virt_addr;\toffset:12;\tsize:4;\tsigned:0;\n\
            \tfield:__data_loc char[] device;\toffset:16;\tsize:4;\tsigned:0;\n";
        let printer = Printer::new(event, &Format::parse(text)).expect("fields");
        HashMap::from([(5, printer)])
    }

    /// What a recording of an allocation says to `outboard fit`: with what the kernel lost, and what could not be read.
    #[test]
    fn fit_judges_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.trace");
        // The record has only one field: the printer wants more.
        let short = page(2000, &[2, 5, 0x3000]);
        let mut broken = page(3000, &event(0x5000));
        broken[8] = 0xff;
        let mut allocation = event(0x1000);
        // A pointer: it did not fail.
        allocation[4] = 1;
        for (pages, lost, said) in [
            (vec![], 0, Some(0)),
            (vec![], 7, Some(7)),
            (vec![Some(short.clone())], 0, Some(1)),
            (vec![Some(broken), Some(short)], 7, Some(9)),
            (vec![], 0, None),
        ] {
            let mut recording = Recording::open(&path).expect("opened");
            recording.begin("6.18", "sh -c 'echo\n# lost 3 events'").expect("written");
            let mut pages = Pages([vec![Some(page(1000, &allocation))], pages].concat());
            recording.drain(&layout(4096), &printers("dma_alloc"), 0, &mut pages).expect("read");
            match said {
                Some(_) => recording.end(Lost(lost)).expect("written"),
                // Killed before its end.
                None => {
                    recording.write_until(u64::MAX).expect("written");
                    recording.output(BufWriter::flush).expect("written");
                }
            }
            let gaps = outboard_fit::read(&path, None).expect("fit reads it").gaps;
            assert_eq!((gaps.lost, gaps.unfinished), (said.unwrap_or(0), said.is_none()));
        }
    }

    #[test]
    fn cpus_are_merged_by_time() {
        let printers = printers("dma_free");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.trace");
        let mut recording = Recording::open(&path).expect("opened");
        recording.begin("6.18", "true").expect("emptied");
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
            recording.output(BufWriter::flush).expect("written");
            assert_eq!(bus(&path), expected);
        }
        recording.end(Lost(0)).expect("written");
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
        recording.begin("6.18", "true").expect("emptied");
        recording.end(Lost(0)).expect("written");
        drop(recording);
        let text = std::fs::read_to_string(&path).expect("there");
        assert_eq!(text, "# outboard record, Linux 6.18\n# command: true\n# lost 0 events\n");
    }
}
