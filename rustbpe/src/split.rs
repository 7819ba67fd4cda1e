//! Cutting text into the pieces inside which byte pairs may merge: hand-written scanners for the usual patterns.
//!
//! Each scanner gives the same pieces as its regular expression, for every text. Together the alternatives of each
//! pattern match any character, so the pieces cover the text without gaps.

use crate::unicode::{class_of, is_mark, Class, ASCII};

/// GPT-4 style as nanochat uses it; digits in groups of at most two.
pub const GPT4_DIGITS2: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
/// The same with digits in groups of at most three: the default.
pub const GPT4_DIGITS3: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
/// llama.cpp's pre-tokenizer `qwen35`, as it writes it: combining marks belong to the letters, digits stand alone.
pub const RUNTIMES: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// cl100k_base as tiktoken writes it. Unlike the two above, white space at the end of the text stays in one piece.
pub const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
/// GPT-2 as published, and as tiktoken writes it: the same pieces.
pub const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub const GPT2_TIKTOKEN: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s";

/// A split pattern, told by the text of its regular expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    Gpt4 { max_digits: usize, whole_tail: bool },
    Gpt2,
    Runtimes,
}

impl Pattern {
    pub fn parse(regex: &str) -> Result<Pattern, String> {
        match regex {
            GPT4_DIGITS2 => Ok(Pattern::Gpt4 { max_digits: 2, whole_tail: false }),
            GPT4_DIGITS3 => Ok(Pattern::Gpt4 { max_digits: 3, whole_tail: false }),
            RUNTIMES => Ok(Pattern::Runtimes),
            CL100K => Ok(Pattern::Gpt4 { max_digits: 3, whole_tail: true }),
            GPT2 | GPT2_TIKTOKEN => Ok(Pattern::Gpt2),
            _ => Err(format!(
                "split pattern not supported: {regex:?}. The splitters are written by hand, for these patterns only: \
                 GPT-4 style with \\p{{N}}{{1,2}} {GPT4_DIGITS2:?}, with \\p{{N}}{{1,3}} {GPT4_DIGITS3:?}, \
                 cl100k_base {CL100K:?}, GPT-2 {GPT2:?} and that of llama.cpp's qwen35 {RUNTIMES:?}"
            )),
        }
    }

    /// Calls `each` with the start and the end of every piece of `text`, in order.
    #[inline(always)]
    pub fn for_each_piece(self, text: &str, each: impl FnMut(usize, usize)) {
        // One copy of the loop for each pattern, so that the options cost nothing inside.
        match self {
            Pattern::Gpt4 { max_digits: 2, whole_tail: false } => pieces::<2, false, false>(text, each),
            Pattern::Gpt4 { whole_tail: false, .. } => pieces::<3, false, false>(text, each),
            Pattern::Gpt4 { whole_tail: true, .. } => pieces::<3, true, false>(text, each),
            Pattern::Gpt2 => pieces::<0, false, false>(text, each),
            Pattern::Runtimes => pieces::<1, false, true>(text, each),
        }
    }
}

/// `DIGITS` 0 stands for GPT-2; `WHOLE_TAIL` for cl100k's `\s++$`; `MARKS` for the runtimes' pattern.
fn pieces<const DIGITS: usize, const WHOLE_TAIL: bool, const MARKS: bool>(
    text: &str,
    mut each: impl FnMut(usize, usize),
) {
    let bytes = text.as_bytes();
    let mut start = 0;
    while start < bytes.len() {
        let end =
            if DIGITS == 0 { gpt2_end(bytes, start) } else { gpt4_end::<DIGITS, WHOLE_TAIL, MARKS>(bytes, start) };
        each(start, end);
        start = end;
    }
}

