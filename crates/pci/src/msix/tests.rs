use super::*;
use proptest::prelude::*;

#[derive(Default)]
struct Sent(Mutex<Vec<MsiMessage>>);

impl MsiSink for Sent {
    fn send(&self, message: MsiMessage) {
        self.0.lock().unwrap().push(message);
    }
}

impl Sent {
    fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

fn msix(vectors: u16) -> (Msix, Arc<Sent>) {
    let sent = Arc::new(Sent::default());
    (Msix::new(vectors, Arc::clone(&sent) as Arc<dyn MsiSink>), sent)
}

fn program(msix: &Msix, vector: u64, message: MsiMessage) {
    msix.table_write(16 * vector, Width::B4, message.address & 0xffff_ffff).unwrap();
    msix.table_write(16 * vector + 4, Width::B4, message.address >> 32).unwrap();
    msix.table_write(16 * vector + 8, Width::B4, u64::from(message.data)).unwrap();
}

fn mask(msix: &Msix, vector: u64, masked: bool) {
    msix.table_write(16 * vector + 12, Width::B4, u64::from(masked)).unwrap();
}

const MESSAGE: MsiMessage = MsiMessage { address: 0x1_0802_0040, data: 77 };

#[test]
fn vectors_start_masked_and_pend() {
    let (msix, sent) = msix(70);
    assert_eq!(msix.table_read(12, Width::B4), Ok(1));
    msix.trigger(65);
    msix.set_control(true, false);
    mask(&msix, 65, false);
    assert_eq!(sent.take(), [], "a trigger while MSI-X is off is no message");
    mask(&msix, 65, true);
    program(&msix, 65, MESSAGE);
    msix.trigger(65);
    msix.trigger(65);
    assert_eq!(sent.take(), []);
    assert_eq!(msix.pba_read(8, Width::B8), Ok(2));
    assert_eq!(msix.pba_read(8, Width::B4), Ok(2));
    assert_eq!(msix.pba_read(0, Width::B8), Ok(0));
    mask(&msix, 65, false);
    assert_eq!(sent.take(), [MESSAGE]);
    assert_eq!(msix.pba_read(8, Width::B8), Ok(0));
    msix.trigger(65);
    assert_eq!(sent.take(), [MESSAGE]);
}

#[test]
fn function_mask_and_bus_master_hold_messages_back() {
    let (msix, sent) = msix(1);
    program(&msix, 0, MESSAGE);
    mask(&msix, 0, false);
    msix.set_control(true, true);
    msix.trigger(0);
    assert_eq!((sent.take(), msix.pba_read(0, Width::B8)), (vec![], Ok(1)));
    msix.set_control(true, false);
    assert_eq!(sent.take(), [MESSAGE]);
    msix.set_control(true, true);
    msix.trigger(0);
    msix.set_control(false, true);
    msix.set_control(true, false);
    assert_eq!(sent.take(), [], "switching MSI-X off forgets what is pending");
}

#[test]
fn table_bounds_and_widths() {
    let (msix, _) = msix(2);
    for (offset, width, error) in [
        (32, Width::B4, AccessError::NoRegister),
        (!7, Width::B8, AccessError::NoRegister),
        (2, Width::B4, AccessError::BadWidth),
        (4, Width::B8, AccessError::BadWidth),
        (0, Width::B1, AccessError::BadWidth),
        (0, Width::B2, AccessError::BadWidth),
    ] {
        assert_eq!(msix.table_read(offset, width), Err(error), "{offset:#x} {width:?}");
        assert_eq!(msix.table_write(offset, width, 0), Err(error), "{offset:#x} {width:?}");
    }
    assert_eq!(msix.pba_read(8, Width::B8), Err(AccessError::NoRegister));
    msix.trigger(2);
    msix.table_write(16, Width::B8, u64::MAX).unwrap();
    assert_eq!(msix.table_read(16, Width::B8), Ok(!3));
    msix.table_write(24, Width::B8, u64::MAX - (1 << 32)).unwrap();
    assert_eq!(msix.table_read(24, Width::B8), Ok(0xffff_ffff), "only the mask bit of vector control exists");
}

/// Masking and unmasking while another thread triggers: the last trigger is never lost.
#[test]
fn unmask_races_with_trigger_without_losing_one() {
    let (msix, sent) = msix(1);
    msix.set_control(true, false);
    for round in 0..2_000u64 {
        mask(&msix, 0, true);
        std::thread::scope(|s| {
            s.spawn(|| msix.trigger(0));
            if round % 2 == 0 {
                mask(&msix, 0, false);
            } else {
                msix.set_control(true, true);
                mask(&msix, 0, false);
                msix.set_control(true, false);
            }
        });
        assert_eq!(sent.take().len(), 1, "round {round}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Trigger(u16),
    Mask(u64, bool),
    Control(bool, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u16..4).prop_map(Step::Trigger),
        (0u64..3, any::<bool>()).prop_map(|(v, m)| Step::Mask(v, m)),
        any::<(bool, bool)>().prop_map(|(e, h)| Step::Control(e, h)),
    ]
}

proptest! {
    /// Against a plain model: a message goes out exactly when a vector is pending and nothing masks it.
    #[test]
    fn delivers_as_the_model(steps in prop::collection::vec(step(), 0..100)) {
        let (msix, sent) = msix(3);
        let (mut pending, mut masked, mut enabled, mut held) = ([false; 3], [true; 3], false, false);
        for v in 0..3 {
            program(&msix, v, MsiMessage { address: 4 * v, data: v as u32 });
        }
        for step in steps {
            match step {
                Step::Trigger(v) => {
                    msix.trigger(v);
                    if let Some(p) = pending.get_mut(usize::from(v)) { *p |= enabled; }
                }
                Step::Mask(v, m) => { mask(&msix, v, m); masked[v as usize] = m; }
                Step::Control(e, h) => { msix.set_control(e, h); (enabled, held) = (e, h); }
            }
            let mut expected = vec![];
            for v in 0..3 {
                pending[v] &= enabled;
                if pending[v] && !masked[v] && enabled && !held {
                    pending[v] = false;
                    expected.push(v as u32);
                }
            }
            let got: Vec<u32> = sent.take().iter().map(|m| m.data).collect();
            prop_assert_eq!(got, expected);
            let bits = pending.iter().enumerate().fold(0, |b, (i, p)| b | u64::from(*p) << i);
            prop_assert_eq!(msix.pba_read(0, Width::B8), Ok(bits));
        }
    }
}

/// A route that behaves as an eventfd bound to the hypervisor: signals while connected are sent, others are kept.
#[derive(Default)]
struct Wire {
    state: Mutex<(Option<MsiMessage>, bool)>,
    sent: Mutex<Vec<MsiMessage>>,
}

impl Wire {
    fn signal(&self) {
        let mut state = self.state.lock().unwrap();
        match state.0 {
            Some(message) => self.sent.lock().unwrap().push(message),
            None => state.1 = true,
        }
    }
}

impl VectorRoutes for Wire {
    fn connect(&self, vector: u16, message: MsiMessage) {
        assert_eq!(vector, 1);
        let mut state = self.state.lock().unwrap();
        assert_eq!(state.0.replace(message), None, "connected once at a time");
        assert!(!std::mem::take(&mut state.1), "taken before");
    }
    fn disconnect(&self, _: u16) {
        assert!(self.state.lock().unwrap().0.take().is_some());
    }
    fn take(&self, vector: u16) -> bool {
        vector == 1 && std::mem::take(&mut self.state.lock().unwrap().1)
    }
}

#[test]
fn routed_vectors_are_connected_only_while_they_may_send_and_pend_otherwise() {
    let (sent, wire) = (Arc::new(Sent::default()), Arc::new(Wire::default()));
    let msix = Msix::with_routes(4, sent.clone(), Some(wire.clone()));
    program(&msix, 1, MESSAGE);
    mask(&msix, 1, false);
    wire.signal();
    msix.set_control(true, true);
    assert_eq!(
        msix.pba_read(0, Width::B4),
        Ok(2),
        "what came before the function mask went is seen in the PBA"
    );
    msix.set_control(true, false);
    assert_eq!((sent.take(), msix.is_pending(1)), (vec![MESSAGE], false));
    wire.signal();
    assert_eq!(*wire.sent.lock().unwrap(), [MESSAGE]);
    mask(&msix, 1, true);
    wire.signal();
    wire.signal();
    assert!(msix.is_pending(1));
    mask(&msix, 1, false);
    assert_eq!(sent.take(), [MESSAGE], "merged into one");
    mask(&msix, 1, true);
    wire.signal();
    msix.set_control(false, false);
    msix.set_control(true, false);
    mask(&msix, 1, false);
    assert_eq!(sent.take(), [], "disabling forgets");
    msix.reset();
    wire.signal();
    assert_eq!(wire.sent.lock().unwrap().len(), 1, "reset disconnects");
}
