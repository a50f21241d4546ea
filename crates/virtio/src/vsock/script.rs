//! A hostile guest and programs of the host that come and go, played from bytes: for the fuzz target and for a bounded test of the same.

use super::*;
use crate::vsock::packet::op;
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::net::UnixListener as StdListener;
use std::os::unix::net::UnixStream as StdStream;

/// Context identifier of the guest.
const CID: u64 = 3;
/// Ports of the host at which a program listens.
const LISTENED: std::ops::Range<u32> = 0..2;
/// Programs of the host that are connected at a time; the oldest is dropped for a new one.
const MOST_PROGRAMS: usize = 12;

/// Bytes that decide what happens. Where they end, everything is zero.
struct Choices<'b>(&'b [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, limit: u32) -> u32 {
        u32::from(self.byte()) % limit
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }
}

/// The device's host side with both of its neighbours.
struct Stage {
    mux: Mux,
    listeners: Vec<StdListener>,
    programs: VecDeque<StdStream>,
    data: Vec<u8>,
}

/// Plays `bytes` in `folder`, which must be empty, and checks the table of connections after every step.
pub fn play(bytes: &[u8], folder: &Path) {
    let path = folder.join("v");
    let mux = Mux::new(CID, &path).expect("the folder is ours");
    let listeners: Vec<StdListener> = LISTENED
        .map(|port| {
            let listener = StdListener::bind(folder.join(format!("v_{port}"))).expect("the folder is ours");
            listener.set_nonblocking(true).expect("a socket of ours");
            listener
        })
        .collect();
    let mut stage = Stage { mux, listeners, programs: VecDeque::new(), data: vec![0; 4096] };
    let mut choices = Choices(bytes);
    while !choices.0.is_empty() {
        stage.step(&mut choices, &path);
        stage.check();
    }
    stage.mux.reset();
    stage.check();
    for port in LISTENED {
        // Somebody else's folder from here on.
        let _ = std::fs::remove_file(folder.join(format!("v_{port}")));
    }
}

impl Stage {
    fn step(&mut self, choices: &mut Choices<'_>, path: &Path) {
        match choices.below(10) {
            0..=3 => self.guest_sends(choices),
            4 => {
                let room = choices.word() as usize % 5000;
                let _ = self.mux.next_packet(room, &mut self.data);
            }
            5 => self.program_connects(choices, path),
            6 => {
                if let Some(program) = self.program(choices) {
                    let _ = program.write(&vec![7; usize::from(choices.byte()) * 64]);
                }
            }
            7 => {
                let mut sink = vec![0; usize::from(choices.byte()) * 512];
                if let Some(program) = self.program(choices) {
                    let _ = program.read(&mut sink);
                }
            }
            8 => {
                let index = choices.byte() as usize % self.programs.len().max(1);
                self.programs.remove(index);
            }
            _ => self.look_at_the_host(),
        }
    }

    fn guest_sends(&mut self, choices: &mut Choices<'_>) {
        let shape = choices.byte();
        let op = u16::from(choices.byte() % 9);
        let host_port = match choices.below(6) {
            // One that the device has given out.
            0 => FIRST_PORT + choices.below(16),
            port => port,
        };
        let data = vec![9; if op == op::RW { usize::from(choices.byte()) * 257 } else { 0 }];
        let header = Header {
            src_cid: if shape == 1 { 99 } else { CID },
            dst_cid: if shape == 2 { 0 } else { HOST_CID },
            kind: if shape == 3 { 2 } else { STREAM },
            src_port: choices.below(4),
            dst_port: host_port,
            len: data.len() as u32,
            op,
            flags: choices.below(4),
            buf_alloc: if shape & 0x80 == 0 { 65536 } else { choices.word() },
            fwd_cnt: if shape & 0x40 == 0 { 0 } else { choices.word() },
        };
        self.mux.receive(&header, &data);
    }

    fn program_connects(&mut self, choices: &mut Choices<'_>, path: &Path) {
        let Ok(mut program) = StdStream::connect(path) else { return };
        let _ = program.set_nonblocking(true);
        let _ = match choices.below(4) {
            0 => Ok(()),
            1 => program.write_all(&[choices.byte(); 40]),
            _ => writeln!(program, "CONNECT {}\nsome data", choices.below(4)),
        };
        // One that is gone at once is served too.
        if choices.below(3) > 0 {
            self.keep(program);
        }
    }

    fn keep(&mut self, program: StdStream) {
        if self.programs.len() == MOST_PROGRAMS {
            self.programs.pop_front();
        }
        self.programs.push_back(program);
    }

    fn program(&mut self, choices: &mut Choices<'_>) -> Option<&mut StdStream> {
        let index = choices.byte() as usize % self.programs.len().max(1);
        self.programs.get_mut(index)
    }