/// End of the piece that starts at `start`; the alternatives of the pattern in their order.
#[inline(always)]
fn gpt4_end<const DIGITS: usize, const WHOLE_TAIL: bool, const MARKS: bool>(bytes: &[u8], start: usize) -> usize {
    let first = bytes[start];
    // The runtimes' pattern has [\p{L}\p{M}] where the others have \p{L}, and so it counts marks as letters. A mark can
    // also be the one character before them there: that is the same piece.
    let (class, next) = class_at::<MARKS>(bytes, start);
    if class == Class::Letter {
        return letters::<MARKS>(bytes, next);
    }
    if first == b'\'' {
        let case = if MARKS { Case::Ascii } else { Case::Ignored };
        if let Some(end) = contraction(bytes, next, case) {
            return end;
        }
    }
    if class == Class::Number {
        return (1..DIGITS).fold(next, |end, _| step_over::<false>(bytes, end, Class::Number));
    }
    if first != b'\r' && first != b'\n' {
        let end = letters::<MARKS>(bytes, next);
        if end > next {
            return end;
        }
    }
    // " ?[^\s\p{L}\p{N}]++[\r\n]*"
    let mark = if first == b' ' { next } else { start };
    let end = run_of::<MARKS>(bytes, mark, Class::Other);
    if end > mark {
        let line_ends = bytes[end..].iter().take_while(|&&b| b == b'\r' || b == b'\n').count();
        return end + line_ends;
    }
    let space = Spaces::from(bytes, start);
    if WHOLE_TAIL && space.end == bytes.len() {
        return space.end;
    }
    space.after_last_line_end.unwrap_or_else(|| space.end_before_text(bytes, start))
}

#[inline(always)]
fn gpt2_end(bytes: &[u8], start: usize) -> usize {
    if bytes[start] == b'\'' {
        if let Some(end) = contraction(bytes, start + 1, Case::Kept) {
            return end;
        }
    }
    let mark = if bytes[start] == b' ' { start + 1 } else { start };
    if mark < bytes.len() {
        let (class, next) = class_at::<false>(bytes, mark);
        match class {
            Class::Letter => return letters::<false>(bytes, next),
            Class::Number | Class::Other => return run_of::<false>(bytes, next, class),
            Class::Space => {}
        }
    }
    Spaces::from(bytes, start).end_before_text(bytes, start)
}

/// A run of white space.
struct Spaces {
    end: usize,
    /// Where the last character of the run starts.
    last: usize,
    after_last_line_end: Option<usize>,
}

impl Spaces {
    fn from(bytes: &[u8], start: usize) -> Spaces {
        let mut spaces = Spaces { end: start, last: start, after_last_line_end: None };
        while spaces.end < bytes.len() {
            let (class, next) = class_at::<false>(bytes, spaces.end);
            if class != Class::Space {
                break;
            }
            if matches!(bytes[spaces.end], b'\r' | b'\n') {
                spaces.after_last_line_end = Some(next);
            }
            spaces.last = spaces.end;
            spaces.end = next;
        }
        spaces
    }

    /// `\s+(?!\S)|\s+`: the last white space before text is left to the piece of that text, if it is not alone.
    fn end_before_text(&self, bytes: &[u8], start: usize) -> usize {
        if self.end < bytes.len() && self.last > start {
            self.last
        } else {
            self.end
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    Kept,
    Ascii,
    /// Of all letters: 'ſ' (U+017F) is an s too.
    Ignored,
}

/// End of `[sdmt]|ll|ve|re` at `at`, just after an apostrophe.
fn contraction(bytes: &[u8], at: usize, case: Case) -> Option<usize> {
    let fold = |b: &u8| if case == Case::Kept { *b } else { b.to_ascii_lowercase() };
    match (bytes.get(at).map(fold)?, bytes.get(at + 1).map(fold)) {
        (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(at + 2),
        (0xC5, Some(0xBF)) if case == Case::Ignored => Some(at + 2),
        _ => None,
    }
}

/// End of the run of letters from `at`, with their marks if `MARKS`.
#[inline(always)]
fn letters<const MARKS: bool>(bytes: &[u8], mut at: usize) -> usize {
    loop {
        // Eight bytes at a time while they are ASCII letters.
        while let Some(word) = bytes.get(at..at + 8) {
            let word = u64::from_le_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]]);
            let others = !ascii_letters(word) & HIGH_BITS;
            if others != 0 {
                at += others.trailing_zeros() as usize / 8;
                break;
            }
            at += 8;
        }
        // The byte that stopped it may start a letter beyond ASCII; the last seven bytes of a text come here one by one.
        let next = step_over::<MARKS>(bytes, at, Class::Letter);
        if next == at {
            return at;
        }
        at = next;
    }
}

