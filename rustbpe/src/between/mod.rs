//! What a training step on a CPU does between its matrix products: norms, rotated heads, squared ReLU, softmax.
//!
//! All of it is limited by memory, so what counts is how often a tensor is read and written. Each kernel reads its
//! inputs once and writes the next product's input in the dtype that the product wants. The gradients' formulas are
//! those of `nanochat/ops`, whose functions in torch stay the reference.
//!
//! Arithmetic is in float32 whatever the dtype, without fused multiplications, and every sum has a fixed order. So the
//! result is the same, bit for bit, for every number of threads and on every processor. What is done in tiles (`attend`
//! and `newton`) is the same for every number of threads only: processors without them leave it to torch.
//!
//! Shapes: B sequences, T tokens, C channels, H heads, D head size, V vocabulary.

// Indices run over several slices of one length, which a compiler sees best in this form.
#![allow(clippy::needless_range_loop)]

pub mod abi;
#[cfg(all(target_os = "linux", target_arch = "x86_64", avx512))]
#[allow(clippy::incompatible_msrv)]
mod attend;
mod heads;
mod muon;
#[cfg(all(target_os = "linux", target_arch = "x86_64", avx512))]
#[allow(clippy::incompatible_msrv)]
mod newton;
pub(crate) mod numbers;
mod rows;
mod softmax;
pub mod team;
#[cfg(all(target_os = "linux", target_arch = "x86_64", avx512))]
#[allow(clippy::incompatible_msrv)]
mod tiles;
