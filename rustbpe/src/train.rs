//! Training: merge the most frequent pair of tokens, again and again.
//!
//! Merge order: highest count first; of equal counts the smaller pair (left id, then right id). The k-th merge makes
//! token 256 + k. Counts are exact, so the merges do not depend on the order of the pieces.
//!
//! The pieces lie one after another in one array with a place for each byte. A token fills as many places as it has
//! bytes, and its id stands in the first and in the last of them, so both neighbours of a token are one look away and
//! merging never moves anything. Beside the id stands how often the piece occurs. Each pair knows the places where it may start; places that have changed since are
//! recognized by the ids found there.
//!
//! Only pairs that could be merged soon are kept exactly: those that occur at least 2^level times are in the heap and
//! their counts follow every merge. All others lie in bins by the logarithm of their count, untouched (counts only
//! fall), until the heap has nothing left on its level; then the next bin is counted again and joins.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::count::PieceCounts;
use crate::pairs::{Pair, PairMap, NO_TOKEN};
use crate::pieces::prefetch;

/// Between pieces, and in places that no longer start a token.
const GAP: u32 = NO_TOKEN;

/// In `hot_index`: the pair has left.
const GONE: u32 = u32::MAX;

/// A pair of tokens, how often it occurs, and where in `Trainer::places` its places are listed, in ascending order.
#[derive(Default)]
struct Candidate {
    pair: Pair,
    count: u64,
    places: Range<usize>,
}

#[derive(Clone, Copy)]
struct Place {
    token: u32,
    /// How often the piece occurs that this place belongs to.
    count: u32,
}

struct Trainer {
    text: Vec<Place>,
    /// Bytes of each token.
    lengths: Vec<u32>,
    places: Vec<u32>,
    /// Pairs that occur at least 2^level times, and where to find them.
    hot: Vec<Candidate>,
    hot_index: PairMap,
    heap: BinaryHeap<(u64, Reverse<Pair>, u32)>,
    level: u32,
    /// Bin b holds pairs that were last seen 2^b to 2^(b+1)-1 times, b < level.
    cold: Vec<Vec<Candidate>>,
    left: Neighbours,
    right: Neighbours,
}

/// The tokens found on one side of a merge: how often each, and at which places the new pairs start.
#[derive(Default)]
struct Neighbours {
    /// By token id; zero except for the tokens in `seen`.
    counts: Vec<u64>,
    num_places: Vec<u32>,
    seen: Vec<u32>,
    /// Token and place of the new pair, in the order of the text.
    found: Vec<(u32, u32)>,
}

struct Neighbour {
    id: u32,
    count: u64,
    places: Range<usize>,
}

impl Neighbours {
    #[inline(always)]
    fn add(&mut self, token: u32, place: usize, count: u64) {
        let id = token as usize;
        if self.num_places[id] == 0 {
            self.seen.push(token);
        }
        self.num_places[id] += 1;
        self.counts[id] += count;
        self.found.push((token, place as u32));
    }

    /// Appends the places to `places`, those of one token together, and forgets everything.
    fn group(&mut self, places: &mut Vec<u32>) -> Vec<Neighbour> {
        let base = places.len();
        let mut total = 0;
        for &token in &self.seen {
            let next = &mut self.num_places[token as usize];
            total += std::mem::replace(next, total);
        }
        places.resize(base + total as usize, 0);
        for (token, place) in self.found.drain(..) {
            let next = &mut self.num_places[token as usize];
            places[base + *next as usize] = place;
            *next += 1;
        }
        let mut start = base;
        let (num_places, counts) = (&mut self.num_places, &mut self.counts);
        let take = |id: u32| {
            let end = base + std::mem::take(&mut num_places[id as usize]) as usize;
            let places = std::mem::replace(&mut start, end)..end;
            Neighbour { id, count: std::mem::take(&mut counts[id as usize]), places }
        };
        self.seen.drain(..).map(take).collect()
    }
}

/// Learns up to `vocab_size - 256` merges; fewer if no pair is left. `report` hears the number of merges now and then,
/// and stops the training by returning false.
pub fn train(pieces: PieceCounts, vocab_size: usize, report: &mut dyn FnMut(u64) -> bool) -> Result<Vec<Pair>, String> {
    let wanted = vocab_size.saturating_sub(256);
    let mut trainer = Trainer::new(pieces)?;
    let mut merges = Vec::new();
    while merges.len() < wanted {
        let best = match trainer.pop() {
            Some(best) => best,
            None => break,
        };
        merges.push(trainer.merge(best));
        if merges.len() % 256 == 0 && !report(merges.len() as u64) {
            return Err("stopped by the progress callback".into());
        }
    }
    Ok(merges)
}

