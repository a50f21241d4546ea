//! What the control socket's requests do. They run on the server's threads; what changes the machine is left to the machine's own.

use crate::passthrough::HostSlot;
use crate::run::{EventSender, MachineEvent};
use crate::slots::{PRESS_AGAIN, Reply};
use crate::status::Board;
use crate::{DeviceSpec, Error, MachineSpec};
use outboard_cli::Chain;
use outboard_control::{Answer, Folder, Handler, Request, Server};
use outboard_host_pci::Selection;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How often to look whether the guest has taken a new device.
const LOOK: Duration = Duration::from_millis(50);
/// How long a guest may take to turn off the slot of a lost device before another is put there all the same: one without a hot-plug driver never does.
const SETTLE: Duration = Duration::from_secs(10);
/// Longest wait for a guest: a client that asks for more gets this.
const LONGEST: u32 = 3600;

/// What the machine's thread is to do for a client.
pub(crate) enum Order {
    /// Answered once the guest has let go.
    Remove(Selection, Reply),
    /// Answered with [`Answer::Done`] and the port's index.
    Add(HostSlot, std::sync::mpsc::Sender<Result<usize, String>>),
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Remove(selection, _) => write!(f, "Remove({selection})"),
            Self::Add(slot, _) => write!(f, "Add({})", slot.selection()),
        }
    }
}

/// Listens for requests to the machine that `spec` describes. A machine without a name that was asked for runs also where nobody can listen.
///
/// # Errors
/// [`Error::Control`] if it has to have its name and cannot.
pub(crate) fn listen(
    spec: &MachineSpec,
    board: &Arc<Board>,
    events: &EventSender,
) -> Result<Option<Server>, Error> {
    let started = Server::start(&Folder::of_user(), spec.name.clone(), |name| {
        board.set_name(name);
        Arc::new(Control { board: board.clone(), events: events.clone() })
    });
    match started {
        Ok(server) => {
            tracing::info!("this virtual machine is called {}", server.name());
            Ok(Some(server))
        }
        Err(error) if spec.name.is_some() => Err(error.into()),
        Err(error) => {
            tracing::warn!("`outboard status` will not show this virtual machine: {}", Chain(&error));
            Ok(None)
        }
    }
}

struct Control {
    board: Arc<Board>,
    events: EventSender,
}

impl Handler for Control {
    fn handle(&self, request: Request) -> Result<Answer, String> {
        match request {
            Request::Status => Ok(Answer::Status(Box::new(self.board.read()))),
            Request::RemoveDevice { device, wait_s } => {
                self.remove(device.parse().map_err(text)?, wait(wait_s))
            }
            Request::AddDevice { device, wait_s } => self.add(device.parse()?, wait(wait_s)),
        }
    }
}

impl Control {
    fn remove(&self, selection: Selection, wait: Duration) -> Result<Answer, String> {
        let (reply, answer) = channel();
        self.events.send(MachineEvent::Control(Order::Remove(selection, reply)));
        match answer.recv_timeout(wait) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => Err(ENDED.into()),
            Err(RecvTimeoutError::Timeout) => Err(format!(
                "the guest has not let go of {selection} within {} s: it may not have booted yet, have no PCIe hot-plug driver, \
                 or be unable to stop using the device; it may still do so",
                wait.as_secs()
            )),
        }
    }

    fn add(&self, device: DeviceSpec, wait: Duration) -> Result<Answer, String> {
        let selection = device.selection;
        if self.board.holds(selection) {
            return Err(format!("{selection} is in the guest already; `outboard status` shows where"));
        }
        // On this thread: it may take as long as a reset of the device.
        let slot = HostSlot::open(device).map_err(text)?;
        let settled = Instant::now() + SETTLE;
        while !self.board.settled() && Instant::now() < settled {
            std::thread::sleep(LOOK);
        }
        let (reply, answer) = channel();
        self.events.send(MachineEvent::Control(Order::Add(slot, reply)));
        // How long the machine takes to pin the guest's memory is not the guest's time.
        let index = answer.recv().map_err(|_| ENDED.to_owned())??;
        self.board.press(index);
        let (deadline, mut pressed) = (Instant::now() + wait, Instant::now());
        loop {
            if pressed.elapsed() > PRESS_AGAIN {
                self.board.press(index);
                pressed = Instant::now();
            }
            match self.board.powered(index) {
                Some(true) => return Ok(Answer::Done(format!("{selection} is in the guest"))),
                None => {
                    return Err(format!(
                        "{selection} was in the guest and is no more; `outboard status` may say why"
                    ));
                }
                Some(false) if Instant::now() > deadline => {
                    return Err(format!(
                        "{selection} is plugged in, but the guest has not turned its slot on within {} s: it may not have booted yet, \
                         or have no PCIe hot-plug driver; it may still do so",
                        wait.as_secs()
                    ));
                }
                Some(false) => std::thread::sleep(LOOK),
            }
        }
    }
}

const ENDED: &str = "the guest rebooted or powered off meanwhile";

fn wait(seconds: u32) -> Duration {
    Duration::from_secs(seconds.min(LONGEST).into())
}

fn text(error: impl std::error::Error) -> String {
    Chain(&error).to_string()
}
