//! The servers on the emulated host that guests talk to through the monitor's network.

use crate::data::{BLOCK, Pattern};
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

/// A name that only the DNS server of the lab knows.
pub const DNS_NAME: &str = "a-name-of-the.lab.test";
/// The address it gives for [`DNS_NAME`] (TEST-NET-1, RFC 5737).
pub const DNS_ANSWER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);

/// Starts a web server; port 0 is any. `GET /SEED/LEN` gives the first LEN bytes of pattern SEED. Ends with the process.
pub fn web_server(address: Ipv4Addr, port: u16) -> Result<SocketAddr> {
    let listener = TcpListener::bind((address, port)).context("cannot start the web server")?;
    let address = listener.local_addr()?;
    thread::Builder::new().name("web".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // One thread a connection: 200 of them at most in any case.
            let _ = thread::Builder::new().stack_size(64 << 10).spawn(move || serve_one(&stream));
        }
    })?;
    Ok(address)
}

fn serve_one(mut stream: &TcpStream) -> Option<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next()?.ok()?;
    while !lines.next()?.ok()?.is_empty() {}
    let path = request.split(' ').nth(1)?;
    let (seed, len) = path.strip_prefix('/')?.split_once('/')?;
    let (pattern, len) = (Pattern(seed.parse().ok()?), len.parse::<usize>().ok()?);
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n").ok()?;
    let mut sent = 0;
    let mut chunk = vec![0; 16 * BLOCK];
    while sent < len {
        pattern.blocks((sent / BLOCK) as u64, &mut chunk);
        let count = chunk.len().min(len - sent);
        stream.write_all(&chunk[..count]).ok()?;
        sent += count;
    }
    Some(())
}

/// Starts a DNS server on 127.0.0.1:53 that answers every question for an IPv4 address: [`DNS_ANSWER`] for
/// [`DNS_NAME`], no such name for all others. Ends with the process.
pub fn dns_server() -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 53)).context("cannot start the DNS server")?;
    thread::Builder::new().name("dns".into()).spawn(move || {
        let mut packet = [0; 1500];
        while let Ok((len, from)) = socket.recv_from(&mut packet) {
            if let Some(answer) = answer_dns(&packet[..len]) {
                let _ = socket.send_to(&answer, from);
            }
        }
    })?;
    Ok(())
}

/// The answer to a query with one question (RFC 1035, section 4.1).
fn answer_dns(query: &[u8]) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let len = usize::from(*query.get(at)?);
        at += 1;
        if len == 0 {
            break;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(std::str::from_utf8(query.get(at..at + len)?).ok()?);
        at += len;
    }
    let question = query.get(HEADER..at + 4)?;
    let is_address = query.get(at..at + 2)? == [0, 1];
    let known = name.eq_ignore_ascii_case(DNS_NAME);
    let mut answer = query.get(..2)?.to_vec();
    // A response, recursion desired and available; 3 is "no such name".
    answer.extend([0x81, if known { 0x80 } else { 0x83 }]);
    let count = u8::from(known && is_address);
    answer.extend([0, 1, 0, count, 0, 0, 0, 0]);
    answer.extend(question);
    if count == 1 {
        // The name by reference to the question, type A, class IN, 60 s, 4 bytes.
        answer.extend([0xC0, 0x0C, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(DNS_ANSWER.octets());
    }
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn query(name: &str) -> Vec<u8> {
        let mut packet = vec![0xAB, 0xCD, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            packet.push(u8::try_from(label.len()).expect("short label"));
            packet.extend(label.as_bytes());
        }
        packet.extend([0, 0, 1, 0, 1]);
        packet
    }

    #[test]
    fn dns_knows_one_name() {
        let answer = answer_dns(&query(DNS_NAME)).expect("an answer");
        assert_eq!(&answer[..2], [0xAB, 0xCD]);
        assert!(answer.ends_with(&DNS_ANSWER.octets()));
        let other = answer_dns(&query("other.test")).expect("an answer");
        assert_eq!(other[3] & 0xF, 3, "no such name");
        assert_eq!(answer_dns(&[0; 7]), None, "a broken query gets no answer");
    }

    #[test]
    fn the_web_server_sends_the_pattern() {
        let address = web_server(Ipv4Addr::LOCALHOST, 0).expect("starts");
        let mut stream = TcpStream::connect(address).expect("connects");
        write!(stream, "GET /5/8192 HTTP/1.0\r\n\r\n").expect("sends");
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).expect("reads");
        let body = &reply[reply.len() - 8192..];
        assert_eq!(Pattern(5).first_difference(0, body), None);
    }
}
