//! A hash map from a pair of token ids to a `u32`.

use crate::pieces::fold;

pub type Pair = (u32, u32);

/// No id is this large, so it marks empty slots.
pub const NO_TOKEN: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Slot {
    pair: Pair,
    value: u32,
}

const EMPTY: Slot = Slot { pair: (NO_TOKEN, NO_TOKEN), value: 0 };

/// An open table with linear probing; at most half full.
pub struct PairMap {
    slots: Vec<Slot>,
    used: usize,
}

impl Default for PairMap {
    fn default() -> Self {
        PairMap { slots: vec![EMPTY; 1 << 10], used: 0 }
    }
}

impl PairMap {
    #[inline(always)]
    pub fn get(&self, pair: Pair) -> Option<u32> {
        let slot = &self.slots[self.find(pair)];
        (slot.pair == pair).then_some(slot.value)
    }

    /// Sets the value of a pair.
    pub fn insert(&mut self, pair: Pair, value: u32) {
        if (self.used + 1) * 2 > self.slots.len() {
            let larger = vec![EMPTY; self.slots.len() * 2];
            for slot in std::mem::replace(&mut self.slots, larger) {
                if slot.pair != EMPTY.pair {
                    let at = self.find(slot.pair);
                    self.slots[at] = slot;
                }
            }
        }
        let at = self.find(pair);
        self.used += (self.slots[at].pair == EMPTY.pair) as usize;
        self.slots[at] = Slot { pair, value };
    }

    #[inline(always)]
    fn find(&self, pair: Pair) -> usize {
        let mask = self.slots.len() - 1;
        let key = (pair.0 as u64) << 32 | pair.1 as u64;
        let mut at = fold(key ^ 0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03) as usize & mask;
        while self.slots[at].pair != pair && self.slots[at].pair != EMPTY.pair {
            at = (at + 1) & mask;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_inserted() {
        let mut map = PairMap::default();
        for i in 0..50_000u32 {
            map.insert((i, i.wrapping_mul(77) % 1000), i);
        }
        map.insert((5, 385), 9);
        for i in (0..50_000u32).filter(|&i| i != 5) {
            assert_eq!(map.get((i, i.wrapping_mul(77) % 1000)), Some(i));
        }
        assert_eq!(map.get((5, 385)), Some(9));
        assert_eq!(map.get((1, 2)), None);
    }
}
