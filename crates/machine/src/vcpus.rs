//! The vCPU threads of a VM: one each, bound for life, run, paused and stopped together.

use crate::Error;
use nix::time::{ClockId, clock_gettime};
use outboard_bus::{MmioBus, Width, warn_limited};
use outboard_hypervisor::{Exit, Kick, Register, Vcpu, Vm};
use outboard_jail::ThreadKind;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long to wait for a vCPU to come out of the guest before it is kicked again. A kick cannot get lost by the back
/// ends' contract; repeating it costs nothing and survives a hypervisor that breaks it (facts: Hypervisor.framework loses some).
const KICK_AGAIN: Duration = Duration::from_millis(100);

/// What a vCPU's exit asks of the whole machine.
#[derive(Debug)]
pub(crate) enum VcpuEvent {
    /// PSCI SYSTEM_OFF.
    PowerOff,
    /// PSCI SYSTEM_RESET.
    Reset,
    /// The hypervisor failed; the guest cannot go on.
    Failed(outboard_hypervisor::Error),
}

/// Where vCPU threads report to; called on a vCPU thread, must not block.
pub(crate) type Reporter = Arc<dyn Fn(VcpuEvent) + Send + Sync>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

struct State {
    wish: Wish,
    /// Threads that are out of the guest and will not enter it before the wish changes.
    parked: u32,
    /// Threads that will never enter it again.
    ended: u32,
    /// Where each vCPU was when it last left the guest for a pause; `None` if that is not known.
    cpus: Vec<Option<CpuState>>,
}

/// The state of a vCPU that is out of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuState {
    /// PSTATE in the layout of SPSR_EL1 (Arm DDI 0487, C5.2.19).
    pub(crate) pstate: u64,
    /// Next instruction.
    pub(crate) pc: u64,
    /// CPU time that its thread has taken so far, in and out of the guest.
    pub(crate) run_time: Duration,
}

/// What the threads and their owner share.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    /// The thread is done with its vCPU.
    fn end(&self) {
        self.lock().ended += 1;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits, parked, until the vCPU may run (`true`) or must end (`false`).
    fn admit(&self) -> bool {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        while state.wish == Wish::Pause {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        state.parked -= 1;
        state.wish == Wish::Run
    }
}

/// The vCPUs of a VM. They start paused. Dropping it stops them and waits for their threads.
pub(crate) struct Vcpus {
    shared: Arc<Shared>,
    kickers: Vec<Arc<dyn Kick>>,
    threads: Vec<JoinHandle<()>>,
}

/// Where the boot CPU starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// First instruction.
    pub(crate) pc: u64,
    /// Address of the device tree.
    pub(crate) fdt: u64,
}

