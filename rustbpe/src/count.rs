//! How often each piece of text occurs, counted by several threads.

use std::sync::Mutex;

use crate::documents::{num_chars, num_threads, share_blocks, truncate, Documents};
use crate::pieces::{hash_bytes, PieceMap, ShortPiece, Waiting};
use crate::split::Pattern;

/// What training may read. `u64::MAX` stands for no limit.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Characters of each document.
    pub doc_chars: u64,
    /// Characters altogether; the document that takes the sum beyond this is the last one, and is read whole.
    pub total_chars: u64,
}

#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Totals {
    pub documents: u64,
    pub bytes: u64,
}

/// Counts the pieces of documents that arrive in batches. Its memory grows with the distinct pieces, not with the text.
pub struct Counter {
    pattern: Pattern,
    limits: Limits,
    /// One map and one sum for each thread.
    workers: Vec<(PieceMap<u64>, Totals)>,
    /// Characters seen; only counted if there is a limit.
    chars: u64,
}

/// The distinct pieces one after another, and how often each occurs.
#[derive(Default)]
pub struct PieceCounts {
    pub bytes: Vec<u8>,
    /// End of each piece in `bytes`.
    pub ends: Vec<usize>,
    pub counts: Vec<u64>,
}

impl Counter {
    /// `threads` 0 means one for each processor.
    pub fn new(pattern: Pattern, limits: Limits, threads: usize) -> Counter {
        let workers = (0..num_threads(threads)).map(|_| Default::default()).collect();
        Counter { pattern, limits, workers, chars: 0 }
    }

    /// Counts a batch. Returns false once `total_chars` is reached: later batches would be ignored.
    /// `report` hears how many bytes of the batch are done, and stops the work by false.
    pub fn feed(&mut self, documents: &Documents, report: &mut dyn FnMut(u64) -> bool) -> Result<bool, String> {
        let count = self.documents_within_limit(documents)?;
        let blocks: Vec<_> = documents.blocks().into_iter().filter(|block| block.start < count).collect();
        let (pattern, doc_chars) = (self.pattern, self.limits.doc_chars);
        // The first document that is wrong, so that the message does not depend on the threads.
        let failure: Mutex<Option<(usize, String)>> = Mutex::new(None);
        let fail = |i: usize, message: String| {
            let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
            if failure.as_ref().map_or(true, |(first, _)| i < *first) {
                *failure = Some((i, message));
            }
        };
        let work = |(map, totals): &mut (PieceMap<u64>, Totals), block: usize| {
            let mut waiting = Waiting::default();
            for i in blocks[block].start..blocks[block].end.min(count) {
                match documents.get(i) {
                    Ok(text) => {
                        let text = truncate(text, doc_chars);
                        totals.documents += 1;
                        totals.bytes += text.len() as u64;
                        let bytes = text.as_bytes();
                        pattern.for_each_piece(text, |start, end| match ShortPiece::new(bytes, start, end) {
                            Some(piece) => {
                                let hash = piece.hash();
                                map.prefetch(hash);
                                if waiting.push(piece, hash) {
                                    add_one_each(map, &mut waiting);
                                }
                            }
                            None => *map.long_entry(&bytes[start..end]) += 1,
                        });
                    }
                    Err(message) => {
                        fail(i, message);
                        return false;
                    }
                }
            }
            add_one_each(map, &mut waiting);
            true
        };
        let mut report_bytes = |taken: usize| report(documents.num_bytes(0..blocks[taken - 1].end) as u64);
        let finished = share_blocks(blocks.len(), &mut self.workers, work, &mut report_bytes);
        match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some((_, message)) => Err(message),
            None if !finished => Err("stopped by the progress callback".into()),
            None => Ok(self.chars <= self.limits.total_chars),
        }
    }

    /// How many documents of this batch come before `total_chars` is passed.
    fn documents_within_limit(&mut self, documents: &Documents) -> Result<usize, String> {
        if self.limits.total_chars == u64::MAX {
            return Ok(documents.len());
        }
        for i in 0..documents.len() {
            if self.chars > self.limits.total_chars {
                return Ok(i);
            }
            let chars = num_chars(truncate(documents.get(i)?, self.limits.doc_chars));
            self.chars += chars;
        }
        Ok(documents.len())
    }

    pub fn totals(&self) -> Totals {
        self.workers.iter().fold(Totals::default(), |sum, (_, one)| Totals {
            documents: sum.documents + one.documents,
            bytes: sum.bytes + one.bytes,
        })
    }

    /// Bytes held by the maps, roughly.
    pub fn memory(&self) -> usize {
        self.workers.iter().map(|(map, _)| map.memory()).sum()
    }

    /// Sums over the threads. The order of the pieces is not defined.
    pub fn finish(self) -> PieceCounts {
        let maps: Vec<PieceMap<u64>> =
            self.workers.into_iter().map(|(map, _)| map).filter(|map| !map.is_empty()).collect();
        if maps.len() < 2 {
            return gather(maps.into_iter().next().as_ref());
        }
        // Part p of the hash space is summed by one thread, over all maps.
        let parts = maps.len();
        let mut sums: Vec<PieceMap<u64>> = (0..parts).map(|_| PieceMap::default()).collect();
        let part_of = |hash: u64| (((hash >> 32) * parts as u64) >> 32) as usize;
        std::thread::scope(|scope| {
            for (part, sum) in sums.iter_mut().enumerate() {
                let maps = &maps;
                scope.spawn(move || {
                    for map in maps {
                        for (piece, count) in map.short_pieces() {
                            let hash = piece.hash();
                            if part_of(hash) == part {
                                *sum.short_entry(piece, hash) += count;
                            }
                        }
                        for (piece, count) in map.long_pieces().filter(|(piece, _)| part_of(hash_bytes(piece)) == part)
                        {
                            *sum.long_entry(piece) += count;
                        }
                    }
                });
            }
        });
        drop(maps);
        gather(&sums)
    }
}