impl Trainer {
    fn new(pieces: PieceCounts) -> Result<Trainer, String> {
        let PieceCounts { bytes, ends, counts } = pieces;
        let gap = Place { token: GAP, count: 0 };
        let mut text = Vec::with_capacity(bytes.len() + ends.len() + 1);
        text.push(gap);
        let mut start = 0;
        for (&end, &total) in ends.iter().zip(&counts) {
            // A count beyond 32 bits is shared by several copies of the piece.
            let mut left = total;
            while left > 0 {
                let count = left.min(u32::MAX as u64) as u32;
                text.extend(bytes[start..end].iter().map(|&b| Place { token: b as u32, count }));
                text.push(gap);
                left -= count as u64;
            }
            start = end;
        }
        if text.len() >= GAP as usize {
            return Err(format!("{} bytes of distinct pieces are more than the trainer can number", text.len()));
        }
        let mut trainer = Trainer {
            text,
            lengths: vec![1; 256],
            places: Vec::new(),
            hot: Vec::new(),
            hot_index: PairMap::default(),
            heap: BinaryHeap::new(),
            level: u64::BITS,
            cold: (0..u64::BITS).map(|_| Vec::new()).collect(),
            left: Neighbours::default(),
            right: Neighbours::default(),
        };
        trainer.add_byte_pairs();
        Ok(trainer)
    }

    /// Makes the candidates of the untouched pieces. The places of each pair are sorted by counting.
    fn add_byte_pairs(&mut self) {
        let key = |window: &[Place]| (window[0].token << 8 | window[1].token) as usize;
        let mut count = vec![0u64; 1 << 16];
        let mut next = vec![0usize; 1 << 16];
        let is_pair = |window: &[Place]| window[0].token != GAP && window[1].token != GAP;
        for window in self.text.windows(2).filter(|window| is_pair(window)) {
            count[key(window)] += window[0].count as u64;
            next[key(window)] += 1;
        }
        let mut total = 0;
        for slot in &mut next {
            total += std::mem::replace(slot, total);
        }
        self.places = vec![0; total];
        for (i, window) in self.text.windows(2).enumerate().filter(|(_, window)| is_pair(window)) {
            let slot = &mut next[key(window)];
            self.places[*slot] = i as u32;
            *slot += 1;
        }
        for pair in 0..1 << 16 {
            let start = if pair == 0 { 0 } else { next[pair - 1] };
            self.add(Candidate {
                pair: (pair as u32 >> 8, pair as u32 & 255),
                count: count[pair],
                places: start..next[pair],
            });
        }
    }

    /// Puts a candidate where its count belongs.
    #[inline(always)]
    fn add(&mut self, candidate: Candidate) {
        if candidate.count == 0 {
            return;
        }
        let bin = candidate.count.leading_zeros() ^ (u64::BITS - 1);
        if bin < self.level {
            self.cold[bin as usize].push(candidate);
        } else {
            let index = self.hot.len() as u32;
            self.hot_index.insert(candidate.pair, index);
            self.heap.push((candidate.count, Reverse(candidate.pair), index));
            self.hot.push(candidate);
        }
    }

    /// The most frequent pair of all, taken out.
    fn pop(&mut self) -> Option<Candidate> {
        loop {
            while let Some(&(seen_count, Reverse(pair), index)) = self.heap.peek() {
                let count = self.hot[index as usize].count;
                let level_reached = count >> self.level != 0;
                self.heap.pop();
                if level_reached && count < seen_count {
                    self.heap.push((count, Reverse(pair), index)); // rarer since: finds its new place in the heap
                    continue;
                }
                let candidate = std::mem::take(&mut self.hot[index as usize]);
                self.hot_index.insert(pair, GONE);
                if level_reached {
                    return Some(candidate);
                }
                self.add(candidate);
            }
            self.level = (0..self.level).rev().find(|&bin| !self.cold[bin as usize].is_empty())?;
            for mut candidate in std::mem::take(&mut self.cold[self.level as usize]) {
                self.count_again(&mut candidate);
                self.add(candidate);
            }
        }
    }

    /// Drops the places where the pair has gone.
    fn count_again(&mut self, candidate: &mut Candidate) {
        let (a, b) = candidate.pair;
        let step = self.lengths[a as usize] as usize;
        let mut kept = candidate.places.start;
        candidate.count = 0;
        for i in candidate.places.clone() {
            let place = self.places[i] as usize;
            if self.text[place].token == a && self.text[place + step].token == b {
                self.places[kept] = place as u32;
                kept += 1;
                candidate.count += self.text[place].count as u64;
            }
        }
        candidate.places.end = kept;
    }

