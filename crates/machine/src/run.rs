//! The life of a machine: boot, reboots, the ways it ends.

use crate::build::{Inputs, Machine, try_loading};
use crate::control::{self, Order};
use crate::devices::Host;
use crate::passthrough::HostSlot;
use crate::plan::Plan;
use crate::signals::Signals;
use crate::status::Board;
use crate::vcpus::VcpuEvent;
use crate::{Error, MachineSpec, room};
use outboard_cli::Chain;
use outboard_control::{GuestState, Server};
use outboard_hypervisor::{Capabilities, Hypervisor};
use outboard_passthrough::Vacated;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// How long the power key stays down: long enough for any debouncing (gpio-keys: 5 ms), short enough for no long press.
const KEY_PRESS: Duration = Duration::from_millis(100);
/// How long the guest may take to power itself off before it is stopped.
const POWER_OFF_GRACE: Duration = Duration::from_secs(30);

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered itself off (or rebooted, where that was to end the machine).
    PowerOff,
    /// The guest's kernel panicked.
    GuestPanic,
    /// Stopped from outside: Ctrl-A x, a second SIGTERM, or no answer to the power key.
    Killed,
}

/// What the threads of a machine tell the one that runs it.
#[derive(Debug)]
pub(crate) enum MachineEvent {
    Vcpu(VcpuEvent),
    /// The console showed a kernel panic's last line.
    GuestPanic,
    /// The user left the console.
    Leave,
    /// SIGTERM, SIGINT or SIGHUP.
    Terminate,
    /// A device of the host is no longer in the guest; `device` is its root port's number.
    SlotVacated {
        device: u8,
        why: Vacated,
    },
    /// A client of the control socket.
    Control(Order),
}

/// Sends events from any thread; after the machine ended they go nowhere.
#[derive(Clone, Debug)]
pub(crate) struct EventSender(Sender<MachineEvent>);

impl EventSender {
    /// To nobody.
    #[cfg(test)]
    pub(crate) fn nowhere() -> Self {
        Self(channel().0)
    }

    pub(crate) fn send(&self, event: MachineEvent) {
        let _ = self.0.send(event);
    }
}

/// What a boot of the guest led to.
#[derive(Debug)]
enum End {
    Outcome(Outcome),
    Reset,
    Failed(outboard_hypervisor::Error),
}

/// Runs a machine until it ends for good. Returns with everything released: threads, memory, VM, sockets, terminal.
///
/// # Errors
/// [`Error`] when it cannot be built, or the hypervisor fails under it.
pub fn run(spec: &MachineSpec, hypervisor: &dyn Hypervisor) -> Result<Outcome, Error> {
    tracing::debug!("checking inputs");
    let mut inputs = Inputs::open(spec, &hypervisor.capabilities()?)?;
    let (sender, events) = channel();
    let sender = EventSender(sender);
    // Before the terminal is touched, so that no signal leaves it raw.
    let signals = Signals::install(sender.clone())?;
    let board = Arc::new(Board::new(spec));
    let (control, host) = open_host(spec, &mut inputs, &sender, &board)?;
    let outcome = boots(spec, hypervisor, (&inputs, host), (&sender, events), (&signals, &board));
    // The channel has gone with `boots`, so that every request under way is answered by now.
    drop(control);
    outcome
}

/// Everything that [`run`] does before there is a VM, undone again: what would be built, for people to read. Sockets and ports are taken for a moment, no file is
/// changed.
///
/// # Errors
/// [`Error`], the same that [`run`] gives.
pub fn check(spec: &MachineSpec, capabilities: &Capabilities) -> Result<String, Error> {
    let mut inputs = Inputs::open(spec, capabilities)?;
    let plan = Plan::new(spec, &inputs).to_string();
    let (sender, _events) = channel();
    let board = Arc::new(Board::new(spec));
    let (_control, host) = open_host(spec, &mut inputs, &EventSender(sender), &board)?;
    try_loading(spec, &inputs, &host.devices)?;
    Ok(plan)
}

/// Opens what the machine needs of the host: its name, sockets, ports, consoles, devices.
fn open_host(
    spec: &MachineSpec,
    inputs: &mut Inputs,
    sender: &EventSender,
    board: &Arc<Board>,
) -> Result<(Option<Server>, Host), Error> {
    let control = control::listen(spec, board, sender)?;
    let host = Host::open(spec, std::mem::take(&mut inputs.disks), sender, board)?;
    room::check(host.slots.iter().flatten().map(HostSlot::functions), &inputs.space)?;
    Ok((control, host))
}

