//! PL061 GPIO controller (Arm DDI 0190): eight lines, of which one is the power key.

use crate::primecell;
use outboard_bus::{AccessError, IrqLine, MmioDevice, Width};
use std::sync::{Arc, Mutex};

/// The last data register: address bits 9:2 select the lines (DDI 0190, section 3.3.1).
const DATA_LAST: u64 = 0x3fc;
const DIR: u64 = 0x400;
const IS: u64 = 0x404;
const IBE: u64 = 0x408;
const IEV: u64 = 0x40c;
const IE: u64 = 0x410;
const RIS: u64 = 0x414;
const MIS: u64 = 0x418;
const IC: u64 = 0x41c;
const AFSEL: u64 = 0x420;

/// PeriphID0 to 3: part 0x061, designer 0x41 (Arm).
const PERIPH_ID: [u8; 4] = [0x61, 0x10, 0x04, 0x00];

/// The line that the power key drives, high while pressed.
pub const POWER_KEY_PIN: u8 = 3;

/// The controller. Lines that the guest does not drive are inputs, low at rest.
pub struct Pl061 {
    state: Mutex<State>,
    irq: Arc<dyn IrqLine>,
}

/// One bit a line, in every field.
#[derive(Debug, Default)]
struct State {
    input: u8,
    output: u8,
    direction: u8,
    level_sense: u8,
    both_edges: u8,
    event: u8,
    enabled: u8,
    edges: u8,
    alternate: u8,
}

impl State {
    fn lines(&self) -> u8 {
        (self.input & !self.direction) | (self.output & self.direction)
    }

    fn raw_interrupts(&self) -> u8 {
        let at_level = !(self.lines() ^ self.event);
        (self.edges & !self.level_sense) | (at_level & self.level_sense)
    }

    fn set_input(&mut self, input: u8) {
        let before = self.lines();
        self.input = input;
        let after = self.lines();
        let changed = before ^ after;
        let wanted = self.both_edges | !(after ^ self.event);
        self.edges |= changed & wanted & !self.level_sense;
    }

    /// The register at `offset`, where it is a plain byte that is read and written as it is.
    fn plain(&mut self, offset: u64) -> Option<&mut u8> {
        Some(match offset {
            DIR => &mut self.direction,
            IS => &mut self.level_sense,
            IBE => &mut self.both_edges,
            IEV => &mut self.event,
            IE => &mut self.enabled,
            AFSEL => &mut self.alternate,
            _ => return None,
        })
    }
}

/// The lines that a data register's address selects.
fn data_mask(offset: u64) -> u8 {
    (offset >> 2) as u8
}

impl Pl061 {
    /// A controller at reset whose interrupt is `irq`.
    pub fn new(irq: Arc<dyn IrqLine>) -> Self {
        Self { state: Mutex::default(), irq }
    }

    /// Presses or releases the power key.
    pub fn set_power_key(&self, pressed: bool) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let bit = 1 << POWER_KEY_PIN;
        let input = if pressed { state.input | bit } else { state.input & !bit };
        state.set_input(input);
        self.update_irq(&state);
    }

    fn update_irq(&self, state: &State) {
        self.irq.set(state.raw_interrupts() & state.enabled != 0);
    }
}

impl MmioDevice for Pl061 {
    fn name(&self) -> &str {
        "pl061"
    }

    fn read(&self, offset: u64, width: Width) -> Result<u64, AccessError> {
        primecell::check(offset, width)?;
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let value = match offset {
            0..=DATA_LAST => state.lines() & data_mask(offset),
            RIS => state.raw_interrupts(),
            MIS => state.raw_interrupts() & state.enabled,
            _ => match state.plain(offset) {
                Some(register) => *register,
                None => return primecell::id_register(offset, PERIPH_ID).ok_or(AccessError::NoRegister),
            },
        };
        Ok(value.into())
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        primecell::check(offset, width)?;
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let byte = value as u8;
        match offset {
            0..=DATA_LAST => {
                let mask = data_mask(offset) & state.direction;
                state.output = (state.output & !mask) | (byte & mask);
            }
            IC => state.edges &= !byte,
            _ => *state.plain(offset).ok_or(AccessError::NoRegister)? = byte,
        }
        self.update_irq(&state);
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

    fn gpio() -> (Arc<Line>, Pl061) {
        let line = Arc::new(Line::default());
        (line.clone(), Pl061::new(line))
    }

    #[test]
    fn both_edges_of_the_power_key_interrupt_as_gpio_keys_sets_it_up() {
        let (line, gpio) = gpio();
        let bit = 1u64 << POWER_KEY_PIN;
        for register in [IBE, IE] {
            gpio.write(register, Width::B1, bit).unwrap();
        }
        for pressed in [true, false] {
            gpio.set_power_key(pressed);
            assert!(line.0.load(Ordering::Relaxed));
            assert_eq!(gpio.read(bit << 2, Width::B1).unwrap() != 0, pressed);
            assert_eq!(gpio.read(0x3fc & !(bit << 2), Width::B1), Ok(0), "other lines are low");
            gpio.write(IC, Width::B1, bit).unwrap();
            assert!(!line.0.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn a_level_interrupt_stays_until_the_key_is_released() {
        let (line, gpio) = gpio();
        let bit = 1u64 << POWER_KEY_PIN;
        for register in [IS, IEV, IE] {
            gpio.write(register, Width::B1, bit).unwrap();
        }
        gpio.set_power_key(true);
        gpio.write(IC, Width::B1, bit).unwrap();
        assert!(line.0.load(Ordering::Relaxed));
        gpio.set_power_key(false);
        assert!(!line.0.load(Ordering::Relaxed));
    }

    #[test]
    fn survives_every_offset_width_and_value() {
        let (_, gpio) = gpio();
        for offset in 0..0x1000 {
            for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
                let _ = gpio.write(offset, width, u64::MAX);
                let _ = gpio.read(offset, width);
                gpio.set_power_key(offset % 2 == 0);
            }
        }
        assert_eq!(gpio.read(0xfe0, Width::B4), Ok(0x61));
    }
}
