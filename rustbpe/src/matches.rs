//! The longest earlier matches of tokens in a text, and what followed them: `nanochat/ops/recall.py` says what it is and
//! has the same with numpy.
//!
//! The text's positions are in the order of what stands before them, read backwards ([`Key`]), so that the longest
//! matches of a context are its neighbours there. What takes time is waiting for memory, at other places for every
//! token: so [`Text::places`] searches for several contexts at a time.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::os::raw::c_int;

use crate::abi::{guarded, view, view_mut};

/// Counts the functions below and their arguments: `matches.py` refuses a library with another number.
const VERSION: c_int = 3;

/// Tokens of a match: more are not told apart, fewer do not count.
pub const LONGEST: usize = 8;
pub const SHORTEST: usize = 2;
/// Matches that are taken, at most.
pub const FOLLOWERS: usize = 64;
/// How far to look in either direction.
const NEIGHBOURS: i64 = 96;
/// Tokens before a match, and of the context, that are compared for their subject.
pub const WINDOW: usize = 128;
/// How alike two subjects are: levels, and the weight of the tokens in common for each.
pub const LEVELS: usize = 12;
const LEVEL: i32 = 8;
/// Kinds of a match: by its length and its level.
pub const KINDS: i32 = ((LONGEST + 1) * LEVELS) as i32;
/// Contexts that are searched for together.
const TOGETHER: usize = 16;

/// The last tokens of a context, the last one first; -1 where there is none.
pub type Key = [i32; LONGEST];

/// What followed each match, the longest first: token · KINDS + length · LEVELS + level; 0 where there is none.
pub type Found = [i32; FOLLOWERS];

/// The key of a context, whose last token is its last.
pub fn key_of(context: &[i32]) -> Key {
    let mut key = [-1; LONGEST];
    key.iter_mut().zip(context.iter().rev()).for_each(|(key, token)| *key = *token);
    key
}

/// The last tokens of a context, to be compared with those before a match.
#[derive(Default)]
struct Subject {
    last: VecDeque<i32>,
    /// By token: how often it is among them, its weight if it is, and the comparison that has seen it last.
    times: Vec<u16>,
    weight: Vec<i32>,
    seen: Vec<u32>,
    now: u32,
}

thread_local! {
    /// Without tokens between two uses; a new one after an error.
    static SUBJECT: RefCell<Subject> = RefCell::default();
}

impl Subject {
    fn with<T>(text: &Text, run: impl FnOnce(&mut Subject) -> Result<T, String>) -> Result<T, String> {
        SUBJECT.with(|kept| {
            let mut subject = kept.take();
            if subject.times.len() < text.weights.len() {
                subject.times.resize(text.weights.len(), 0);
                subject.weight.resize(text.weights.len(), 0);
                subject.seen.resize(text.weights.len(), 0);
            }
            let result = run(&mut subject)?;
            subject.clear();
            kept.replace(subject);
            Ok(result)
        })
    }

    fn clear(&mut self) {
        while self.forget_first() {}
    }

    /// The context's next token.
    fn read(&mut self, token: i32, text: &Text) {
        if token == text.tokens[0] {
            self.clear(); // a document begins
        }
        if self.last.len() == WINDOW {
            self.forget_first();
        }
        self.last.push_back(token);
        if let Some(&weight) = text.weights.get(token as usize) {
            self.times[token as usize] += 1;
            self.weight[token as usize] = weight;
        }
    }

    fn forget_first(&mut self) -> bool {
        let Some(token) = self.last.pop_front() else { return false };
        if let Some(times) = self.times.get_mut(token as usize).filter(|times| **times > 0) {
            *times -= 1;
            if *times == 0 {
                self.weight[token as usize] = 0;
            }
        }
        true
    }

