//! Several vCPUs, each on a thread of its own.

use super::guest::{IRQS_TAKEN, IRQS_USED};
use super::rig::{Bench, CODE, Context, Outcome, Stop, fail};
use crate::{Exit, Kick, Register, Vcpu, Vm};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Barrier, Condvar, Mutex, MutexGuard};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

/// How often waiting threads look whether the watchdog has given up.
const LOOK: Duration = Duration::from_millis(50);

/// What a crew's thread tells the case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exit of a vCPU that the crew does not serve itself.
    Exit(u32, Exit),
    /// A vCPU was kicked.
    Kicked(u32),
    /// A vCPU cannot go on.
    Broken(u32, String),
    /// The watchdog has interrupted a vCPU; where it was.
    Hung(u32, Whereabouts),
}

/// Time for the vCPUs of a case that was given up to say where they were.
const ROLL_CALL: Duration = Duration::from_secs(5);

/// What MMIO reads of a crew's guest get.
pub const ANSWER: u64 = 0xdead;

/// Where a vCPU was when the watchdog interrupted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whereabouts {
    /// Exits that it has made.
    exits: u64,
    /// The last of them.
    last: Option<Exit>,
    /// Program counter, and interrupts that its handler has taken and that its program has waited for; or why they cannot be read.
    registers: Result<[u64; 3], String>,
}

impl Whereabouts {
    fn of(vcpu: &dyn Vcpu, exits: u64, last: Option<Exit>) -> Self {
        let read = |register| vcpu.register(register).map_err(|error| error.to_string());
        let all = || {
            let [taken, used] = [IRQS_TAKEN, IRQS_USED].map(|n| read(Register::X(n)));
            Ok([read(Register::Pc)?, taken?, used?])
        };
        Self { exits, last, registers: all() }
    }
}

/// Says where the vCPUs of a case that was given up were. `places` lacks those that did not answer, of `count`.
fn describe_hang(places: &BTreeMap<u32, Whereabouts>, count: usize) -> String {
    let mut text = "hung: the guest made no progress".to_owned();
    let mut silent = Vec::new();
    let mut off = Vec::new();
    for index in 0..count as u32 {
        match places.get(&index) {
            None => silent.push(index),
            // Its program would have set the counters; the reset value of the program counter is 0 in KVM and hvf.
            Some(Whereabouts { exits: 0, registers: Ok([0, ..]), .. }) => off.push(index),
            Some(Whereabouts { exits, last, registers }) => {
                text += &format!("; vCPU {index}: {exits} exits, the last {last:x?}, ");
                text += &match registers {
                    Ok([pc, taken, used]) => format!("PC {pc:#x}, interrupts taken {taken}, used {used}"),
                    Err(error) => error.clone(),
                };
            }
        }
    }
    if !off.is_empty() {
        text += &format!("; never started: {off:?}");
    }
    if !silent.is_empty() {
        text += &format!("; no answer to kicks: {silent:?}");
    }
    text
}

struct Shared<'a> {
    context: &'a Context,
    vm: Arc<dyn Vm>,
    stop: AtomicBool,
    kickers: Mutex<Vec<(u32, Arc<dyn Kick>)>>,
    /// Nobody runs before everybody is bound: on a Mac the set of vCPUs is fixed once one has run.
    bound: Barrier,
    gate: Mutex<Gate>,
    opened: Condvar,
}

/// Where kicked vCPUs wait while the crew is paused.
#[derive(Clone, Copy, Default)]
struct Gate {
    closed: bool,
    /// Goes up with each opening, so that a vCPU which is slow to leave is not held by the next pause as well.
    openings: u64,
}

/// The crew's pause: it ends with this.
pub struct Pause<'a>(&'a Mutex<Gate>, &'a Condvar);

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        let mut gate = self.0.lock().unwrap_or_else(|e| e.into_inner());
        *gate = Gate { closed: false, openings: gate.openings + 1 };
        self.1.notify_all();
    }
}

/// The threads of a VM, which run until [`Crew::stop`] or drop.
pub struct Crew<'scope, 'a> {
    shared: Arc<Shared<'a>>,
    threads: Vec<ScopedJoinHandle<'scope, ()>>,
    events: Receiver<Event>,
}

