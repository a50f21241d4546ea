//! Sockets between host and guest.

use crate::case::{Case, Group, HOST};
use crate::data::{BLOCK, Pattern};
use crate::guest::{Guest, vsock};
use crate::host::{Host, Kernel};
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

const STEP: Duration = Duration::from_secs(120);
/// Bytes each way.
const LEN: usize = 4 << 20;
/// Port in the guest, port on the host.
const GUEST_PORT: u32 = 5000;
const HOST_PORT: u32 = 6000;

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "vsock",
        about: "4 MiB each way between a Unix socket of the host and the guest, opened from either side",
        limit_s: 300,
        host_kernel: HOST,
        group: Group::Test,
        host,
        guest,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    let socket = host.scratch("vsock");
    let listener = UnixListener::bind(format!("{}_{HOST_PORT}", socket.display()))?;
    let spec = host.guest(Kernel::V6_12).extra(&["--vsock", &format!("socket={}", socket.display())]);
    let mut vm = host.start(&spec)?;
    vm.note("listening", STEP)?;
    let stream = UnixStream::connect(&socket).context("connecting to the monitor's socket")?;
    exchange_from_host(stream).context("opened from the host")?;
    vm.note("served", STEP)?;
    let (mut stream, _) = listener.accept()?;
    let mut body = vec![0; LEN];
    stream.read_exact(&mut body)?;
    ensure!(Pattern(32).first_difference(0, &body).is_none(), "what the guest sent is not what came");
    vm.finish(STEP)?;
    Ok(None)
}

/// Says which port, then sends one pattern and gets another.
fn exchange_from_host(mut stream: UnixStream) -> Result<()> {
    writeln!(stream, "CONNECT {GUEST_PORT}")?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut answer = String::new();
    reader.read_line(&mut answer)?;
    ensure!(answer.starts_with("OK "), "the monitor answered '{}'", answer.trim());
    let mut body = vec![0; LEN];
    Pattern(30).blocks(0, &mut body);
    stream.write_all(&body)?;
    stream.shutdown(Shutdown::Write)?;
    reader.read_exact(&mut body)?;
    ensure!(Pattern(31).first_difference(0, &body).is_none(), "what the guest sent is not what came");
    Ok(())
}

fn guest(guest: &mut Guest) -> Result<()> {
    guest.need("vmw_vsock_virtio_transport")?;
    let listener = vsock::listen(GUEST_PORT)?;
    guest.note("listening", true);
    let mut stream = vsock::accept(&listener)?;
    let mut body = vec![0; LEN];
    stream.read_exact(&mut body)?;
    ensure!(Pattern(30).first_difference(0, &body).is_none(), "what the host sent is not what came");
    Pattern(31).blocks(0, &mut body);
    stream.write_all(&body)?;
    ensure!(stream.read(&mut [0; BLOCK])? == 0, "the host's shutdown did not come");
    guest.note("served", true);
    let mut stream = vsock::connect_to_host(HOST_PORT)?;
    Pattern(32).blocks(0, &mut body);
    stream.write_all(&body)?;
    Ok(())
}
