/// Small numbers, given out and taken back; a number that came back is given out again before a new one is.
#[derive(Debug)]
pub struct Slots {
    free: Vec<u32>,
    /// The first number that was never given out.
    next: u32,
    limit: u32,
}

impl Slots {
    /// The numbers from 0 to below `limit`.
    pub fn new(limit: u32) -> Self {
        Self { free: Vec::new(), next: 0, limit }
    }

    /// A number that nobody has; `None` if all are out.
    pub fn take(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let slot = Some(self.next).filter(|next| *next < self.limit)?;
        self.next += 1;
        Some(slot)
    }

    /// Takes `slot` back.
    pub fn give_back(&mut self, slot: u32) {
        debug_assert!(slot < self.next && !self.free.contains(&slot), "slot {slot} is not out");
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_into_use() {
        let mut slots = Slots::new(3);
        assert_eq!(
            [slots.take(), slots.take(), slots.take(), slots.take()],
            [Some(0), Some(1), Some(2), None]
        );
        slots.give_back(1);
        assert_eq!([slots.take(), slots.take()], [Some(1), None]);
        for _ in 0..1000 {
            slots.give_back(0);
            slots.give_back(2);
            let mut again = [slots.take(), slots.take()];
            again.sort();
            assert_eq!(again, [Some(0), Some(2)]);
        }
    }
}