/// Boots the machine again and again until it ends for good.
fn boots(
    spec: &MachineSpec,
    hypervisor: &dyn Hypervisor,
    (inputs, mut host): (&Inputs, Host),
    (sender, events): (&EventSender, Receiver<MachineEvent>),
    (signals, board): (&Signals, &Arc<Board>),
) -> Result<Outcome, Error> {
    let mut power = PowerButton::default();
    loop {
        board.set_state(GuestState::Starting);
        let mut machine = Machine::build(spec, inputs, &mut host, hypervisor, sender)?;
        board.set_state(GuestState::Running);
        tracing::debug!("machine is built");
        let end = power.watch(&mut machine, &mut host, &events);
        let panicked = machine.stop(&mut host);
        forget_guest_events(&events, sender);
        match end {
            End::Reset | End::Outcome(Outcome::PowerOff) if panicked => return Ok(Outcome::GuestPanic),
            End::Reset if spec.no_reboot => return Ok(Outcome::PowerOff),
            End::Reset if signals.terminated() => return Ok(Outcome::PowerOff),
            End::Reset => tracing::info!("guest rebooted"),
            End::Outcome(outcome) => return Ok(outcome),
            End::Failed(error) => return Err(error.into()),
        }
    }
}

/// What threads of a machine that has stopped still said: a second vCPU's reset must not end the next boot. What the user said stays.
fn forget_guest_events(events: &Receiver<MachineEvent>, sender: &EventSender) {
    let users = |event: &MachineEvent| matches!(event, MachineEvent::Leave | MachineEvent::Terminate);
    let kept: Vec<_> = events.try_iter().filter(users).collect();
    kept.into_iter().for_each(|event| sender.send(event));
}

/// The power key and how long it has been since it was pressed.
#[derive(Default)]
struct PowerButton {
    pressed: Option<Instant>,
    released: bool,
}

impl PowerButton {
    /// Lets the machine run until it ends.
    fn watch(&mut self, machine: &mut Machine, host: &mut Host, events: &Receiver<MachineEvent>) -> End {
        machine.resume();
        loop {
            let event = match self.timeout() {
                None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(timeout) => events.recv_timeout(timeout),
            };
            match event {
                Ok(MachineEvent::Vcpu(VcpuEvent::PowerOff)) => return End::Outcome(Outcome::PowerOff),
                Ok(MachineEvent::Vcpu(VcpuEvent::Reset)) => return End::Reset,
                Ok(MachineEvent::Vcpu(VcpuEvent::Failed(error))) => return End::Failed(error),
                Ok(MachineEvent::GuestPanic) => return End::Outcome(Outcome::GuestPanic),
                Ok(MachineEvent::Leave) => return End::Outcome(Outcome::Killed),
                Ok(MachineEvent::SlotVacated { device, why }) => machine.vacate(device, &why, host),
                Ok(MachineEvent::Control(order)) => obey(order, machine, host),
                Ok(MachineEvent::Terminate) if self.pressed.is_some() => {
                    tracing::warn!("asked a second time to stop; stopping the guest hard");
                    return End::Outcome(Outcome::Killed);
                }
                Ok(MachineEvent::Terminate) => {
                    tracing::info!(
                        "pressing the guest's power key; asked again, or in 30 s, it is stopped hard"
                    );
                    self.pressed = Some(Instant::now());
                    host.board.set_state(GuestState::PoweringOff);
                    machine.set_power_key(true);
                }
                Err(RecvTimeoutError::Timeout) => {
                    if !self.released {
                        self.released = true;
                        machine.set_power_key(false);
                    } else if self.timeout() == Some(Duration::ZERO) {
                        tracing::warn!("the guest did not power off within 30 s; stopping it hard");
                        return End::Outcome(Outcome::Killed);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => unreachable!("this thread keeps a sender"),
            }
        }
    }

    /// Until the next thing to do, if any.
    fn timeout(&self) -> Option<Duration> {
        let after = if self.released { POWER_OFF_GRACE } else { KEY_PRESS };
        self.pressed.map(|pressed| after.saturating_sub(pressed.elapsed()))
    }
}

/// Does what a client of the control socket wants; one that has given up hears nothing.
fn obey(order: Order, machine: &mut Machine, host: &mut Host) {
    match order {
        Order::Remove(selection, reply) => machine.eject(selection, reply),
        Order::Add(slot, reply) => {
            let added = machine.add(slot, host).map_err(|error| Chain(&error).to_string());
            let _ = reply.send(added);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_vcpus_reset_does_not_end_the_next_boot_and_the_users_wish_stays() {
        let (sender, events) = channel();
        let sender = EventSender(sender);
        for event in [MachineEvent::Vcpu(VcpuEvent::Reset), MachineEvent::Terminate, MachineEvent::GuestPanic]
        {
            sender.send(event);
        }
        forget_guest_events(&events, &sender);
        let left: Vec<_> = events.try_iter().collect();
        assert!(matches!(left[..], [MachineEvent::Terminate]), "{left:?}");
    }
}
