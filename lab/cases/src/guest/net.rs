//! The network in the guest.

use super::{Guest, busybox, wait_for};
use crate::data::{BLOCK, Pattern, hex};
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// The monitor's side of its user-mode network: the gateway, which stands for the emulated host's 127.0.0.1.
pub const GATEWAY: &str = "10.0.2.2";
/// How long a connection may stand still before the case has failed.
const IDLE: Duration = Duration::from_secs(60);

/// What DHCP gave.
#[derive(Clone, Debug)]
pub struct Lease {
    /// The guest's address.
    pub address: String,
    /// The router's.
    pub router: String,
    /// The name server's.
    pub dns: String,
}

/// Brings `lo` and `eth0` up with DHCP.
pub fn up(guest: &mut Guest) -> Result<Lease> {
    guest.need("virtio_net")?;
    busybox(&["ip", "link", "set", "lo", "up"])?;
    wait_for("network card", Duration::from_secs(20), || {
        std::path::Path::new("/sys/class/net/eth0").exists().then_some(())
    })?;
    busybox(&["ip", "link", "set", "eth0", "up"])?;
    // -n: fail rather than try for ever; -q: end with the lease. The hook is this program under another name.
    busybox(&["udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "10", "-T", "1", "-s", "/bin/udhcpc-hook"])?;
    let text = fs::read_to_string("/run/lease").context("DHCP ended without a lease")?;
    let field = |key: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        value.map(str::to_owned).with_context(|| format!("the lease has no {key}"))
    };
    Ok(Lease { address: field("ip")?, router: field("router")?, dns: field("dns")? })
}

/// What udhcpc calls with each event: applies a lease (busybox, `examples/udhcp/simple.script` for the variables).
pub fn dhcp_hook(event: &str) -> Result<()> {
    if event != "bound" && event != "renew" {
        return Ok(());
    }
    let var = |name: &str| std::env::var(name).with_context(|| format!("udhcpc gave no {name}"));
    let (ip, mask) = (var("ip")?, var("mask")?);
    busybox(&["ip", "addr", "add", &format!("{ip}/{mask}"), "dev", "eth0"])?;
    let first = |list: String| list.split(' ').next().unwrap_or_default().to_owned();
    let (router, dns) = (first(var("router")?), first(var("dns")?));
    busybox(&["ip", "route", "add", "default", "via", &router])?;
    fs::write("/etc/resolv.conf", format!("nameserver {dns}\n"))?;
    fs::write("/run/lease", format!("ip={ip}\nrouter={router}\ndns={dns}\n")).context("cannot keep the lease")
}

/// Downloads `len` bytes of pattern `seed` from the lab's web server and returns their SHA-256.
pub fn download(host: &str, port: u16, seed: u64, len: u64) -> Result<String> {
    let mut sum = Sha256::new();
    let got = fetch(host, port, seed, len, |bytes| sum.update(bytes))?;
    if got != len {
        bail!("the download ended after {got} of {len} bytes");
    }
    Ok(hex(&sum.finalize()))
}

/// Connects, with a limit for standing still.
pub fn connect(host: &str, port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).with_context(|| format!("connecting to {host}:{port}"))?;
    stream.set_read_timeout(Some(IDLE))?;
    Ok(stream)
}

/// Asks for `len` bytes of pattern `seed` and checks each block: cheaper than a checksum on both sides.
pub fn request_checked(stream: &mut TcpStream, seed: u64, len: u64) -> Result<()> {
    let mut body = Vec::new();
    request(stream, seed, len, |bytes| body.extend_from_slice(bytes))?;
    if body.len() as u64 != len {
        bail!("the download ended after {} of {len} bytes", body.len());
    }
    match Pattern(seed).first_difference(0, &body) {
        None => Ok(()),
        Some(block) => bail!("the download differs in block {block} ({BLOCK} bytes each)"),
    }
}

/// Downloads and hands each piece to `take`; returns the number of bytes.
pub fn fetch(host: &str, port: u16, seed: u64, len: u64, take: impl FnMut(&[u8])) -> Result<u64> {
    request(&mut connect(host, port)?, seed, len, take)
}

fn request(stream: &mut TcpStream, seed: u64, len: u64, mut take: impl FnMut(&[u8])) -> Result<u64> {
    write!(stream, "GET /{seed}/{len} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).context("the answer has no end of header")?;
        head.push(byte[0]);
    }
    if !head.starts_with(b"HTTP/1.1 200") {
        bail!("the server answered {}", String::from_utf8_lossy(&head).lines().next().unwrap_or_default());
    }
    let mut chunk = vec![0; 128 << 10];
    let mut got = 0;
    loop {
        let count = stream.read(&mut chunk).with_context(|| format!("after {got} of {len} bytes"))?;
        if count == 0 {
            return Ok(got);
        }
        take(&chunk[..count]);
        got += count as u64;
    }
}
