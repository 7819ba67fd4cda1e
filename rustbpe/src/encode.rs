//! Encoding text with a vocabulary, and decoding.
//!
//! A piece that is a token is that token. In any other piece, of all neighbouring tokens that make a token together,
//! the pair with the lowest id merges first, the leftmost of equals, until no pair is left. (The same rule as
//! tiktoken's; like there, the halves need not be the ones that training merged.)

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashSet};
use std::sync::{Arc, Mutex};

use crate::documents::{num_threads, share_blocks, Documents};
use crate::pairs::{Pair, PairMap, NO_TOKEN};
use crate::pieces::{prefetch, PieceMap, ShortPiece, Waiting};
use crate::split::Pattern;

/// Tokens and their ids: a vocabulary without special tokens.
pub struct Vocabulary {
    /// In ascending order of id. Ids may have gaps, and two ids may have the same bytes.
    pub tokens: Vec<(Box<[u8]>, u32)>,
    /// Position in `tokens` of each id; NO_TOKEN in the gaps.
    by_id: Vec<u32>,
}

/// Larger ids are refused: tables are indexed by id.
const MAX_ID: u32 = (1 << 24) - 1;

impl Vocabulary {
    /// The 256 bytes and one token for each merge.
    pub fn from_merges(merges: &[Pair]) -> Result<Vocabulary, String> {
        let mut tokens: Vec<(Box<[u8]>, u32)> = (0..=255u8).map(|byte| ([byte].into(), byte as u32)).collect();
        for &(left, right) in merges {
            let joined = [&*tokens[left as usize].0, &*tokens[right as usize].0].concat();
            tokens.push((joined.into(), tokens.len() as u32));
        }
        Vocabulary::new(tokens)
    }

    pub fn new(mut tokens: Vec<(Box<[u8]>, u32)>) -> Result<Vocabulary, String> {
        tokens.sort_by_key(|token| token.1);
        if let Some(token) = tokens.iter().find(|token| token.1 > MAX_ID) {
            return Err(format!("token id {} is too large: the highest is {MAX_ID}", token.1));
        }
        if let Some(twice) = tokens.windows(2).find(|two| two[0].1 == two[1].1) {
            return Err(format!("token id {} is given twice", twice[0].1));
        }
        if let Some(token) = tokens.iter().find(|token| token.0.is_empty()) {
            return Err(format!("token {} is empty", token.1));
        }
        let single: HashSet<u8> = tokens.iter().filter(|token| token.0.len() == 1).map(|token| token.0[0]).collect();
        if let Some(byte) = (0..=255).find(|byte| !single.contains(byte)) {
            return Err(format!("byte 0x{byte:02x} has no token: all 256 single bytes are needed to encode any text"));
        }
        let mut by_id = vec![NO_TOKEN; tokens.last().map_or(0, |token| token.1 as usize + 1)];
        for (i, token) in tokens.iter().enumerate() {
            by_id[token.1 as usize] = i as u32;
        }
        Ok(Vocabulary { tokens, by_id })
    }

    /// The highest id and one.
    pub fn num_ids(&self) -> usize {
        self.by_id.len()
    }

    /// The bytes of a token.
    pub fn bytes_of(&self, id: u32) -> Option<&[u8]> {
        let position = *self.by_id.get(id as usize)?;
        self.tokens.get(position as usize).map(|token| &*token.0)
    }

    /// Appends the bytes of `ids`.
    pub fn decode(&self, ids: &[u32], out: &mut Vec<u8>) -> Result<(), String> {
        for (position, &id) in ids.iter().enumerate() {
            match self.bytes_of(id) {
                Some(bytes) => out.extend_from_slice(bytes),
                None => {
                    return Err(format!(
                        "id {id} at position {position} is not in the vocabulary of {} tokens",
                        self.tokens.len()
                    ))
                }
            }
        }
        Ok(())
    }
}

