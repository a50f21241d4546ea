//! PL011 UART (Arm DDI 0183), the guest's serial console.
//!
//! The vCPU only moves bytes between registers and two bounded queues; a console thread of the machine empties and fills
//! them through [`Pl011::take_output`] and [`Pl011::receive`], woken by [`Pl011::wake`]. A host that does not
//! take the output makes the transmit FIFO full, which the guest's driver waits for; who empties it decides for how long.

use crate::primecell;
use outboard_bus::{AccessError, Event, IrqLine, MmioDevice, Width};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

const DR: u64 = 0x00;
const RSR: u64 = 0x04;
const FR: u64 = 0x18;
const ILPR: u64 = 0x20;
const IBRD: u64 = 0x24;
const FBRD: u64 = 0x28;
const LCR_H: u64 = 0x2c;
const CR: u64 = 0x30;
const IFLS: u64 = 0x34;
const IMSC: u64 = 0x38;
const RIS: u64 = 0x3c;
const MIS: u64 = 0x40;
const ICR: u64 = 0x44;
const DMACR: u64 = 0x48;

const FR_RXFE: u32 = 1 << 4;
const FR_TXFF: u32 = 1 << 5;
const FR_RXFF: u32 = 1 << 6;
const FR_TXFE: u32 = 1 << 7;

const INT_RX: u32 = 1 << 4;
const INT_TX: u32 = 1 << 5;
const INT_RX_TIMEOUT: u32 = 1 << 6;
const INT_ALL: u32 = 0x7ff;

/// PeriphID0 to 3: part 0x011, designer 0x41 (Arm), revision r1p5 (3), as QEMU and hardware say.
const PERIPH_ID: [u8; 4] = [0x11, 0x10, 0x34, 0x00];

/// Bytes that may wait for the host. The hardware's FIFO has 16; a longer one saves the guest from polling.
const TX_LIMIT: usize = 64 * 1024;
/// Bytes that may wait for the guest.
const RX_LIMIT: usize = 4096;

/// The UART. Registers reset to what the manual says; baud rate and line settings are kept but mean nothing.
pub struct Pl011 {
    state: Mutex<State>,
    irq: Arc<dyn IrqLine>,
    wake: Event,
}

#[derive(Default)]
struct State {
    tx: VecDeque<u8>,
    rx: VecDeque<u8>,
    /// Raw transmit interrupt: set when the queue drains, cleared by ICR, as the level of a real FIFO would.
    tx_raised: bool,
    imsc: u32,
    ilpr: u32,
    ibrd: u32,
    fbrd: u32,
    lcr_h: u32,
    cr: u32,
    ifls: u32,
    dmacr: u32,
}

impl State {
    fn raw_interrupts(&self) -> u32 {
        let rx = if self.rx.is_empty() { 0 } else { INT_RX | INT_RX_TIMEOUT };
        rx | if self.tx_raised { INT_TX } else { 0 }
    }

    fn flags(&self) -> u32 {
        let mut flags = 0;
        for (set, flag) in [
            (self.rx.is_empty(), FR_RXFE),
            (self.rx.len() >= RX_LIMIT, FR_RXFF),
            (self.tx.is_empty(), FR_TXFE),
            (self.tx.len() >= TX_LIMIT, FR_TXFF),
        ] {
            if set {
                flags |= flag;
            }
        }
        flags
    }
}

impl Pl011 {
    /// A UART at reset whose interrupt is `irq`.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(irq: Arc<dyn IrqLine>) -> io::Result<Self> {
        // CR resets to 0x300 (RXE, TXE), IFLS to 0x12.
        let state = State { cr: 0x300, ifls: 0x12, ..State::default() };
        Ok(Self { state: Mutex::new(state), irq, wake: Event::new()? })
    }

    /// Signalled when there is output to take, or room for input after [`Pl011::receive`] took less than it was given.
    pub fn wake(&self) -> &Event {
        &self.wake
    }

    /// Moves everything that the guest sent to the end of `out`.
    pub fn take_output(&self, out: &mut Vec<u8>) {
        let mut state = self.lock();
        if state.tx.is_empty() {
            return;
        }
        out.extend(state.tx.drain(..));
        state.tx_raised = true;
        self.update_irq(&state);
    }

    /// Gives the guest as much of `input` as there is room for; returns how many bytes that was.
    pub fn receive(&self, input: &[u8]) -> usize {
        let mut state = self.lock();
        let taken = input.len().min(RX_LIMIT - state.rx.len());
        state.rx.extend(&input[..taken]);
        self.update_irq(&state);
        taken
    }

    /// A poisoned lock would mean that a register access panicked; no invariant spans two fields, so go on.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn update_irq(&self, state: &State) {
        self.irq.set(state.raw_interrupts() & state.imsc != 0);
    }

    fn read_data(&self, state: &mut State) -> u32 {
        let was_full = state.rx.len() >= RX_LIMIT;
        let byte = state.rx.pop_front().unwrap_or(0);
        if was_full {
            self.wake.signal();
        }
        self.update_irq(state);
        byte.into()
    }

    fn write_data(&self, state: &mut State, byte: u8) {
        if state.tx.len() >= TX_LIMIT {
            // The driver was told with TXFF; hardware overwrites nothing and drops the byte too.
            return;
        }
        let was_empty = state.tx.is_empty();
        state.tx.push_back(byte);
        if was_empty {
            self.wake.signal();
        }
        // Room is left nearly always, so the next transmit interrupt is due at once.
        state.tx_raised = state.tx.len() < TX_LIMIT;
        self.update_irq(state);
    }
}

