//! Byte pair encoding for language models: a trainer and an encoder, std only.
//!
//! The text is cut into pieces by [`split`] (no regular expression engine), equal pieces are counted in [`count`], and
//! [`train`] merges the most frequent pair of tokens until the vocabulary is full. [`encode`] applies the merges to new
//! text. Both read documents where they lie ([`documents`]): Arrow buffers or one joined buffer. [`abi`] is the border
//! to Python; all `unsafe` of these is there, but for one prefetch in [`pieces`].
//!
//! And [`decode`]: a language model's decode step on a CPU, with vector instructions and an ABI of its own; [`matches`]:
//! what followed the longest earlier matches of tokens in a text, for models that look it up.
//!
//! No result depends on the number of threads.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod abi;
pub mod between;
pub mod count;
pub mod decode;
pub mod documents;
pub mod encode;
pub mod matches;
pub mod pairs;
pub mod pieces;
pub mod split;
pub mod train;
pub mod unicode;
mod unicode_tables;
