//! The side that asks.

use crate::{Answer, Error, Folder, Name, Request, VmStatus, line};
use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Most bytes of a reply that are read.
const MOST: usize = 1 << 20;
/// How long a VM may take for what it does at once.
const PROMPT: Duration = Duration::from_secs(10);

/// Sends `request` to the VM `name` and waits for its answer: as long as the request says, and a little.
///
/// # Errors
/// [`Error::NotRunning`], [`Error::NoAnswer`], [`Error::Refused`] with the VM's own words, [`Error::Unsafe`].
pub fn request(folder: &Folder, name: &Name, request: &Request) -> Result<Answer, Error> {
    if !folder.check()? {
        return Err(Error::NotRunning(name.clone()));
    }
    let path = folder.socket(name);
    let stream = UnixStream::connect(&path).map_err(|source| match source.kind() {
        // The second: a socket that a killed process left behind.
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::NotRunning(name.clone()),
        _ => Error::File { what: "connecting to", path, source },
    })?;
    let limit = match request {
        Request::Status => PROMPT,
        Request::RemoveDevice { wait_s, .. } | Request::AddDevice { wait_s, .. } => {
            // Opening a device may take a reset of it.
            PROMPT * 6 + Duration::from_secs((*wait_s).into())
        }
    };
    let no_answer = |why: String| Error::NoAnswer { name: name.clone(), why };
    let text = serde_json::to_string(request).expect("requests are plain data");
    line::write(&stream, text, PROMPT).map_err(|error| no_answer(error.to_string()))?;
    let reply = line::read(&stream, MOST, limit).map_err(|error| no_answer(error.to_string()))?;
    match serde_json::from_slice(&reply) {
        Ok(Answer::Error(why)) => Err(Error::Refused(why)),
        Ok(answer) => Ok(answer),
        Err(error) => Err(no_answer(format!("its reply is not understood ({error})"))),
    }
}

/// A VM that listens, and what it said when it was asked for its status.
pub type Found = (Name, Result<VmStatus, Error>);

/// The status of each VM of this user, by name. One that does not answer is there with its error; one that was killed is not.
///
/// # Errors
/// [`Error::Unsafe`], [`Error::File`] for the folder itself.
pub fn running(folder: &Folder) -> Result<Vec<Found>, Error> {
    let mut found = Vec::new();
    for name in folder.names()? {
        let status = match request(folder, &name, &Request::Status) {
            Err(Error::NotRunning(_)) => continue,
            Ok(Answer::Status(status)) => Ok(*status),
            Ok(other) => Err(Error::NoAnswer { name: name.clone(), why: format!("it answered {other:?}") }),
            Err(error) => Err(error),
        };
        found.push((name, status));
    }
    Ok(found)
}