const HIGH_BITS: u64 = 0x8080_8080_8080_8080;

/// Sets the high bit of every byte of `word` that is an ASCII letter (the other bits mean nothing).
#[inline(always)]
fn ascii_letters(word: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let lower = (word | (0x20 * ONES)) & !HIGH_BITS;
    // Each sum stays inside its byte, and reaches the high bit from 'a' on, or only after 'z'.
    let from_a = lower + (0x80 - b'a' as u64) * ONES;
    let after_z = lower + (0x7f - b'z' as u64) * ONES;
    from_a & !after_z & !word
}

/// End of the run of `class` from `at`.
fn run_of<const MARKS: bool>(bytes: &[u8], mut at: usize, class: Class) -> usize {
    loop {
        let next = step_over::<MARKS>(bytes, at, class);
        if next == at {
            return at;
        }
        at = next;
    }
}

/// `at`, or the next character if the one at `at` is of this class.
#[inline(always)]
fn step_over<const MARKS: bool>(bytes: &[u8], at: usize, class: Class) -> usize {
    if at < bytes.len() {
        let (found, next) = class_at::<MARKS>(bytes, at);
        if found == class {
            return next;
        }
    }
    at
}

/// Class of the character that starts at `at`, and where the next one starts. With `MARKS` a mark counts as a letter.
#[inline(always)]
fn class_at<const MARKS: bool>(bytes: &[u8], at: usize) -> (Class, usize) {
    let first = bytes[at];
    if first < 0x80 {
        return (ASCII[first as usize], at + 1);
    }
    let (code, width) = decode(bytes, at);
    let class = class_of(code);
    (if MARKS && class == Class::Other && is_mark(code) { Class::Letter } else { class }, at + width)
}