impl<'scope, 'a: 'scope> Crew<'scope, 'a> {
    /// Binds all `vcpus` of the bench's VM to new threads and lets them run, vCPU 0 from [`CODE`].
    pub fn start(scope: &'scope Scope<'scope, '_>, bench: &Bench<'a>, vcpus: u32) -> Outcome<Self> {
        let shared = Arc::new(Shared {
            context: bench.context,
            vm: Arc::clone(&bench.vm),
            stop: AtomicBool::new(false),
            kickers: Mutex::default(),
            bound: Barrier::new(vcpus as usize + 1),
            gate: Mutex::default(),
            opened: Condvar::new(),
        });
        let (sender, events) = mpsc::channel();
        let threads = (0..vcpus)
            .map(|index| {
                let (shared, sender) = (Arc::clone(&shared), sender.clone());
                scope.spawn(move || shared.thread(index, &sender))
            })
            .collect();
        shared.bound.wait();
        shared.kickers().sort_by_key(|(index, _)| *index);
        Ok(Self { shared, threads, events })
    }

    /// The next event.
    pub fn next(&self) -> Outcome<Event> {
        loop {
            match self.events.recv_timeout(LOOK) {
                Ok(Event::Broken(index, why)) => return fail(format!("vCPU {index}: {why}")),
                Ok(Event::Hung(index, place)) => return fail(self.roll_call(Some((index, place)))),
                Ok(event) => return Ok(event),
                Err(RecvTimeoutError::Disconnected) => return fail("all vCPU threads have ended"),
                Err(RecvTimeoutError::Timeout) if self.shared.context.hung() => {
                    return fail(self.roll_call(None));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// The next event, if one comes within `time`.
    pub fn next_within(&self, time: Duration) -> Option<Event> {
        self.events.recv_timeout(time).ok()
    }

    /// The next store, by whichever vCPU: its index, address and value.
    pub fn next_store(&self) -> Outcome<(u32, u64, u64)> {
        match self.next()? {
            Event::Exit(index, Exit::MmioWrite { ipa, value, .. }) => Ok((index, ipa, value)),
            other => fail(format!("{other:x?}, expected a store")),
        }
    }

    /// Where each vCPU of a case that was given up is, in words. Which of them answers the watchdog first is chance, so that one alone says nothing.
    fn roll_call(&self, first: Option<(u32, Whereabouts)>) -> String {
        let mut places = BTreeMap::from_iter(first);
        let deadline = Instant::now() + ROLL_CALL;
        while places.len() < self.threads.len() {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Hung(index, place)) => {
                    places.insert(index, place);
                }
                // Exits that nobody waited for any more.
                Ok(_) => {}
                Err(_) => break,
            }
        }
        describe_hang(&places, self.threads.len())
    }

    /// The handle of vCPU `index`.
    pub fn kicker(&self, index: u32) -> Outcome<Arc<dyn Kick>> {
        match self.shared.kickers().get(index as usize) {
            Some((_, kicker)) => Ok(Arc::clone(kicker)),
            None => fail(format!("vCPU {index} was not bound")),
        }
    }

    /// Holds every vCPU from its next kick on until the result is dropped.
    pub fn pause(&self) -> Pause<'_> {
        self.shared.gate().closed = true;
        Pause(&self.shared.gate, &self.shared.opened)
    }

    /// Stops and joins the threads.
    pub fn stop(mut self) -> Outcome {
        self.join()
    }
}

impl Crew<'_, '_> {
    fn join(&mut self) -> Outcome {
        self.shared.stop.store(true, Ordering::SeqCst);
        for (_, kicker) in self.shared.kickers().iter() {
            kicker.kick();
        }
        let mut outcome = Ok(());
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                outcome = Err(Stop::Failed("a vCPU thread panicked".into()));
            }
        }
        outcome
    }
}

impl Drop for Crew<'_, '_> {
    fn drop(&mut self) {
        // A case that failed half-way: its own error counts.
        let _ = self.join();
    }
}

impl Shared<'_> {
    fn kickers(&self) -> MutexGuard<'_, Vec<(u32, Arc<dyn Kick>)>> {
        self.kickers.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn thread(&self, index: u32, sender: &Sender<Event>) {
        let bound = self.vm.bind_vcpu(index);
        if let Ok(vcpu) = &bound {
            self.kickers().push((index, vcpu.kicker()));
            self.context.watch(vcpu.kicker());
        }
        self.bound.wait();
        let result = bound.map_err(|e| e.to_string()).and_then(|vcpu| self.run(index, vcpu, sender));
        if let Err(why) = result {
            // The case may have ended already.
            let _ = sender.send(Event::Broken(index, why));
        }
    }

    fn run(&self, index: u32, mut vcpu: Box<dyn Vcpu>, sender: &Sender<Event>) -> Result<(), String> {
        if index == 0 {
            vcpu.set_boot_state(CODE, 0).map_err(|e| e.to_string())?;
        }
        let (mut exits, mut last) = (0, None);
        loop {
            let exit = vcpu.run().map_err(|e| e.to_string())?;
            // Before the case learns of it, which may open the gate then.
            let gate = *self.gate();
            let event = match exit {
                Exit::Kicked if self.context.hung() => {
                    // The case may have ended already.
                    let _ = sender.send(Event::Hung(index, Whereabouts::of(&*vcpu, exits, last)));
                    return Ok(());
                }
                Exit::Kicked if self.stop.load(Ordering::SeqCst) => return Ok(()),
                Exit::Kicked => Event::Kicked(index),
                Exit::MmioRead { .. } => {
                    vcpu.complete_read(ANSWER);
                    continue;
                }
                other => Event::Exit(index, other),
            };
            if let Event::Exit(_, exit) = &event {
                exits += 1;
                last = Some(*exit);
            }
            let kicked = matches!(event, Event::Kicked(_));
            if sender.send(event).is_err() {
                return Ok(());
            }
            if kicked && gate.closed {
                let left = self.opened.wait_while(self.gate(), |now| now.openings == gate.openings);
                drop(left.unwrap_or_else(|e| e.into_inner()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hang_names_every_vcpu_and_not_the_one_that_answered_first() {
        let at = |exits, pc| Whereabouts { exits, last: None, registers: Ok([pc, 3, 4]) };
        let places = BTreeMap::from([
            (0, at(7, 0x4000_0080)),
            (1, Whereabouts { exits: 2, last: Some(Exit::SystemOff), registers: Err("gone".into()) }),
            (2, at(0, 0)),
            (4, at(0, 0)),
        ]);
        assert_eq!(
            describe_hang(&places, 5),
            "hung: the guest made no progress; vCPU 0: 7 exits, the last None, PC 0x40000080, interrupts taken 3, used 4; \
             vCPU 1: 2 exits, the last Some(SystemOff), gone; never started: [2, 4]; no answer to kicks: [3]"
        );
    }
}