#[inline(always)]
fn add_one_each(map: &mut PieceMap<u64>, waiting: &mut Waiting) {
    for &(piece, hash) in waiting.take() {
        *map.short_entry(piece, hash) += 1;
    }
}

fn gather<'a>(maps: impl IntoIterator<Item = &'a PieceMap<u64>>) -> PieceCounts {
    let mut all = PieceCounts::default();
    for map in maps {
        for (piece, count) in map.short_pieces() {
            let (bytes, length) = piece.bytes();
            all.push(&bytes[..length], count);
        }
        for (piece, count) in map.long_pieces() {
            all.push(piece, count);
        }
    }
    all
}

impl PieceCounts {
    pub fn push(&mut self, piece: &[u8], count: u64) {
        self.bytes.extend_from_slice(piece);
        self.ends.push(self.bytes.len());
        self.counts.push(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::documents::Offsets;
    use crate::split::GPT4_DIGITS3;

    fn count(texts: &[&str], limits: Limits, threads: usize) -> (Vec<(Vec<u8>, u64)>, Totals, bool) {
        let data = texts.concat();
        let mut offsets = vec![0i64];
        for text in texts {
            offsets.push(offsets[offsets.len() - 1] + text.len() as i64);
        }
        let documents = Documents::new(data.as_bytes(), Offsets::Wide(&offsets), None).unwrap();
        let mut counter = Counter::new(Pattern::parse(GPT4_DIGITS3).unwrap(), limits, threads);
        let more = counter.feed(&documents, &mut |_| true).unwrap();
        let totals = counter.totals();
        let pieces = counter.finish();
        let starts = std::iter::once(0).chain(pieces.ends.iter().copied());
        let mut all: Vec<_> = starts
            .zip(&pieces.ends)
            .zip(&pieces.counts)
            .map(|((start, &end), &count)| (pieces.bytes[start..end].to_vec(), count))
            .collect();
        all.sort();
        (all, totals, more)
    }

    const NO_LIMITS: Limits = Limits { doc_chars: u64::MAX, total_chars: u64::MAX };

    #[test]
    fn counts_the_same_with_any_number_of_threads() {
        let long = "a".repeat(40) + " internationalization";
        let texts: Vec<String> = (0..3000).map(|i| format!("w{} the {long} {}", i % 700, i * i)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let expected = count(&texts, NO_LIMITS, 1);
        assert!(expected.0.contains(&(b" the".to_vec(), 3000)));
        assert!(expected.0.contains(&(b" internationalization".to_vec(), 3000)));
        for threads in [2, 3, 8] {
            assert!(count(&texts, NO_LIMITS, threads) == expected);
        }
    }

    #[test]
    fn limits_are_in_characters() {
        let texts = ["añbc", "xyé!", "never"];
        let limits = |total_chars| Limits { doc_chars: 3, total_chars };
        let (pieces, totals, more) = count(&texts, limits(5), 2);
        assert_eq!(pieces, vec![("añb".into(), 1), ("xyé".into(), 1)]);
        assert_eq!(totals, Totals { documents: 2, bytes: 8 });
        assert!(!more);
        assert_eq!(count(&texts, limits(6), 2).1.documents, 3);
        assert_eq!(count(&texts, limits(2), 2).1.documents, 1);
    }
}