/// A vocabulary made ready for encoding, shared by all threads.
pub struct Encoder {
    pattern: Pattern,
    /// Id of each token's bytes, plus one: 0 is PieceMap's value for what is not there.
    ids: PieceMap<u32>,
    byte_ids: [u32; 256],
    /// Of any two tokens that make a token together, that token.
    merges: PairMap,
    /// Caches that no thread is using.
    caches: Mutex<Vec<Cache>>,
}

/// Ids of one block of documents, and how many belong to each document.
pub struct EncodedBlock<T> {
    pub ids: Vec<T>,
    pub lengths: Vec<usize>,
}

/// An id as it is written: `u16` or `u32`.
pub trait Id: Copy + Send + Default {
    fn from_u32(id: u32) -> Self;
}

impl Id for u16 {
    #[inline(always)]
    fn from_u32(id: u32) -> u16 {
        id as u16
    }
}

impl Id for u32 {
    #[inline(always)]
    fn from_u32(id: u32) -> u32 {
        id
    }
}

impl Encoder {
    pub fn new(pattern: Pattern, vocabulary: &Vocabulary) -> Encoder {
        let mut ids = PieceMap::default();
        let mut byte_ids = [0; 256];
        for (bytes, id) in &vocabulary.tokens {
            *ids.entry(bytes, 0, bytes.len()) = *id; // of equal bytes the highest id stays
            if bytes.len() == 1 {
                byte_ids[bytes[0] as usize] = *id;
            }
        }
        let mut lengths: Vec<usize> = vocabulary.tokens.iter().map(|token| token.0.len()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut merges = PairMap::default();
        for (bytes, _) in &vocabulary.tokens {
            for &cut in lengths.iter().take_while(|&&cut| cut < bytes.len()) {
                if let (Some(left), Some(right)) = (ids.get(&bytes[..cut]), ids.get(&bytes[cut..])) {
                    merges.insert((left, right), ids.get(bytes).unwrap_or(NO_TOKEN));
                }
            }
        }
        Encoder { pattern, ids, byte_ids, merges, caches: Mutex::default() }
    }

    /// Encodes documents on several threads (0: one for each processor). The blocks are in the documents' order.
    pub fn encode<T: Id>(&self, documents: &Documents, threads: usize) -> Result<Vec<EncodedBlock<T>>, String> {
        let blocks = documents.blocks();
        let threads = num_threads(threads).min(blocks.len().max(1));
        let mut workers: Vec<_> = (0..threads).map(|_| (self.borrow_cache(), Vec::new())).collect();
        let work = |(cache, done): &mut (Cache, Vec<_>), block: usize| {
            let result = self.encode_block::<T>(documents, blocks[block].clone(), cache);
            let fine = result.is_ok();
            done.push((block, result));
            fine
        };
        share_blocks(blocks.len(), &mut workers, work, &mut |_| true);
        let (caches, done): (Vec<_>, Vec<_>) = workers.into_iter().unzip();
        self.caches.lock().unwrap_or_else(|e| e.into_inner()).extend(caches);
        let mut done: Vec<_> = done.into_iter().flatten().collect();
        done.sort_by_key(|(block, _)| *block);
        done.into_iter().map(|(_, result)| result).collect()
    }

    fn borrow_cache(&self) -> Cache {
        self.caches.lock().unwrap_or_else(|e| e.into_inner()).pop().unwrap_or_default()
    }

    fn encode_block<T: Id>(
        &self,
        documents: &Documents,
        range: std::ops::Range<usize>,
        cache: &mut Cache,
    ) -> Result<EncodedBlock<T>, String> {
        let mut ids = Vec::with_capacity(documents.num_bytes(range.clone()) / 3 + 16);
        let mut lengths = Vec::with_capacity(range.len());
        let mut waiting = Waiting::default();
        for i in range {
            let text = documents.get(i)?;
            let bytes = text.as_bytes();
            let before = ids.len();
            self.pattern.for_each_piece(text, |start, end| match ShortPiece::new(bytes, start, end) {
                Some(piece) => {
                    let hash = piece.hash();
                    prefetch(cache.entry(hash));
                    if waiting.push(piece, hash) {
                        self.encode_short(&mut waiting, cache, &mut ids);
                    }
                }
                None => {
                    self.encode_short(&mut waiting, cache, &mut ids);
                    self.encode_long(&bytes[start..end], cache, &mut ids);
                }
            });
            self.encode_short(&mut waiting, cache, &mut ids);
            lengths.push(ids.len() - before);
        }
        Ok(EncodedBlock { ids, lengths })
    }

    /// Appends the ids of the pieces that wait.
    #[inline(always)]
    fn encode_short<T: Id>(&self, waiting: &mut Waiting, cache: &mut Cache, out: &mut Vec<T>) {
        for &(piece, hash) in waiting.take() {
            let entry = cache.entry(hash);
            if entry.piece != piece {
                self.fill(piece, hash, cache, out);
            } else if entry.num_ids == 1 {
                out.push(T::from_u32(entry.ids[0]));
            } else {
                out.extend(entry.ids[..entry.num_ids as usize].iter().map(|&id| T::from_u32(id)));
            }
        }
    }

    /// A short piece that the cache does not know: finds its ids and keeps them if they are few.
    #[cold]
    fn fill<T: Id>(&self, piece: ShortPiece, hash: u64, cache: &mut Cache, out: &mut Vec<T>) {
        let mut entry = Entry { piece, ..Entry::default() };
        if let Some(id) = self.ids.get_short(piece, hash) {
            entry.ids[0] = id;
            entry.num_ids = 1;
            out.push(T::from_u32(id));
        } else {
            let (bytes, length) = piece.bytes();
            let parts = self.merge_few(&bytes[..length], &mut cache.parts);
            out.extend(parts.iter().map(|part| T::from_u32(part.0)));
            if parts.len() > entry.ids.len() {
                return;
            }
            entry.num_ids = parts.len() as u32;
            parts.iter().zip(&mut entry.ids).for_each(|(part, id)| *id = part.0);
        }
        *cache.entry_mut(hash) = entry;
    }

    #[cold]
    fn encode_long<T: Id>(&self, piece: &[u8], cache: &mut Cache, out: &mut Vec<T>) {
        if let Some(id) = self.ids.get(piece) {
            out.push(T::from_u32(id));
        } else if piece.len() <= 64 {
            out.extend(self.merge_few(piece, &mut cache.parts).iter().map(|part| T::from_u32(part.0)));
        } else {
            self.merge_many(piece, |id| out.push(T::from_u32(id)));
        }
    }

    fn merged(&self, left: u32, right: u32) -> u32 {
        self.merges.get((left, right)).unwrap_or(NO_TOKEN)
    }

    /// Merges by looking for the lowest pair again and again: fastest for few bytes. `parts` holds each token and what
    /// it makes with the next one; the result lies there.
    fn merge_few<'a>(&self, piece: &[u8], parts: &'a mut Vec<Pair>) -> &'a [Pair] {
        parts.clear();
        parts.extend(piece.iter().map(|&byte| (self.byte_ids[byte as usize], NO_TOKEN)));
        for i in 1..parts.len() {
            parts[i - 1].1 = self.merged(parts[i - 1].0, parts[i].0);
        }
        loop {
            // The first of the smallest.
            let (mut best, mut at) = (NO_TOKEN, 0);
            for (i, part) in parts.iter().enumerate() {
                if part.1 < best {
                    (best, at) = (part.1, i);
                }
            }
            if best == NO_TOKEN {
                return parts;
            }
            parts.remove(at + 1);
            let after = parts.get(at + 1).map_or(NO_TOKEN, |next| self.merged(best, next.0));
            parts[at] = (best, after);
            if at > 0 {
                parts[at - 1].1 = self.merged(parts[at - 1].0, best);
            }
        }
    }

    /// Merges with lists of places for each id that can be made, so that the time stays near linear in the length.
    fn merge_many(&self, piece: &[u8], each: impl FnMut(u32)) {
        let mut chain = Chain::new(piece.iter().map(|&byte| self.byte_ids[byte as usize]).collect());
        // Places where the token `id` could be made of two.
        let mut places_of: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for i in 1..chain.tokens.len() {
            let id = self.merged(chain.tokens[i - 1], chain.tokens[i]);
            if id != NO_TOKEN {
                places_of.entry(id).or_default().push(i as u32 - 1);
            }
        }
        // A merge may make room for one with a lower id, which then comes first. It lies at the place of the merge or
        // before it, and so before all places that are still in the list, if it has the same id as these.
        let mut urgent: BinaryHeap<Reverse<Pair>> = BinaryHeap::new();
        while let Some(&lowest) = places_of.keys().next() {
            let mut places = places_of.remove(&lowest).unwrap_or_default();
            places.sort_unstable(); // in order already, or nearly
            for place in places {
                urgent.push(Reverse((lowest, place)));
                while let Some(Reverse((id, place))) = urgent.pop() {
                    let next = chain.next[place as usize];
                    let (left, right) = (chain.token(place), chain.token(next));
                    if left == NO_TOKEN || right == NO_TOKEN || self.merged(left, right) != id {
                        continue; // one of the two has merged with another since
                    }
                    chain.merge(place, next, id);
                    let before = chain.before[place as usize];
                    for (first, second) in [(before, place), (place, chain.next[place as usize])] {
                        match self.merged(chain.token(first), chain.token(second)) {
                            NO_TOKEN => {}
                            made if made <= lowest => urgent.push(Reverse((made, first))),
                            made => places_of.entry(made).or_default().push(first),
                        }
                    }
                }
            }
        }
        chain.tokens.into_iter().filter(|&id| id != NO_TOKEN).for_each(each);
    }
}