impl Vcpus {
    /// Binds `count` vCPUs of `vm` to new threads, ready to run from `entry` after [`Vcpus::resume`].
    ///
    /// # Errors
    /// [`Error::Hypervisor`] if one cannot be made, [`Error::Thread`]; no thread is left then.
    pub(crate) fn start(
        vm: &Arc<dyn Vm>,
        count: u32,
        entry: Entry,
        bus: &Arc<MmioBus>,
        report: &Reporter,
    ) -> Result<Self, Error> {
        let state =
            Mutex::new(State { wish: Wish::Pause, parked: 0, ended: 0, cpus: vec![None; count as usize] });
        let shared = Arc::new(Shared { state, changed: Condvar::new() });
        let mut vcpus = Self { shared, kickers: Vec::new(), threads: Vec::new() };
        for index in 0..count {
            let (vm, bus, report, shared) = (vm.clone(), bus.clone(), report.clone(), vcpus.shared.clone());
            let (ready, made) = std::sync::mpsc::channel();
            let body = move || match bind(&*vm, index, entry) {
                Ok(mut vcpu) => {
                    // The receiver waits right below; if it is gone, the wish is Stop already.
                    let _ = ready.send(Ok(vcpu.kicker()));
                    run(index, &mut *vcpu, &shared, &bus, &report);
                    drop(vcpu);
                    shared.end();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            };
            let name = format!("vcpu{index}");
            let thread = outboard_jail::spawn(ThreadKind::Vcpu, &name, body).map_err(Error::Thread)?;
            vcpus.threads.push(thread);
            let kicker = made.recv().expect("the thread sends before it ends")?;
            vcpus.kickers.push(kicker);
        }
        Ok(vcpus)
    }

    /// Lets the vCPUs run.
    pub(crate) fn resume(&self) {
        self.shared.lock().wish = Wish::Run;
        self.shared.changed.notify_all();
    }

    /// Takes all vCPUs out of the guest; none enters it again before [`Vcpus::resume`].
    pub(crate) fn pause(&self) {
        self.settle(Wish::Pause, |state, count| state.parked + state.ended == count);
    }

    /// Takes all vCPUs out of the guest for a moment; the states they were in, or `None` if one of them will not run again.
    pub(crate) fn look(&self) -> Option<Vec<CpuState>> {
        self.pause();
        let states = {
            let state = self.shared.lock();
            if state.ended == 0 { state.cpus.iter().copied().collect() } else { None }
        };
        self.resume();
        states
    }

    /// Changes the wish, then kicks until `done`.
    fn settle(&self, wish: Wish, done: impl Fn(&State, u32) -> bool) {
        let count = self.kickers.len() as u32;
        self.shared.lock().wish = wish;
        self.shared.changed.notify_all();
        loop {
            for kicker in &self.kickers {
                kicker.kick();
            }
            let state = self.shared.lock();
            let waited =
                self.shared.changed.wait_timeout_while(state, KICK_AGAIN, |state| !done(state, count));
            let (state, _) = waited.unwrap_or_else(|e| e.into_inner());
            if done(&state, count) {
                return;
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.settle(Wish::Stop, |state, count| state.ended == count);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked; this is a bug in Outboard, please report it");
            }
        }
    }
}

fn bind(vm: &dyn Vm, index: u32, entry: Entry) -> Result<Box<dyn Vcpu>, outboard_hypervisor::Error> {
    let mut vcpu = vm.bind_vcpu(index)?;
    if index == 0 {
        vcpu.set_boot_state(entry.pc, entry.fdt)?;
    }
    Ok(vcpu)
}

/// A vCPU's life. The lock is only taken after a kick: MMIO exits go straight to the bus.
fn run(index: u32, vcpu: &mut dyn Vcpu, shared: &Shared, bus: &MmioBus, report: &Reporter) {
    while shared.admit() {
        let event = loop {
            match run_once(vcpu, bus) {
                Ok(Some(event)) => break Some(event),
                Ok(None) => {}
                Err(Kicked) => break None,
            }
        };
        let state = if event.is_none() { cpu_state(vcpu) } else { None };
        shared.lock().cpus[index as usize] = state;
        if let Some(event) = event {
            report(event);
            // This vCPU has nothing more to do until the machine stops it.
            wait_for_stop(shared);
            return;
        }
    }
}

/// The state of a vCPU that has just left the guest; `None` if it cannot be had.
fn cpu_state(vcpu: &dyn Vcpu) -> Option<CpuState> {
    let (pstate, pc) = (vcpu.register(Register::Cpsr).ok()?, vcpu.register(Register::Pc).ok()?);
    let run_time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok()?;
    Some(CpuState { pstate, pc, run_time: run_time.into() })
}

/// The vCPU must look at the wish.
struct Kicked;

fn run_once(vcpu: &mut dyn Vcpu, bus: &MmioBus) -> Result<Option<VcpuEvent>, Kicked> {
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        Err(error) => return Ok(Some(VcpuEvent::Failed(error))),
    };
    match exit {
        Exit::MmioRead { ipa, width } => vcpu.complete_read(bus.read(ipa, mmio_width(width))),
        Exit::MmioWrite { ipa, width, value } => bus.write(ipa, mmio_width(width), value),
        Exit::Undecoded { ipa, pc, syndrome } => {
            warn_limited!(
                "guest instruction at {pc:#x} accesses the device at {ipa:#x} in a way that cannot be emulated \
                 (pair, vector, exclusive or atomic access; syndrome {syndrome:#x}); it gets a data abort"
            );
            if let Err(error) = vcpu.inject_data_abort() {
                return Ok(Some(VcpuEvent::Failed(error)));
            }
        }
        Exit::SystemOff => return Ok(Some(VcpuEvent::PowerOff)),
        Exit::SystemReset => return Ok(Some(VcpuEvent::Reset)),
        Exit::Kicked => return Err(Kicked),
    }
    Ok(None)
}

fn mmio_width(bytes: u8) -> Width {
    Width::from_bytes(bytes.into()).expect("back ends report widths of 1, 2, 4 or 8 bytes")
}

fn wait_for_stop(shared: &Shared) {
    let mut state = shared.lock();
    state.parked += 1;
    shared.changed.notify_all();
    while state.wish != Wish::Stop {
        state = shared.changed.wait(state).unwrap_or_else(|e| e.into_inner());
    }
    state.parked -= 1;
}

#[cfg(test)]
mod tests;
