//! Byte pair encoding for language models: a trainer and an encoder, std only.
//!
//! The text is cut into pieces by [`split`] (no regular expression engine), equal pieces are counted in [`count`], and
//! [`train`] merges the most frequent pair of tokens until the vocabulary is full. [`encode`] applies the merges to new
//! text. Both read documents where they lie ([`documents`]): Arrow buffers or one joined buffer. [`abi`] is the border
//! to Python; all `unsafe` is there, but for one prefetch in [`pieces`].
//!
//! The result does not depend on the number of threads.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod abi;
pub mod count;
pub mod documents;
pub mod encode;
pub mod pairs;
pub mod pieces;
pub mod split;
pub mod train;
pub mod unicode;
mod unicode_tables;