impl MmioDevice for Pl011 {
    fn name(&self) -> &str {
        "pl011"
    }

    fn read(&self, offset: u64, width: Width) -> Result<u64, AccessError> {
        primecell::check(offset, width)?;
        let mut state = self.lock();
        let value = match offset {
            DR => self.read_data(&mut state),
            RSR => 0,
            FR => state.flags(),
            ILPR => state.ilpr,
            IBRD => state.ibrd,
            FBRD => state.fbrd,
            LCR_H => state.lcr_h,
            CR => state.cr,
            IFLS => state.ifls,
            IMSC => state.imsc,
            RIS => state.raw_interrupts(),
            MIS => state.raw_interrupts() & state.imsc,
            DMACR => state.dmacr,
            _ => return primecell::id_register(offset, PERIPH_ID).ok_or(AccessError::NoRegister),
        };
        Ok(value.into())
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        primecell::check(offset, width)?;
        let mut state = self.lock();
        let word = value as u32;
        match offset {
            DR => self.write_data(&mut state, word as u8),
            // Error flags: there are never any.
            RSR => {}
            ILPR => state.ilpr = word & 0xff,
            IBRD => state.ibrd = word & 0xffff,
            FBRD => state.fbrd = word & 0x3f,
            LCR_H => state.lcr_h = word & 0xff,
            CR => state.cr = word & 0xffff,
            IFLS => state.ifls = word & 0x3f,
            IMSC => {
                state.imsc = word & INT_ALL;
                self.update_irq(&state);
            }
            ICR => {
                // Receive interrupts follow the FIFO's fill and return at once while bytes wait.
                if word & INT_TX != 0 {
                    state.tx_raised = false;
                }
                self.update_irq(&state);
            }
            DMACR => state.dmacr = word & 0x7,
            _ => return Err(AccessError::NoRegister),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Line(AtomicBool);

    impl IrqLine for Line {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::Relaxed);
        }
    }

    fn uart() -> (Arc<Line>, Pl011) {
        let line = Arc::new(Line::default());
        (line.clone(), Pl011::new(line).unwrap())
    }

    fn read(uart: &Pl011, offset: u64) -> u32 {
        uart.read(offset, Width::B4).unwrap() as u32
    }

    fn write(uart: &Pl011, offset: u64, value: u32) {
        uart.write(offset, Width::B4, value.into()).unwrap();
    }

    #[test]
    fn identifies_itself_as_a_pl011() {
        let (_, uart) = uart();
        let id: Vec<_> = (0..8).map(|i| read(&uart, 0xfe0 + 4 * i)).collect();
        assert_eq!(id, [0x11, 0x10, 0x34, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
    }

    #[test]
    fn sends_bytes_in_order_and_wakes_the_console_once() {
        let (_, uart) = uart();
        for byte in b"hello" {
            write(&uart, DR, u32::from(*byte));
        }
        assert!(uart.wake().take());
        let mut out = Vec::new();
        uart.take_output(&mut out);
        assert_eq!(out, b"hello");
        assert!(!uart.wake().take());
        assert_eq!(read(&uart, FR) & (FR_TXFE | FR_TXFF), FR_TXFE);
    }

    #[test]
    fn a_stalled_host_fills_the_fifo_and_loses_nothing_the_driver_was_allowed_to_send() {
        let (line, uart) = uart();
        let mut sent = 0;
        while read(&uart, FR) & FR_TXFF == 0 {
            write(&uart, DR, (sent & 0xff) as u32);
            sent += 1;
        }
        assert_eq!(sent, TX_LIMIT);
        write(&uart, IMSC, INT_TX);
        assert!(!line.0.load(Ordering::Relaxed), "no transmit interrupt while full");
        let mut out = Vec::new();
        uart.take_output(&mut out);
        assert_eq!(out.len(), sent);
        assert!(line.0.load(Ordering::Relaxed), "transmit interrupt once there is room");
        write(&uart, ICR, INT_TX);
        assert!(!line.0.load(Ordering::Relaxed));
    }

    #[test]
    fn receives_with_interrupt_until_the_fifo_is_empty() {
        let (line, uart) = uart();
        write(&uart, IMSC, INT_RX | INT_RX_TIMEOUT);
        assert_eq!(uart.receive(b"ab"), 2);
        assert!(line.0.load(Ordering::Relaxed));
        write(&uart, ICR, INT_ALL);
        assert!(line.0.load(Ordering::Relaxed), "bytes still wait");
        assert_eq!(read(&uart, DR), u32::from(b'a'));
        assert_eq!(read(&uart, DR), u32::from(b'b'));
        assert!(!line.0.load(Ordering::Relaxed));
        assert_eq!(read(&uart, FR) & FR_RXFE, FR_RXFE);
        assert_eq!(read(&uart, DR), 0);
    }

    #[test]
    fn takes_only_what_fits_and_wakes_the_console_when_there_is_room() {
        let (_, uart) = uart();
        let input = vec![7; RX_LIMIT + 10];
        assert_eq!(uart.receive(&input), RX_LIMIT);
        assert_eq!(uart.receive(&input), 0);
        read(&uart, DR);
        assert!(uart.wake().take());
        assert_eq!(uart.receive(&input), 1);
    }

    #[test]
    fn survives_every_offset_width_and_value() {
        let (_, uart) = uart();
        for offset in 0..0x1000 {
            for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
                let _ = uart.read(offset, width);
                for value in [0, u64::MAX, 0x5555_5555_5555_5555] {
                    let _ = uart.write(offset, width, value);
                }
            }
        }
    }
}
