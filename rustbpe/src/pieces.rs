//! A hash map from pieces of text to values, made for short pieces: they are kept inside the table as two integers.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A piece of 1 to 15 bytes: the bytes in order, then zeros, and the length in the last byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShortPiece {
    pub low: u64,
    pub high: u64,
}

impl ShortPiece {
    pub const MAX_LEN: usize = 15;

    /// The key of `bytes[start..end]`, or None if that is longer.
    #[inline(always)]
    pub fn new(bytes: &[u8], start: usize, end: usize) -> Option<ShortPiece> {
        let length = end - start;
        if length > Self::MAX_LEN {
            return None;
        }
        let word = match bytes.get(start..start + 16) {
            // Two plain loads, and what follows the piece is masked off.
            Some(sixteen) => {
                let mut word = [0; 16];
                word.copy_from_slice(sixteen);
                u128::from_le_bytes(word) & !(u128::MAX << (8 * length))
            }
            None => {
                let mut word = [0; 16];
                word[..length].copy_from_slice(&bytes[start..end]);
                u128::from_le_bytes(word)
            }
        };
        Some(ShortPiece { low: word as u64, high: (word >> 64) as u64 | (length as u64) << 56 })
    }

    /// The bytes, and how many of them are the piece.
    pub fn bytes(self) -> ([u8; 16], usize) {
        let word = self.low as u128 | (self.high as u128) << 64;
        (word.to_le_bytes(), (self.high >> 56) as usize)
    }

    #[inline(always)]
    pub fn hash(self) -> u64 {
        fold(self.low ^ 0x9e37_79b9_7f4a_7c15, self.high ^ 0xd1b5_4a32_d192_ed03)
    }
}

/// Mixes two words by the two halves of their product (as in wyhash).
#[inline(always)]
pub fn fold(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    product as u64 ^ (product >> 64) as u64
}

/// Hash of any number of bytes.
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut state = fold(bytes.len() as u64 ^ 0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        state = fold(state ^ u64::from_le_bytes(word), 0x9e37_79b9_7f4a_7c15);
    }
    state
}

/// `hash_bytes` for std's HashMap.
#[derive(Default)]
pub struct BytesHasher(u64);

impl Hasher for BytesHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = fold(self.0 ^ hash_bytes(bytes), 0xd1b5_4a32_d192_ed03);
    }
    fn write_usize(&mut self, _length: usize) {} // hash_bytes has mixed the length in already
    fn finish(&self) -> u64 {
        self.0
    }
}

/// Asks the processor to load `place` ahead of its use: misses of the cache are most of the time of training and encoding.
#[inline(always)]
pub fn prefetch<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect that a program can see, whatever the address, and SSE is part of x86_64.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(place as *const T as *const i8);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Short pieces with their hashes, which wait while the places where they belong are being loaded.
pub struct Waiting {
    pieces: [(ShortPiece, u64); Waiting::ROOM],
    used: usize,
}

impl Default for Waiting {
    fn default() -> Self {
        Waiting { pieces: [Default::default(); Waiting::ROOM], used: 0 }
    }
}

impl Waiting {
    const ROOM: usize = 32;

    /// Adds a piece, and says whether there is no more room.
    #[inline(always)]
    pub fn push(&mut self, piece: ShortPiece, hash: u64) -> bool {
        self.pieces[self.used] = (piece, hash);
        self.used += 1;
        self.used == Waiting::ROOM
    }

    /// Takes all pieces, in the order in which they came.
    #[inline(always)]
    pub fn take(&mut self) -> &[(ShortPiece, u64)] {
        &self.pieces[..std::mem::take(&mut self.used)]
    }
}

#[derive(Clone, Copy, Default)]
struct Slot<V> {
    /// A length of 0 marks an empty slot: no piece is empty.
    key: ShortPiece,
    value: V,
}

/// Pieces to values. Short pieces live in an open table with linear probing, long ones in std's map.
pub struct PieceMap<V> {
    slots: Vec<Slot<V>>,
    used: usize,
    long: HashMap<Box<[u8]>, V, BuildHasherDefault<BytesHasher>>,
}

impl<V: Copy + Default> Default for PieceMap<V> {
    fn default() -> Self {
        PieceMap { slots: vec![Slot::default(); 1 << 12], used: 0, long: HashMap::default() }
    }
}

