//! The class of a code point: letter, number, white space or anything else.

use crate::unicode_tables::{INDEX, MARKS, ROWS};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    Other = 0,
    /// `\p{L}`
    Letter = 1,
    /// `\p{N}`
    Number = 2,
    /// `\s`
    Space = 3,
}

const CLASSES: [Class; 4] = [Class::Other, Class::Letter, Class::Number, Class::Space];

/// Class of any code point (up to U+10FFFF).
pub fn class_of(code: u32) -> Class {
    let row = &ROWS[INDEX[(code >> 7) as usize] as usize];
    let bits = row[(code >> 5 & 3) as usize] >> (2 * (code & 31));
    CLASSES[(bits & 3) as usize]
}

/// True for the combining marks (`\p{M}`), such as accents and vowel signs: they are of the class `Other`.
pub fn is_mark(code: u32) -> bool {
    let after = MARKS.partition_point(|&(first, _)| first <= code);
    after > 0 && code <= MARKS[after - 1].1
}

/// Class of each ASCII byte, for the scanner's inner loops.
pub static ASCII: [Class; 128] = ascii();

const fn ascii() -> [Class; 128] {
    let mut table = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        let b = byte as u8;
        if b.is_ascii_alphabetic() {
            table[byte] = Class::Letter;
        } else if b.is_ascii_digit() {
            table[byte] = Class::Number;
        } else if b == b' ' || (b >= 9 && b <= 13) {
            table[byte] = Class::Space;
        }
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_agrees_with_the_unicode_table() {
        for code in 0..128 {
            assert_eq!(ASCII[code as usize], class_of(code), "U+{code:04X}");
        }
    }

    #[test]
    fn agrees_with_std_on_latin() {
        for c in (0..0x250).filter_map(char::from_u32) {
            let class = class_of(c as u32);
            assert_eq!(class == Class::Space, c.is_whitespace(), "{c:?}");
            if class == Class::Letter {
                assert!(c.is_alphabetic(), "{c:?}");
            }
            if class == Class::Number {
                assert!(c.is_numeric(), "{c:?}");
            }
        }
        assert_eq!(class_of(0x10FFFF), Class::Other);
    }

    #[test]
    fn marks_are_of_no_other_class() {
        let marks: Vec<u32> = (0..0x110000).filter(|&code| is_mark(code)).collect();
        assert!(marks.len() > 2000 && marks[0] == 0x300 && marks.contains(&0x93F) && !marks.contains(&0x915));
        assert!(marks.iter().all(|&code| class_of(code) == Class::Other));
    }
}