/// Tokens of a long piece, linked both ways; one that was merged into the one before it becomes NO_TOKEN.
struct Chain {
    tokens: Vec<u32>,
    next: Vec<u32>,
    before: Vec<u32>,
}

impl Chain {
    const NONE: u32 = u32::MAX;

    fn new(tokens: Vec<u32>) -> Chain {
        let length = u32::try_from(tokens.len()).expect("a piece of text has fewer than 2^32 bytes");
        let next = (1..length).chain([Chain::NONE]).collect();
        let before = [Chain::NONE].into_iter().chain(0..length - 1).collect();
        Chain { tokens, next, before }
    }

    /// The token at a place, or NO_TOKEN beyond the ends.
    fn token(&self, place: u32) -> u32 {
        self.tokens.get(place as usize).copied().unwrap_or(NO_TOKEN)
    }

    /// Puts `id` in the place of the two tokens at `place` and `next`.
    fn merge(&mut self, place: u32, next: u32, id: u32) {
        self.tokens[place as usize] = id;
        self.tokens[next as usize] = NO_TOKEN;
        let after = self.next[next as usize];
        self.next[place as usize] = after;
        if after != Chain::NONE {
            self.before[after as usize] = place;
        }
    }
}

/// The ids of one short piece.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct Entry {
    piece: ShortPiece,
    ids: [u32; 3],
    num_ids: u32,
}

