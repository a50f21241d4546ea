use super::*;
use outboard_hypervisor::{
    Error as HvError, GicConfig, InterruptController, MemoryKind, Register, Result as HvResult,
};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

/// A VM whose vCPUs follow a script: they "run" until kicked, or exit as told.
#[derive(Default)]
struct FakeVm {
    /// Set while any vCPU is in the guest.
    inside: AtomicU64,
    entered: AtomicU64,
    power_off_at: AtomicU64,
    broken_vcpu: Option<u32>,
}

struct FakeVcpu {
    vm: Arc<FakeVm>,
    kick: Arc<FakeKick>,
}

#[derive(Default)]
struct FakeKick(AtomicBool);

impl Kick for FakeKick {
    fn kick(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Vcpu for FakeVcpu {
    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }
    fn set_boot_state(&mut self, _: u64, _: u64) -> HvResult<()> {
        Ok(())
    }
    fn run(&mut self) -> HvResult<Exit> {
        self.vm.inside.fetch_add(1, Ordering::SeqCst);
        let entered = self.vm.entered.fetch_add(1, Ordering::SeqCst) + 1;
        let exit = if entered == self.vm.power_off_at.load(Ordering::SeqCst) {
            Exit::SystemOff
        } else {
            while !self.kick.0.swap(false, Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            Exit::Kicked
        };
        self.vm.inside.fetch_sub(1, Ordering::SeqCst);
        Ok(exit)
    }
    fn complete_read(&mut self, _: u64) {}
    fn inject_data_abort(&mut self) -> HvResult<()> {
        Ok(())
    }
    fn register(&self, _: Register) -> HvResult<u64> {
        Ok(0)
    }
    fn set_register(&mut self, _: Register, _: u64) -> HvResult<()> {
        Ok(())
    }
}

struct SharedVm(Arc<FakeVm>);

#[allow(unsafe_code)] // UNSAFETY: the trait's map is unsafe to call; this one maps nothing.
impl Vm for SharedVm {
    unsafe fn map(&self, _: u64, _: NonNull<u8>, _: u64, _: MemoryKind) -> HvResult<()> {
        Ok(())
    }
    fn unmap(&self, _: u64, _: u64) -> HvResult<()> {
        Ok(())
    }
    fn create_interrupt_controller(&self, _: &GicConfig) -> HvResult<Arc<dyn InterruptController>> {
        Err(HvError::WrongPhase("not in this test"))
    }
    fn bind_vcpu(&self, index: u32) -> HvResult<Box<dyn Vcpu>> {
        if self.0.broken_vcpu == Some(index) {
            return Err(HvError::WrongPhase("broken on purpose"));
        }
        Ok(Box::new(FakeVcpu { vm: self.0.clone(), kick: Arc::default() }))
    }
    fn bind_doorbell(&self, _: u64, _: u8, _: Option<u32>, _: BorrowedFd<'_>) -> HvResult<()> {
        Ok(())
    }
    fn unbind_doorbell(&self, _: u64, _: u8, _: Option<u32>, _: BorrowedFd<'_>) -> HvResult<()> {
        Ok(())
    }
}

fn start(vm: &Arc<FakeVm>, count: u32) -> (Result<Vcpus, Error>, mpsc::Receiver<VcpuEvent>) {
    let (sender, events) = mpsc::channel();
    let sender = Mutex::new(sender);
    let report: Reporter = Arc::new(move |event| sender.lock().unwrap().send(event).unwrap());
    let vm: Arc<dyn Vm> = Arc::new(SharedVm(vm.clone()));
    let vcpus = Vcpus::start(&vm, count, Entry { pc: 0, fdt: 0 }, &Arc::new(MmioBus::new()), &report);
    (vcpus, events)
}

#[test]
fn no_vcpu_is_in_the_guest_while_paused() {
    let vm = Arc::new(FakeVm::default());
    let (vcpus, _events) = start(&vm, 2);
    let vcpus = vcpus.unwrap();
    assert_eq!(vm.entered.load(Ordering::SeqCst), 0, "they start paused");
    for _ in 0..2_000 {
        vcpus.resume();
        vcpus.pause();
        assert_eq!(vm.inside.load(Ordering::SeqCst), 0);
    }
    let entered = vm.entered.load(Ordering::SeqCst);
    std::thread::yield_now();
    assert_eq!(vm.entered.load(Ordering::SeqCst), entered);
    vcpus.resume();
    while vm.inside.load(Ordering::SeqCst) < 2 {
        std::thread::yield_now();
    }
    drop(vcpus);
    assert_eq!(vm.inside.load(Ordering::SeqCst), 0);
}

#[test]
fn a_power_off_is_reported_once_and_the_others_can_still_be_paused_and_stopped() {
    let vm = Arc::new(FakeVm { power_off_at: AtomicU64::new(2), ..FakeVm::default() });
    let (vcpus, events) = start(&vm, 4);
    let vcpus = vcpus.unwrap();
    vcpus.resume();
    assert!(matches!(events.recv().unwrap(), VcpuEvent::PowerOff));
    vcpus.pause();
    assert_eq!(vm.inside.load(Ordering::SeqCst), 0);
    drop(vcpus);
    assert!(events.recv().is_err(), "nothing else was reported");
}

#[test]
fn a_vcpu_that_cannot_be_made_leaves_no_thread_behind() {
    let vm = Arc::new(FakeVm { broken_vcpu: Some(2), ..FakeVm::default() });
    let (vcpus, _events) = start(&vm, 4);
    assert!(matches!(vcpus.err(), Some(Error::Hypervisor(_))));
    assert_eq!(Arc::strong_count(&vm), 1, "every thread and vCPU is gone");
}