impl<V: Copy + Default> PieceMap<V> {
    pub fn len(&self) -> usize {
        self.used + self.long.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held by the map, roughly.
    pub fn memory(&self) -> usize {
        let long: usize = self.long.keys().map(|key| key.len()).sum();
        self.slots.capacity() * std::mem::size_of::<Slot<V>>() + long + self.long.capacity() * 32
    }

    /// The value of `bytes[start..end]` (not empty), made if it is new.
    #[inline(always)]
    pub fn entry(&mut self, bytes: &[u8], start: usize, end: usize) -> &mut V {
        match ShortPiece::new(bytes, start, end) {
            Some(key) => self.short_entry(key, key.hash()),
            None => self.long_entry(&bytes[start..end]),
        }
    }

    #[inline(always)]
    pub fn short_entry(&mut self, key: ShortPiece, hash: u64) -> &mut V {
        let mut at = self.find(key, hash);
        if self.slots[at].key != key {
            at = self.insert(key, hash);
        }
        &mut self.slots[at].value
    }

    #[cold]
    fn insert(&mut self, key: ShortPiece, hash: u64) -> usize {
        if (self.used + 1) * 2 > self.slots.len() {
            self.grow();
        }
        self.used += 1;
        let at = self.find(key, hash);
        self.slots[at].key = key;
        at
    }

    #[cold]
    pub fn long_entry(&mut self, piece: &[u8]) -> &mut V {
        if !self.long.contains_key(piece) {
            self.long.insert(piece.into(), V::default());
        }
        self.long.get_mut(piece).expect("just inserted")
    }

    pub fn get(&self, piece: &[u8]) -> Option<V> {
        match ShortPiece::new(piece, 0, piece.len()) {
            Some(key) => self.get_short(key, key.hash()),
            None => self.long.get(piece).copied(),
        }
    }

    #[inline(always)]
    pub fn get_short(&self, key: ShortPiece, hash: u64) -> Option<V> {
        let slot = &self.slots[self.find(key, hash)];
        (slot.key == key).then_some(slot.value)
    }

    /// Index of `key`, or of the empty slot where it belongs.
    #[inline(always)]
    fn find(&self, key: ShortPiece, hash: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while self.slots[at].key != key && self.slots[at].key.high != 0 {
            at = (at + 1) & mask;
        }
        at
    }

    fn grow(&mut self) {
        let larger = vec![Slot::default(); self.slots.len() * 2];
        for slot in std::mem::replace(&mut self.slots, larger) {
            if slot.key.high != 0 {
                let at = self.find(slot.key, slot.key.hash());
                self.slots[at] = slot;
            }
        }
    }

    /// Loads the slot of this hash ahead of its use.
    #[inline(always)]
    pub fn prefetch(&self, hash: u64) {
        prefetch(&self.slots[hash as usize & (self.slots.len() - 1)]);
    }

    /// Every short piece.
    pub fn short_pieces(&self) -> impl Iterator<Item = (ShortPiece, V)> + '_ {
        self.slots.iter().filter(|slot| slot.key.high != 0).map(|slot| (slot.key, slot.value))
    }

    /// Every long piece.
    pub fn long_pieces(&self) -> impl Iterator<Item = (&[u8], V)> + '_ {
        self.long.iter().map(|(key, &value)| (&**key, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_do_not_depend_on_what_surrounds_the_piece() {
        let text: Vec<u8> = (1..=60).collect();
        for start in 0..40 {
            for length in 1..=15 {
                let inside = ShortPiece::new(&text, start, start + length).unwrap();
                let alone = ShortPiece::new(&text[start..start + length], 0, length).unwrap();
                assert_eq!(inside, alone);
                let (bytes, n) = inside.bytes();
                assert_eq!(&bytes[..n], &text[start..start + length]);
            }
        }
        assert_eq!(ShortPiece::new(&text, 0, 16), None);
    }

    #[test]
    fn counts_like_a_plain_map() {
        let mut map: PieceMap<u64> = PieceMap::default();
        let mut plain: HashMap<Vec<u8>, u64> = HashMap::new();
        let text: Vec<u8> = (0..60_000u32).map(|i| (i.wrapping_mul(2654435761) >> 29) as u8).collect();
        for start in 0..text.len() - 24 {
            let end = start + 1 + start % 20;
            *map.entry(&text, start, end) += 1;
            *plain.entry(text[start..end].to_vec()).or_default() += 1;
        }
        assert_eq!(map.len(), plain.len());
        for (piece, &count) in &plain {
            assert_eq!(map.get(piece), Some(count));
        }
        assert_eq!(map.get(b"absent"), None);
        assert_eq!(map.short_pieces().count() + map.long_pieces().count(), plain.len());
    }
}