/// Pieces that one thread has encoded lately. A new piece takes the place of the one that was there.
struct Cache {
    entries: Vec<Entry>,
    /// Working space.
    parts: Vec<Pair>,
}

impl Default for Cache {
    fn default() -> Self {
        Cache { entries: vec![Entry::default(); Cache::SIZE], parts: Vec::new() }
    }
}

impl Cache {
    const SIZE: usize = 1 << 17;

    #[inline(always)]
    fn entry(&self, hash: u64) -> &Entry {
        &self.entries[hash as usize % Cache::SIZE]
    }

    fn entry_mut(&mut self, hash: u64) -> &mut Entry {
        &mut self.entries[hash as usize % Cache::SIZE]
    }
}

/// An encoder that is built when it is first needed: training alone does not pay for it.
pub struct Tokenizer {
    pub pattern: Pattern,
    pub vocabulary: Vocabulary,
    encoder: Mutex<Option<Arc<Encoder>>>,
}

impl Tokenizer {
    pub fn new(pattern: Pattern, vocabulary: Vocabulary) -> Tokenizer {
        Tokenizer { pattern, vocabulary, encoder: Mutex::new(None) }
    }

    pub fn encoder(&self) -> Arc<Encoder> {
        let mut encoder = self.encoder.lock().unwrap_or_else(|e| e.into_inner());
        encoder.get_or_insert_with(|| Arc::new(Encoder::new(self.pattern, &self.vocabulary))).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::documents::Offsets;
    use crate::split::GPT4_DIGITS3;

    fn vocabulary(extra: &[&str]) -> Vocabulary {
        let bytes = (0..=255u8).map(|byte| ([byte].into(), byte as u32));
        let more = extra.iter().enumerate().map(|(i, token)| (token.as_bytes().into(), 256 + i as u32));
        Vocabulary::new(bytes.chain(more).collect()).unwrap()
    }

    fn encoder(vocabulary: &Vocabulary) -> Encoder {
        Encoder::new(Pattern::parse(GPT4_DIGITS3).unwrap(), vocabulary)
    }

    fn encode(encoder: &Encoder, text: &str) -> Vec<u32> {
        let offsets = [0, text.len() as i64];
        let documents = Documents::new(text.as_bytes(), Offsets::Wide(&offsets), None).unwrap();
        let blocks = encoder.encode::<u32>(&documents, 1).unwrap();
        blocks.into_iter().flat_map(|block| block.ids).collect()
    }

    /// Lowest id first, by trying all neighbours each time.
    fn encode_slowly(vocabulary: &Vocabulary, piece: &[u8]) -> Vec<u32> {
        let id_of = |bytes: &[u8]| vocabulary.tokens.iter().rev().find(|token| *token.0 == *bytes).map(|token| token.1);
        if let Some(id) = id_of(piece) {
            return vec![id];
        }
        let mut parts: Vec<Vec<u8>> = piece.iter().map(|&byte| vec![byte]).collect();
        loop {
            let joined = parts.windows(2).enumerate().filter_map(|(i, two)| id_of(&two.concat()).map(|id| (id, i)));
            match joined.min() {
                Some((_, i)) => {
                    let right = parts.remove(i + 1);
                    parts[i].extend(right);
                }
                None => return parts.iter().map(|part| id_of(part).unwrap()).collect(),
            }
        }
    }

    #[test]
    fn merges_the_lowest_id_first() {
        let vocabulary = vocabulary(&["bc", "ab", "abc", "aa", "aaaa", "abcabc"]);
        let encoder = encoder(&vocabulary);
        assert_eq!(encode(&encoder, "abc"), [258]);
        assert_eq!(encode(&encoder, "abcd"), [258, 100]);
        assert_eq!(encode(&encoder, "aaaaaaa"), [260, 259, 97]);
        assert_eq!(encode(&encoder, " abcabc"), [32, 261]);
        assert_eq!(encode(&encoder, ""), [0; 0]);
    }

    #[test]
    fn short_and_long_merging_agree_with_the_slow_way() {
        let vocabulary =
            vocabulary(&["ab", "aa", "ba", "bab", "aab", "abab", "aaaa", "abba", "bb", "bbb", "aabbaa", "baa"]);
        let encoder = encoder(&vocabulary);
        let mut state = 3u64;
        for length in (1..150).chain(1..150) {
            let piece: String = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    if state >> 40 & 1 == 0 {
                        'a'
                    } else {
                        'b'
                    }
                })
                .collect();
            let expected = encode_slowly(&vocabulary, piece.as_bytes());
            assert_eq!(encode(&encoder, &piece), expected, "{piece}");
            assert_eq!(encode(&encoder, &piece), expected, "{piece} from the cache");
            if expected.len() > 1 {
                let mut long = Vec::new();
                encoder.merge_many(piece.as_bytes(), |id| long.push(id));
                assert_eq!(long, expected, "{piece}");
            }
        }
    }

    #[test]
    fn lower_ids_that_appear_late_come_first() {
        // "abc" has a lower id than the "ab" that it is made of.
        let vocabulary = vocabulary(&["cab", "abc", "bcab", "ab", "bc", "aab"]);
        let encoder = encoder(&vocabulary);
        for round in 0..3000u32 {
            let letter = |i: u32| b"abc"[(round.wrapping_mul(2654435761) >> (i % 29)) as usize % 3];
            let piece: Vec<u8> = (0..round % 40 + 2).map(letter).collect();
            let expected = encode_slowly(&vocabulary, &piece);
            if expected.len() > 1 {
                let mut long = Vec::new();
                encoder.merge_many(&piece, |id| long.push(id));
                assert_eq!(long, expected, "{piece:?}");
                assert_eq!(encode(&encoder, std::str::from_utf8(&piece).unwrap()), expected, "{piece:?}");
            }
        }
    }

    #[test]
    fn very_long_pieces_do_not_take_quadratic_time() {
        let merges: Vec<Pair> = std::iter::once((97, 97)).chain((256..270).map(|id| (id, id))).collect();
        let vocabulary = Vocabulary::from_merges(&merges).unwrap();
        let ids = encode(&encoder(&vocabulary), &"a".repeat(300_000));
        assert_eq!(ids.iter().map(|&id| vocabulary.bytes_of(id).unwrap().len()).sum::<usize>(), 300_000);
    }

    #[test]
    fn any_number_of_threads_gives_the_same_ids() {
        let vocabulary = vocabulary(&["th", "the", " the", "er", " th"]);
        let encoder = encoder(&vocabulary);
        let text = "the other theatre, 123 there! ".repeat(100_000);
        let ends: Vec<i64> = (0..=text.len() as i64 / 1000).map(|i| i * 1000).collect();
        let documents = Documents::new(text.as_bytes(), Offsets::Wide(&ends), None).unwrap();
        let run = |threads| {
            let blocks = encoder.encode::<u16>(&documents, threads).unwrap();
            let lengths: Vec<usize> = blocks.iter().flat_map(|block| block.lengths.clone()).collect();
            (blocks.into_iter().flat_map(|block| block.ids).collect::<Vec<u16>>(), lengths)
        };
        let one = run(1);
        assert_eq!(one.1.len(), documents.len());
        assert!(one == run(2) && one == run(8));
    }

    #[test]
    fn broken_vocabularies_are_refused() {
        let bytes = || (0..=255u8).map(|byte| -> (Box<[u8]>, u32) { ([byte].into(), byte as u32) });
        let error = |tokens: Vec<(Box<[u8]>, u32)>| Vocabulary::new(tokens).err().unwrap();
        assert!(error(bytes().skip(1).collect()).contains("0x00"));
        assert!(error(bytes().chain([(b"ab".as_slice().into(), 7)]).collect()).contains("id 7 is given twice"));
        assert!(error(bytes().chain([(b"".as_slice().into(), 256)]).collect()).contains("256 is empty"));
        assert!(error(bytes().chain([(b"ab".as_slice().into(), u32::MAX)]).collect()).contains("too large"));
    }

    #[test]
    fn decodes_and_names_what_it_cannot() {
        let vocabulary = vocabulary(&["ab"]);
        let mut out = Vec::new();
        vocabulary.decode(&[256, 99], &mut out).unwrap();
        assert_eq!(out, b"abc");
        assert!(vocabulary.decode(&[1, 257], &mut out).unwrap_err().contains("id 257 at position 1"));
    }
}