    /// What the device's thread does between bursts, without waiting; each event twice, as kqueue may report one descriptor.
    fn look_at_the_host(&mut self) {
        for index in 0..self.listeners.len() {
            while let Ok((program, _)) = self.listeners[index].accept() {
                let _ = program.set_nonblocking(true);
                self.keep(program);
            }
        }
        for _ in 0..2 {
            self.mux.poll.poll(&mut self.mux.events, Some(Duration::ZERO)).expect("descriptors of ours");
            self.mux.work().expect("nothing of the host failed");
        }
        let ids: Vec<usize> = self.mux.connections.iter().map(|(id, _)| id).collect();
        for id in ids {
            self.mux.host_ready(id);
            self.mux.host_ready(id);
        }
    }

    /// What holds of the table whatever anybody does.
    fn check(&self) {
        let mux = &self.mux;
        assert!(mux.connections.len() <= MAX_CONNECTIONS);
        for (key, id) in &mux.by_key {
            assert_eq!(mux.connections[*id].key, *key);
            assert!(mux.connections[*id].phase != Phase::Draining);
        }
        let mut places = BTreeMap::new();
        for id in &mux.queued {
            assert!(mux.connections[*id].queued);
            assert!(places.insert(*id, ()).is_none(), "in the list twice");
        }
        for (id, connection) in &mux.connections {
            assert_eq!(connection.queued, places.contains_key(&id));
            assert!(connection.waiting() <= BUFFER as usize);
            assert_eq!(connection.is_draining(), mux.draining.contains(&id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::SockRef;

    /// The fuzz target's bounded sister: the same inputs each time, from a fixed generator (xorshift64*).
    #[test]
    fn hostile_guests_and_programs_that_come_and_go_do_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
        };
        for _ in 0..300 {
            let bytes: Vec<u8> = (0..600).map(|_| next()).collect();
            play(&bytes, folder.path());
        }
    }

    #[test]
    fn a_descriptor_that_is_reported_twice_is_looked_at_twice_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let mut mux = Mux::new(CID, &folder.path().join("v")).unwrap();
        let mut program = StdStream::connect(folder.path().join("v")).unwrap();
        program.write_all(b"nonsense\n").unwrap();
        mux.wait().unwrap();
        let ids: Vec<usize> = mux.connections.iter().map(|(id, _)| id).collect();
        assert_eq!(ids.len(), 1);
        // The first look ends the connection.
        mux.connections[ids[0]].readable = true;
        mux.host_ready(ids[0]);
        assert!(mux.connections.is_empty());
        mux.host_ready(ids[0]);
    }

    /// Where the kernel takes no more, the connection outlives the guest's end of it, until another one needs its place.
    #[test]
    fn connections_that_wait_for_a_reader_give_way_to_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        let mut mux = Mux::new(CID, &folder.path().join("v")).unwrap();
        let listener = StdListener::bind(folder.path().join("v_1")).unwrap();
        let packet = |op, port, len| Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: port,
            dst_port: 1,
            kind: STREAM,
            op,
            len,
            ..Header::default()
        };
        let (mut programs, mut first) = (Vec::new(), 0);
        for port in 0..MAX_CONNECTIONS as u32 + 20 {
            mux.receive(&packet(op::REQUEST, port, 0), &[]);
            programs.push(listener.accept().unwrap().0);
            let id = mux.by_key[&Key { host: 1, guest: port }];
            // The most that the system allows, so that it has no more to give at the end.
            let _ = SockRef::from(&mux.connections[id].stream).set_send_buffer_size(1 << 30);
            mux.connections[id].writable = true;
            let block = [5; 16384];
            while mux.connections[id].waiting() + block.len() <= BUFFER as usize {
                mux.receive(&packet(op::RW, port, block.len() as u32), &block);
                first += if port == 0 { block.len() } else { 0 };
            }
            mux.receive(&packet(op::RST, port, 0), &[]);
            assert!(mux.connections[id].is_draining(), "the kernel took all, whatever it was");
        }
        assert_eq!(mux.connections.len(), MAX_CONNECTIONS);
        // The first ones gave way: their programs find less than was sent. The others get all.
        let read = |program: &mut StdStream, mux: &mut Mux| {
            let (mut got, mut buffer) = (0, vec![0; 65536]);
            program.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            loop {
                match program.read(&mut buffer).unwrap() {
                    0 => return got,
                    n => got += n,
                }
                mux.poll.poll(&mut mux.events, Some(Duration::ZERO)).unwrap();
                mux.work().unwrap();
            }
        };
        assert!(read(&mut programs[0], &mut mux) < first);
        assert_eq!(read(programs.last_mut().unwrap(), &mut mux), first);
    }
}