    /// How much the tokens before a match, back to where its document begins, have in common with these: each counts once.
    #[inline(always)]
    fn level(&mut self, before: &[i32], begin: i32) -> i32 {
        if self.now == u32::MAX {
            self.seen.fill(0);
            self.now = 0;
        }
        self.now += 1;
        let mut sum = 0i32;
        for &token in before.iter().rev() {
            if token == begin {
                break;
            }
            let weight = self.weight.get(token as usize).copied().unwrap_or(0);
            if weight > 0 && self.seen[token as usize] != self.now {
                self.seen[token as usize] = self.now;
                sum = sum.saturating_add(weight);
            }
        }
        (sum / LEVEL).min(LEVELS as i32 - 1)
    }
}

/// A text, the positions that a token follows in the order of their keys, and the weight of each token of the vocabulary.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    tokens: &'a [i32],
    order: &'a [i32],
    weights: &'a [i32],
}

impl<'a> Text<'a> {
    /// # Errors
    /// Sizes that do not belong together. What the order holds is looked at when it is used.
    pub fn new(tokens: &'a [i32], order: &'a [i32], weights: &'a [i32]) -> Result<Text<'a>, String> {
        if tokens.len() < 2 || order.len() != tokens.len() - 1 || tokens.len() > i32::MAX as usize {
            return Err(format!("a text of {} tokens has no order of {} positions", tokens.len(), order.len()));
        }
        Ok(Text { tokens, order, weights })
    }

    /// What followed the longest matches of one context.
    pub fn find(&self, context: &[i32]) -> Result<Found, String> {
        let mut places = [0];
        let keys = [self.key(context)];
        self.places(&keys, &mut places)?;
        Subject::with(self, |subject| {
            context[context.len().saturating_sub(WINDOW)..].iter().for_each(|&token| subject.read(token, self));
            self.beside(&keys[0], places[0], 0..0, subject)
        })
    }

    /// What followed the longest matches of each of some tokens and those before it; the first ones, as many as `out` has
    /// fewer, are context only.
    ///
    /// Document i is `tokens[bounds[i]..bounds[i + 1]]`. `own` is the inverse of the order, and where each document
    /// stands in the text, in which it is not found then; negative: nowhere.
    ///
    /// # Errors
    /// Arrays that do not belong together, or an order that is none.
    pub fn find_documents(
        &self,
        tokens: &[i32],
        bounds: &[i32],
        own: Option<(&[i32], &[i32])>,
        mut out: &mut [Found],
    ) -> Result<(), String> {
        let fits =
            |(rank, begins): (&[i32], &[i32])| rank.len() == self.order.len() && begins.len() + 1 == bounds.len();
        if out.len() > tokens.len() || !own.map_or(true, fits) {
            return Err("the rank, the beginnings or the result have another size".into());
        }
        let ends_meet = bounds.first() == Some(&0) && bounds.last().map(|&end| end as usize) == Some(tokens.len());
        if !ends_meet || bounds.windows(2).any(|pair| pair[0] > pair[1]) {
            return Err(format!("the bounds do not ascend from 0 to the {} tokens", tokens.len()));
        }
        let mut skip = tokens.len() - out.len();
        for (i, pair) in bounds.windows(2).enumerate() {
            let document = &tokens[pair[0] as usize..pair[1] as usize];
            let known = own.and_then(|(rank, begins)| Some((usize::try_from(begins[i]).ok()?, rank)));
            if known.map_or(false, |(begin, _)| begin + document.len() > self.tokens.len()) {
                return Err("a document does not end in the text".into());
            }
            let skipped = skip.min(document.len());
            skip -= skipped;
            let (now, later) = std::mem::take(&mut out).split_at_mut(document.len() - skipped);
            out = later;
            Subject::with(self, |subject| {
                document[..skipped].iter().for_each(|&token| subject.read(token, self));
                self.find_document(document, skipped, known, now, subject)
            })?;
        }
        Ok(())
    }

    fn find_document(
        &self,
        document: &[i32],
        skipped: usize,
        known: Option<(usize, &[i32])>,
        out: &mut [Found],
        subject: &mut Subject,
    ) -> Result<(), String> {
        let own = known.map_or(0..0, |(begin, _)| begin..begin + document.len());
        for (group, out) in out.chunks_mut(TOGETHER).enumerate() {
            let first = skipped + group * TOGETHER;
            let mut keys = [[-1; LONGEST]; TOGETHER];
            for (i, key) in keys[..out.len()].iter_mut().enumerate() {
                let end = first + i + 1;
                *key = self.key(&document[end.saturating_sub(LONGEST)..end]);
            }
            let keys = &keys[..out.len()];
            let mut places = [-1; TOGETHER];
            let places = &mut places[..out.len()];
            if let Some((begin, rank)) = known {
                // The text's last position has no rank.
                for (i, place) in places.iter_mut().enumerate() {
                    *place = rank.get(begin + first + i).map_or(-1, |&rank| i64::from(rank));
                }
            }
            if places.iter().any(|&place| place < 0) {
                let mut searched = [0; TOGETHER];
                self.places(keys, &mut searched[..out.len()])?;
                places.iter_mut().zip(searched).filter(|(place, _)| **place < 0).for_each(|(place, s)| *place = s);
            }
            for (i, out) in out.iter_mut().enumerate() {
                subject.read(document[first + i], self);
                *out = self.beside(&keys[i], places[i], own.clone(), subject)?;
            }
        }
        Ok(())
    }

    /// The key of a context, which begins where a document does.
    fn key(&self, context: &[i32]) -> Key {
        let mut key = key_of(context);
        if let Some(opens) = key.iter().position(|&token| token == self.tokens[0]) {
            key[opens + 1..].fill(-1);
        }
        key
    }

    /// The position at a place of the order; a token follows it.
    #[inline(always)]
    fn position(&self, place: usize) -> Result<usize, String> {
        let position = self.order[place] as usize; // a negative one becomes large
        if position < self.order.len() {
            Ok(position)
        } else {
            Err("the order has a position that is not in the text".into())
        }
    }

    /// Whether the key of a position comes before another one.
    #[inline(always)]
    fn is_before(&self, position: usize, key: &Key) -> bool {
        for (distance, &wanted) in key.iter().enumerate() {
            let token = if distance <= position { self.tokens[position - distance] } else { -1 };
            if token != wanted {
                return token < wanted;
            }
        }
        false
    }

    /// How many positions of the text have smaller keys than each of a few.
    fn places(&self, keys: &[Key], places: &mut [i64]) -> Result<(), String> {
        let mut low = [0usize; TOGETHER];
        let mut high = [self.order.len(); TOGETHER];
        let mut positions = [0usize; TOGETHER];
        let mut last = [0i32; TOGETHER];
        let many = keys.len();
        while (0..many).any(|i| low[i] < high[i]) {
            // The loads of all first, with no branch that depends on them: so the processor waits for them together.
            for i in 0..many {
                positions[i] = self.order[((low[i] + high[i]) / 2).min(self.order.len() - 1)] as usize;
            }
            if positions[..many].iter().any(|&position| position >= self.order.len()) {
                return Err("the order has a position that is not in the text".into());
            }
            for i in 0..many {
                last[i] = self.tokens[positions[i]];
            }
            for (i, key) in keys.iter().enumerate() {
                let middle = (low[i] + high[i]) / 2;
                if low[i] >= high[i] {
                    continue;
                }
                if last[i] < key[0] || (last[i] == key[0] && self.is_before(positions[i], key)) {
                    low[i] = middle + 1;
                } else {
                    high[i] = middle;
                }
            }
        }
        places.iter_mut().zip(low).for_each(|(place, low)| *place = low as i64);
        Ok(())
    }

    /// How many of a key's last tokens stand at a position.
    #[inline(always)]
    fn common(&self, position: usize, key: &Key) -> usize {
        let before = &self.tokens[position.saturating_sub(LONGEST - 1)..=position];
        before.iter().rev().zip(key).take_while(|(token, wanted)| token == wanted && **wanted >= 0).count()
    }

    /// What followed the longest matches of a key beside its place, but for positions of `own`. They become shorter from
    /// there on, in both directions; of equally long ones the nearer comes first, then the one above.
    #[inline(always)]
    fn beside(&self, key: &Key, place: i64, own: Range<usize>, subject: &mut Subject) -> Result<Found, String> {
        let mut found = [0; FOLLOWERS];
        let mut steps = [0; 2];
        let next = |side: usize, steps: &mut [i64; 2]| -> Result<(usize, usize), String> {
            while steps[side] < NEIGHBOURS {
                let beside = if side == 0 { place + steps[0] } else { place - 1 - steps[1] };
                if beside < 0 || beside >= self.order.len() as i64 {
                    break;
                }
                steps[side] += 1;
                let position = self.position(beside as usize)?;
                if !own.contains(&position) {
                    return Ok((position, self.common(position, key)));
                }
            }
            Ok((0, 0)) // no more
        };
        let mut open = [next(0, &mut steps)?, next(1, &mut steps)?]; // positions, and how long they match
        for out in &mut found {
            let side = usize::from(open[1].1 > open[0].1 || (open[1].1 == open[0].1 && steps[1] < steps[0]));
            let (position, length) = open[side];
            if length < SHORTEST {
                break;
            }
            let start = position + 1 - length; // of the match, before which its subject is
            let before = if self.tokens[start] == self.tokens[0] { start } else { start.saturating_sub(WINDOW) };
            let level = subject.level(&self.tokens[before..start], self.tokens[0]);
            let kind = length as i32 * LEVELS as i32 + level;
            *out = self.tokens[position + 1].wrapping_mul(KINDS) + kind;
            open[side] = next(side, &mut steps)?;
        }
        Ok(found)
    }
}

#[no_mangle]
pub extern "C" fn rustbpe_matches_version() -> c_int {
    VERSION
}

/// Writes what `Text::find_documents` finds, (tokens, FOLLOWERS) numbers. `rank` is null where documents are found in
/// themselves, too.
///
/// # Safety
/// The buffers are valid for their lengths, `out` for writing; nobody writes to them meanwhile.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_matches_find(
    text: *const i32,
    text_len: usize,
    order: *const i32,
    order_len: usize,
    weights: *const i32,
    num_weights: usize,
    tokens: *const i32,
    num_tokens: usize,
    bounds: *const i32,
    num_bounds: usize,
    rank: *const i32,
    rank_len: usize,
    begins: *const i32,
    num_begins: usize,
    out: *mut i32,
    out_len: usize,
) -> c_int {
    guarded(|| {
        // SAFETY: as the caller promises.
        let (text, tokens, bounds, own, out) = unsafe {
            (
                Text::new(view(text, text_len)?, view(order, order_len)?, view(weights, num_weights)?)?,
                view(tokens, num_tokens)?,
                view(bounds, num_bounds)?,
                if rank.is_null() { None } else { Some((view(rank, rank_len)?, view(begins, num_begins)?)) },
                view_mut(out as *mut Found, out_len / FOLLOWERS)?,
            )
        };
        text.find_documents(tokens, bounds, own, out)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `order_of` in nanochat/ops/recall.py.
    fn order_of(tokens: &[i32]) -> Vec<i32> {
        let mut order: Vec<i32> = (0..tokens.len() as i32 - 1).collect();
        order.sort_by_key(|&position| key_of(&tokens[..=position as usize]));
        order
    }

    /// (length, token that followed, level) of each match, the longest last.
    fn unpacked(found: &Found) -> Vec<(usize, i32, usize)> {
        let kind = |packed: i32| (packed % KINDS) as usize;
        let some = found.iter().filter(|&&packed| packed != 0);
        let mut all: Vec<_> = some.map(|&p| (kind(p) / LEVELS, p / KINDS, kind(p) % LEVELS)).collect();
        assert!(all.windows(2).all(|pair| pair[0].0 >= pair[1].0));
        all.sort_unstable();
        all
    }

    #[test]
    fn the_longest_matches_come_first() {
        let tokens = [0, 1, 2, 3, 7, 0, 4, 2, 3, 8, 0, 1, 2, 3, 9];
        let order = order_of(&tokens);
        let text = Text::new(&tokens, &order, &[]).unwrap();
        let find = |context: &[i32]| unpacked(&text.find(context).unwrap());
        assert_eq!(find(&[4, 2, 3]), [(2, 7, 0), (2, 9, 0), (3, 8, 0)]);
        assert_eq!(find(&[5, 0, 1, 2, 3]), [(2, 8, 0), (4, 7, 0), (4, 9, 0)]);
        assert_eq!(text.find(&[4, 2, 3]).unwrap()[3..], [0; FOLLOWERS - 3]);
        for nowhere in [&[3][..], &[], &[9, 9], &[-1, 3]] {
            assert_eq!(find(nowhere), []);
        }
    }

    #[test]
    fn a_match_in_a_text_of_the_same_subject_has_a_higher_level() {
        // 6 and 7 say what the documents are about; the last one only repeats itself.
        let tokens = [0, 6, 7, 1, 2, 3, 0, 6, 6, 1, 2, 4, 0, 7, 6, 0, 1, 2, 5];
        let order = order_of(&tokens);
        let text = Text::new(&tokens, &order, &[0, 0, 0, 0, 0, 0, LEVEL, 2 * LEVEL]).unwrap();
        let find = |context: &[i32]| unpacked(&text.find(context).unwrap());
        assert_eq!(find(&[0, 7, 6, 5, 1, 2]), [(2, 3, 3), (2, 4, 1), (2, 5, 0)]);
        assert_eq!(find(&[7, 0, 6, 5, 1, 2]), [(2, 3, 1), (2, 4, 1), (2, 5, 0)]); // the 7 is of another document
        let mut out = [[0; FOLLOWERS]; 6];
        text.find_documents(&[0, 7, 6, 5, 1, 2], &[0, 6], None, &mut out).unwrap();
        assert_eq!(out[5], text.find(&[0, 7, 6, 5, 1, 2]).unwrap());
    }

    #[test]
    fn a_document_is_not_found_in_itself() {
        let tokens = [0, 1, 2, 3, 0, 5, 6, 0, 1, 2, 4];
        let order = order_of(&tokens);
        let mut rank = vec![0; order.len()];
        order.iter().enumerate().for_each(|(place, &position)| rank[position as usize] = place as i32);
        let text = Text::new(&tokens, &order, &[]).unwrap();
        let mut out = [[0; FOLLOWERS]; 4];
        text.find_documents(&tokens[..4], &[0, 4], Some((&rank, &[0])), &mut out).unwrap();
        let found: Vec<_> = out.iter().map(unpacked).collect();
        assert_eq!(found, [vec![], vec![(2, 2, 0)], vec![(3, 4, 0)], vec![]]);
        text.find_documents(&tokens[..4], &[0, 4], None, &mut out).unwrap();
        assert_eq!(unpacked(&out[3]), [(4, 0, 0)]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let tokens = [0, 1, 2, 1, 2];
        assert!(Text::new(&tokens, &[0; 5], &[]).is_err());
        assert!(Text::new(&tokens[..1], &[], &[]).is_err());
        let order = order_of(&tokens);
        let text = Text::new(&tokens, &order, &[]).unwrap();
        let mut out = [[0; FOLLOWERS]; 3];
        for bounds in [&[][..], &[0], &[0, 4], &[1, 3], &[0, 2, 1, 3], &[-1, 3], &[0, -3]] {
            assert!(text.find_documents(&[1, 2, 1], bounds, None, &mut out).is_err());
        }
        assert!(text.find_documents(&[1, 2, 1], &[0, 3], Some((&[0; 3], &[0])), &mut out).is_err());
        assert!(text.find_documents(&[1, 2, 1], &[0, 3], Some((&[0; 4], &[])), &mut out).is_err());
        assert!(text.find_documents(&[1, 2, 1], &[0, 3], Some((&[0; 4], &[3])), &mut out).is_err());
        // Ranks outside the order have no neighbours; a negative one is searched for.
        for rank in [i32::MAX, 4, -1, i32::MIN] {
            text.find_documents(&[1, 2, 1], &[0, 3], Some((&[rank; 4], &[0])), &mut out).unwrap();
        }
        for bad in [-1, 4, i32::MAX, i32::MIN] {
            let order = [bad; 4];
            assert!(Text::new(&tokens, &order, &[]).unwrap().find(&[1, 2]).is_err());
        }
    }
}