    /// Replaces the pair by a new token everywhere, and counts the pairs that this makes and unmakes.
    fn merge(&mut self, best: Candidate) -> Pair {
        let (a, b) = best.pair;
        let new = self.lengths.len() as u32;
        let (length_a, length_b) = (self.lengths[a as usize] as usize, self.lengths[b as usize] as usize);
        self.lengths.push((length_a + length_b) as u32);
        for side in [&mut self.left, &mut self.right] {
            side.counts.resize(new as usize + 1, 0);
            side.num_places.resize(new as usize + 1, 0);
        }
        // Occurrences of (new, a) that were counted and then merged themselves, as in "abab".
        let mut undone = 0;
        for i in best.places.clone() {
            if let Some(&ahead) = self.places.get(i + 8) {
                prefetch(&self.text[ahead as usize]);
            }
            let place = self.places[i] as usize;
            let middle = place + length_a;
            if self.text[place].token != a || self.text[middle].token != b {
                continue;
            }
            let end = middle + length_b;
            let count = self.text[place].count as u64;
            let (before, after) = (self.text[place - 1].token, self.text[end].token);
            self.text[middle].token = GAP;
            self.text[place].token = new;
            self.text[end - 1].token = new;
            if before != GAP {
                self.left.add(before, place - self.lengths[before as usize] as usize, count);
                if before == new {
                    undone += count;
                }
            }
            if after != GAP {
                self.right.add(after, place, count);
            }
        }
        for token in self.left.group(&mut self.places) {
            // (token, a) has become (token, new); where token is new itself, that was `undone`.
            self.lower((token.id, a), token.count);
            self.add(Candidate { pair: (token.id, new), count: token.count, places: token.places });
        }
        for token in self.right.group(&mut self.places) {
            self.lower((b, token.id), token.count);
            let count = if token.id == a { token.count - undone } else { token.count };
            self.add(Candidate { pair: (new, token.id), count, places: token.places });
        }
        best.pair
    }

    /// Takes `count` from a pair whose count is kept exactly.
    #[inline(always)]
    fn lower(&mut self, pair: Pair, count: u64) {
        if let Some(index) = self.hot_index.get(pair) {
            if index != GONE {
                self.hot[index as usize].count -= count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn pieces(words: &[(&str, u64)]) -> PieceCounts {
        let mut all = PieceCounts::default();
        words.iter().for_each(|(word, count)| all.push(word.as_bytes(), *count));
        all
    }

    fn merges(words: &[(&str, u64)], vocab_size: usize) -> Vec<Pair> {
        train(pieces(words), vocab_size, &mut |_| true).unwrap()
    }

    /// Counts all pairs anew before every merge.
    fn merges_slowly(words: &[(&str, u64)], vocab_size: usize) -> Vec<Pair> {
        let mut words: Vec<(Vec<u32>, u64)> =
            words.iter().map(|(word, count)| (word.bytes().map(u32::from).collect(), *count)).collect();
        let mut merges = Vec::new();
        while merges.len() + 256 < vocab_size {
            let mut counts: HashMap<Pair, u64> = HashMap::new();
            for (tokens, count) in &words {
                tokens.windows(2).for_each(|pair| *counts.entry((pair[0], pair[1])).or_default() += count);
            }
            let best = match counts.into_iter().max_by_key(|&(pair, count)| (count, Reverse(pair))) {
                Some((pair, _)) => pair,
                None => break,
            };
            let new = 256 + merges.len() as u32;
            for (tokens, _) in &mut words {
                let mut i = 0;
                while i + 1 < tokens.len() {
                    if (tokens[i], tokens[i + 1]) == best {
                        tokens.splice(i..i + 2, [new]);
                    }
                    i += 1;
                }
            }
            merges.push(best);
        }
        merges
    }

    #[test]
    fn merges_in_the_order_of_the_definition() {
        assert_eq!(merges(&[("abab", 3), ("xy", 3)], 300), vec![(97, 98), (120, 121), (256, 256)]);
        assert_eq!(merges(&[("aaaaa", 1)], 300), vec![(97, 97), (256, 97), (256, 257)]);
        assert_eq!(merges(&[("a", 9)], 300), vec![]);
        assert_eq!(merges(&[], 300), vec![]);
        assert_eq!(merges(&[("ab", 9)], 256), vec![]);
    }

    #[test]
    fn agrees_with_recounting_everything() {
        let mut state = 7u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for round in 0..400 {
            let letters = 1 + random(5);
            let words: Vec<(String, u64)> = (0..random(30))
                .map(|_| {
                    let length = 1 + random(if round % 7 == 0 { 60 } else { 12 });
                    ((0..length).map(|_| (b'a' + random(letters) as u8) as char).collect(), 1 + random(40))
                })
                .collect();
            let words: Vec<(&str, u64)> = words.iter().map(|(word, count)| (word.as_str(), *count)).collect();
            assert_eq!(merges(&words, 400), merges_slowly(&words, 400), "{words:?}");
        }
    }

    #[test]
    fn counts_beyond_32_bits() {
        let billion = 5_000_000_000;
        assert_eq!(merges(&[("ab", billion), ("cd", billion + 1), ("abe", 2)], 258), vec![(97, 98), (99, 100)]);
    }

    #[test]
    fn stops_when_told() {
        let words: Vec<String> = (0..2000).map(|i| format!("{i}x{}", i * 7919)).collect();
        let words: Vec<(&str, u64)> = words.iter().map(|word| (word.as_str(), 1)).collect();
        assert!(train(pieces(&words), 5000, &mut |_| false).is_err());
    }
}
