//! Documents read where they lie, laid out as in an Arrow string array, and how threads share them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Where each document starts in the data, as Arrow `string` (32 bits) or `large_string` (64 bits) has it.
#[derive(Clone, Copy)]
pub enum Offsets<'a> {
    Narrow(&'a [i32]),
    Wide(&'a [i64]),
}

/// A list of documents: document `i` is `data[offsets[i]..offsets[i + 1]]`, unless its validity bit says null.
#[derive(Clone, Copy)]
pub struct Documents<'a> {
    data: &'a [u8],
    offsets: Offsets<'a>,
    /// Bit `first + i` of the bitmap, least significant bit first, is 1 if document `i` is not null.
    validity: Option<(&'a [u8], usize)>,
}

/// Text that one thread takes at a time, in bytes.
const BLOCK_BYTES: usize = 128 << 10;

impl<'a> Documents<'a> {
    /// Checks the offsets (one more than documents) and the bitmap; the text itself is checked when it is read.
    pub fn new(data: &'a [u8], offsets: Offsets<'a>, validity: Option<(&'a [u8], usize)>) -> Result<Self, String> {
        let documents = Documents { data, offsets, validity };
        let count = match offsets {
            Offsets::Narrow(all) => all.len(),
            Offsets::Wide(all) => all.len(),
        };
        if count == 0 {
            return Err("the offsets of the documents are empty".into());
        }
        let mut previous = 0;
        for i in 0..count {
            let offset = documents.offset(i);
            if offset < previous || offset > data.len() as i64 {
                return Err(format!("offset {offset} of document {i} is not within the data or below the one before"));
            }
            previous = offset;
        }
        match validity {
            Some((bitmap, first)) if bitmap.len() * 8 < first + count - 1 => {
                Err("the validity bitmap is too short".into())
            }
            _ => Ok(documents),
        }
    }

    fn offset(&self, i: usize) -> i64 {
        match self.offsets {
            Offsets::Narrow(all) => all[i] as i64,
            Offsets::Wide(all) => all[i],
        }
    }

    pub fn len(&self) -> usize {
        match self.offsets {
            Offsets::Narrow(all) => all.len() - 1,
            Offsets::Wide(all) => all.len() - 1,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of text in documents `range`.
    pub fn num_bytes(&self, range: Range<usize>) -> usize {
        (self.offset(range.end) - self.offset(range.start)) as usize
    }

    /// The text of document `i`; null is empty. An error says where the UTF-8 breaks.
    pub fn get(&self, i: usize) -> Result<&'a str, String> {
        if let Some((bitmap, first)) = self.validity {
            let bit = first + i;
            if bitmap[bit / 8] >> (bit % 8) & 1 == 0 {
                return Ok("");
            }
        }
        let bytes = &self.data[self.offset(i) as usize..self.offset(i + 1) as usize];
        std::str::from_utf8(bytes)
            .map_err(|e| format!("document {i} is not valid UTF-8: bad byte at {}", e.valid_up_to()))
    }

    /// Ranges of documents of about `BLOCK_BYTES` of text each.
    pub fn blocks(&self) -> Vec<Range<usize>> {
        let mut blocks = Vec::new();
        let mut start = 0;
        for i in 0..self.len() {
            if self.num_bytes(start..i + 1) >= BLOCK_BYTES || i + 1 == self.len() {
                blocks.push(start..i + 1);
                start = i + 1;
            }
        }
        blocks
    }
}

/// The longest beginning of `text` with at most `most` characters.
pub fn truncate(text: &str, most: u64) -> &str {
    if text.len() as u64 <= most {
        return text;
    }
    match text.char_indices().nth(most as usize) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

pub fn num_chars(text: &str) -> u64 {
    text.chars().count() as u64
}

/// Lets one thread for each of `states` work through the blocks: `work(state, block number)`. The calling thread is the
/// first of them and runs `report(blocks taken)` between its blocks; false from either stops all. Returns whether all
/// blocks were done.
pub fn share_blocks<S: Send>(
    num_blocks: usize,
    states: &mut [S],
    work: impl Fn(&mut S, usize) -> bool + Sync,
    report: &mut dyn FnMut(usize) -> bool,
) -> bool {
    let next = AtomicUsize::new(0);
    let stopped = AtomicBool::new(false);
    let run = |state: &mut S, report: &mut dyn FnMut(usize) -> bool| {
        while !stopped.load(Ordering::Relaxed) {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= num_blocks {
                break;
            }
            if !work(state, block) || !report(block + 1) {
                stopped.store(true, Ordering::Relaxed);
            }
        }
    };
    if let Some((mine, others)) = states.split_first_mut() {
        let useful = others.len().min(num_blocks.saturating_sub(1));
        std::thread::scope(|scope| {
            for state in &mut others[..useful] {
                scope.spawn(|| run(state, &mut |_| true));
            }
            run(mine, report);
        });
    }
    !stopped.into_inner()
}

/// `requested` threads, or as many as this process may run at once if that is 0.
pub fn num_threads(requested: usize) -> usize {
    match requested {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
        n => n.min(1024),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_slices_and_nulls() {
        let offsets = [1, 3, 3, 5];
        let documents = Documents::new(b"xabcd!", Offsets::Narrow(&offsets), Some((&[0b0101_1000], 3))).unwrap();
        assert_eq!(documents.len(), 3);
        assert_eq!(documents.get(0), Ok("ab"));
        assert_eq!(documents.get(1), Ok(""));
        assert_eq!(documents.get(2), Ok(""));
        assert_eq!(documents.blocks(), vec![0..3]);
    }

    #[test]
    fn refuses_broken_input() {
        assert!(Documents::new(b"ab", Offsets::Wide(&[0, 3]), None).is_err());
        assert!(Documents::new(b"ab", Offsets::Wide(&[2, 1]), None).is_err());
        assert!(Documents::new(b"ab", Offsets::Wide(&[-1, 1]), None).is_err());
        assert!(Documents::new(b"ab", Offsets::Wide(&[]), None).is_err());
        assert!(Documents::new(b"ab", Offsets::Wide(&[0, 1, 2]), Some((&[1], 7))).is_err());
        let broken = Documents::new(b"ab\xff", Offsets::Wide(&[0, 1, 3]), None).unwrap();
        assert_eq!(broken.get(1).unwrap_err(), "document 1 is not valid UTF-8: bad byte at 1");
    }

    #[test]
    fn truncates_by_characters() {
        assert_eq!(truncate("añb", 2), "añ");
        assert_eq!(truncate("añb", 3), "añb");
        assert_eq!(truncate("añb", 0), "");
    }

    #[test]
    fn every_block_is_done_once() {
        for threads in [1, 2, 5] {
            let mut done = vec![Vec::new(); threads];
            let finished = share_blocks(
                50,
                &mut done,
                |mine, block| {
                    mine.push(block);
                    true
                },
                &mut |_| true,
            );
            let mut all = done.concat();
            all.sort_unstable();
            assert!(finished && all == (0..50).collect::<Vec<_>>());
        }
        assert!(!share_blocks(50, &mut [0], |_, block| block < 9, &mut |_| true));
        assert!(!share_blocks(50, &mut [0], |_, _| true, &mut |taken| taken < 9));
    }
}