/// The code point beyond ASCII that starts at `at`, and its width in bytes. The text is valid UTF-8.
fn decode(bytes: &[u8], at: usize) -> (u32, usize) {
    let low_bits = |i: usize| (bytes[at + i] & 0x3f) as u32;
    match bytes[at] {
        first @ 0xf0..=0xff => ((first as u32 & 7) << 18 | low_bits(1) << 12 | low_bits(2) << 6 | low_bits(3), 4),
        first @ 0xe0..=0xef => ((first as u32 & 15) << 12 | low_bits(1) << 6 | low_bits(2), 3),
        first => ((first as u32 & 31) << 6 | low_bits(1), 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(pattern: &str, text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        Pattern::parse(pattern).unwrap().for_each_piece(text, |start, end| pieces.push(text[start..end].to_string()));
        pieces
    }

    /// The pattern's alternatives, tried one after the other over characters: slow, and close to the regex.
    fn split_slowly(pattern: &str, text: &str) -> Vec<String> {
        let chars: Vec<char> = text.chars().collect();
        let class = |i: usize| chars.get(i).map(|&c| class_of(c as u32));
        let mark = |i: usize| pattern == RUNTIMES && chars.get(i).map_or(false, |&c| is_mark(c as u32));
        let is = |i: usize, kind: Class| match kind {
            Class::Letter => class(i) == Some(kind) || mark(i),
            _ => class(i) == Some(kind) && !mark(i),
        };
        let run = |from: usize, kind: Class| (from..chars.len()).take_while(|&i| is(i, kind)).count();
        let line_end = |i: usize| matches!(chars.get(i), Some('\r' | '\n'));
        let gpt4 = !matches!(pattern, GPT2 | GPT2_TIKTOKEN);
        let alternatives = |at: usize| -> usize {
            if chars[at] == '\'' {
                for ending in ["s", "d", "m", "t", "ſ", "ll", "ve", "re"] {
                    let found: String = chars[at + 1..].iter().take(ending.chars().count()).collect();
                    let any_case = gpt4 && ending != "ſ" && found.to_ascii_lowercase() == ending;
                    if found == ending && ending != "ſ" || any_case || found == "ſ" && gpt4 && pattern != RUNTIMES {
                        return 1 + ending.chars().count();
                    }
                }
            }
            let optional_space = (chars[at] == ' ') as usize;
            if gpt4 {
                let any = !(line_end(at) || matches!(class(at), Some(Class::Letter | Class::Number))) as usize;
                match run(at + any, Class::Letter) {
                    0 if mark(at) => return 1,
                    0 => {}
                    n => return any + n,
                }
                let most = match pattern {
                    RUNTIMES => 1,
                    GPT4_DIGITS2 => 2,
                    _ => 3,
                };
                match run(at, Class::Number) {
                    0 => {}
                    n => return n.min(most),
                }
                match run(at + optional_space, Class::Other) {
                    0 => {}
                    n => {
                        let end = at + optional_space + n;
                        return end - at + (end..chars.len()).take_while(|&i| line_end(i)).count();
                    }
                }
            } else {
                for kind in [Class::Letter, Class::Number, Class::Other] {
                    match run(at + optional_space, kind) {
                        0 => {}
                        n => return optional_space + n,
                    }
                }
            }
            let spaces = run(at, Class::Space);
            if pattern == CL100K && at + spaces == chars.len() {
                return spaces;
            }
            if gpt4 {
                if let Some(last) = (at..at + spaces).rev().find(|&i| line_end(i)) {
                    return last + 1 - at;
                }
            }
            if at + spaces == chars.len() || spaces == 1 {
                spaces
            } else {
                spaces - 1
            }
        };
        let (mut at, mut pieces) = (0, Vec::new());
        while at < chars.len() {
            let n = alternatives(at);
            pieces.push(chars[at..at + n].iter().collect());
            at += n;
        }
        pieces
    }

    const ALL: [&str; 6] = [GPT4_DIGITS2, GPT4_DIGITS3, CL100K, GPT2, GPT2_TIKTOKEN, RUNTIMES];

    #[test]
    fn splits_known_examples() {
        let text = "Hello world's 12345  tabs\t\tx!!\n\n \n  y";
        let expected =
            ["Hello", " world", "'s", " ", "12", "34", "5", " ", " tabs", "\t", "\tx", "!!\n\n", " \n", " ", " y"];
        assert_eq!(split(GPT4_DIGITS2, text), expected);
        assert_eq!(split(GPT2, "it's 123  \n a"), ["it", "'s", " 123", "  \n", " a"]);
        assert_eq!(split(GPT4_DIGITS3, "x \n "), ["x", " \n", " "]);
        assert_eq!(split(CL100K, "x \n "), ["x", " \n "]);
        assert_eq!(split(GPT4_DIGITS3, "'LLa 'ſ 'Re"), ["'LL", "a", " '", "ſ", " '", "Re"]);
        assert_eq!(split(GPT4_DIGITS3, ""), [""; 0]);
        // Vowel signs are marks: हिन्दी is one piece, in other patterns four.
        assert_eq!(split(RUNTIMES, "हिन्दी 12 'ſa 'LLb"), ["हिन्दी", " ", "1", "2", " '", "ſa", " '", "LLb"]);
        assert_eq!(split(GPT4_DIGITS2, "हिन्दी").len(), 4);
        assert_eq!(split(RUNTIMES, "e\u{301}!\u{301}\u{301} \u{301}"), ["e\u{301}", "!\u{301}\u{301}", " \u{301}"]);
    }

    #[test]
    fn agrees_with_the_slow_splitter() {
        let alphabet: Vec<char> =
            "aZsſltveRdM'' \t\r\n\u{85}\u{a0}\u{3000}09٣½é漢—!<|\u{301}\u{93f}\u{200d}🙂\u{e000}\0".chars().collect();
        let mut state = 1u64;
        for round in 0..60_000 {
            let text: String = (0..round % 24)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    alphabet[(state >> 33) as usize % alphabet.len()]
                })
                .collect();
            for pattern in ALL {
                assert_eq!(split(pattern, &text), split_slowly(pattern, &text), "{pattern} on {text:?}");
            }
        }
    }

    #[test]
    fn long_runs_of_letters_end_at_the_right_byte() {
        for length in 0..40 {
            for end in ["", "é", "1", " ", "é1", "{", "@", "`", "["] {
                let text = "Z".repeat(length) + end;
                assert_eq!(split(GPT4_DIGITS3, &text), split_slowly(GPT4_DIGITS3, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn other_patterns_are_refused() {
        let message = Pattern::parse(r"\w+").unwrap_err();
        assert!(message.contains("\\\\w+") && message.contains("GPT-2"), "{message}");
    }
}
