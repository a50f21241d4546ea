//! The published scheme, and no windows at all: what the windows policy is compared with.

use std::collections::HashMap;

use outboard_dart::GRANULE;

use crate::host::Host;
use crate::replay::{Cause, Scheme};
use crate::trace::Segment;

/// A request inside one aligned window maps that window, one that crosses windows maps itself, rounded to 16 KiB; both
/// are shared with equal ones only, and unmapped when the last user goes (dart-and-dma 1.4). One host call and one
/// round trip for each mapping and unmapping.
#[derive(Debug)]
pub struct Published {
    /// Bytes, a power of two; a granule is as good as none.
    window: u64,
    /// By first address and length: the host's handle and the number of users.
    live: HashMap<(u64, u64), (u64, u32)>,
    bytes: u64,
}

impl Published {
    /// With the published window of 256 KiB.
    pub fn fixed_256k() -> Self {
        Self { window: 256 << 10, live: HashMap::new(), bytes: 0 }
    }

    /// Without windows: every request by itself.
    pub fn none() -> Self {
        Self { window: 0, live: HashMap::new(), bytes: 0 }
    }

    fn key(&self, segment: &Segment) -> (u64, u64) {
        let end = segment.start + segment.len;
        if self.window != 0 {
            let start = segment.start & !(self.window - 1);
            if end <= start + self.window {
                return (start, self.window);
            }
        }
        let start = segment.start & !(GRANULE - 1);
        (start, end.next_multiple_of(GRANULE) - start)
    }

    fn release(&mut self, host: &mut Host, key: (u64, u64)) {
        let Some((handle, users)) = self.live.get_mut(&key) else { return };
        *users -= 1;
        if *users == 0 {
            host.unmap(*handle);
            host.round_trips += 1;
            self.live.remove(&key);
            self.bytes -= key.1;
        }
    }
}

impl Scheme for Published {
    fn map(&mut self, host: &mut Host, segments: &[Segment], buses: &mut Vec<u64>) -> Result<(), Cause> {
        for (index, segment) in segments.iter().enumerate() {
            let key = self.key(segment);
            if let Some((_, users)) = self.live.get_mut(&key) {
                *users += 1;
            } else {
                host.round_trips += 1;
                match host.map(key.0, key.1) {
                    Ok(mapping) => {
                        self.live.insert(key, (mapping.handle, 1));
                        self.bytes += key.1;
                    }
                    Err(error) => {
                        self.unmap(host, &segments[..index], &[]);
                        return Err(Cause::Dart(error));
                    }
                }
            }
            buses.push(0);
        }
        Ok(())
    }

    fn unmap(&mut self, host: &mut Host, segments: &[Segment], _buses: &[u64]) {
        for segment in segments {
            self.release(host, self.key(segment));
        }
    }

    fn mapped(&self) -> (u64, u32) {
        (self.bytes, self.live.len() as u32)
    }
}
