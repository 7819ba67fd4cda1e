//! Products of 4-bit weights: 32 neighbours of a row have one scale, weight = scale · (number − 8) with 0 to 15.
//!
//! Activations are the 16-bit integers of 8-bit weights in two parts, x = 256 · upper + lower, so that products with
//! bytes sum up exactly. Only the sum of each group becomes a float, and floats are added without fused
//! multiplications: every processor computes the same bits.
//!
//! 16 outputs are a block, in which pairs of groups lie one behind the other: a line of bfloat16 scales, 16 for each
//! group, then 256 bytes of numbers for each. These are four registers of 64 bytes, four columns of each output, and 16
//! columns further right in the upper halves of the same bytes. So an output has its own lanes, nothing is summed across
//! a register, and memory is read from its first byte to its last.

use super::dot::{from_bf16, integer_factor, largest, nearest, round, to_bf16, Out, Product};

/// Outputs of a block and columns of a group; bytes of a block's group and of two with their scales.
const ROWS: usize = 16;
const GROUP: usize = 32;
const BYTES: usize = ROWS * GROUP / 2;
const PAIR: usize = 2 * (ROWS * 2 + BYTES);
/// How far ahead of what is multiplied memory is asked for.
const PREFETCH: usize = 8192;

/// The activations of a group, and what the sum of their products begins with: −8 times their sum.
#[derive(Clone, Copy)]
#[cfg_attr(test, derive(Default))]
#[repr(C)]
pub struct Group {
    upper: [i8; GROUP],
    lower: [i8; GROUP],
    start: i32,
}

/// What a processor must know.
pub trait Nibbles {
    /// Numbers of 16 outputs and 4 columns.
    type Numbers: Copy;
    /// Sums of each output, in one lane or several; numbers: all bits 0 are zero.
    type Sums: Copy;
    /// Tokens for whose sums there are registers.
    const TOKENS: usize;

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: see `Sums`.
        unsafe { std::mem::zeroed() }
    }
    /// Asks for the memory at an address.
    #[inline(always)]
    fn prefetch(_at: *const u8) {}
    /// The numbers in the lower halves of 64 bytes, and in the upper ones.
    ///
    /// # Safety
    /// They can be read, and the processor has the instructions of this implementation.
    unsafe fn load(at: *const u8) -> [Self::Numbers; 2];
    /// Adds the products with four columns' activations.
    ///
    /// # Safety
    /// The processor has the instructions of this implementation.
    unsafe fn add(sums: Self::Sums, numbers: Self::Numbers, x: [i8; 4]) -> Self::Sums;
    /// # Safety
    /// As `add`.
    unsafe fn total(sums: Self::Sums) -> [i32; ROWS];
}

/// A processor's products in 4 bits.
pub struct Four<N>(std::marker::PhantomData<N>);

pub fn groups(columns: usize) -> usize {
    (columns + GROUP - 1) / GROUP
}

/// Bytes of a block.
fn block_len(columns: usize) -> usize {
    (groups(columns) + 1) / 2 * PAIR
}

/// Where in a block a group's scales and its numbers begin.
fn places(group: usize) -> (usize, usize) {
    let pair = group / 2 * PAIR;
    (pair + group % 2 * ROWS * 2, pair + ROWS * 4 + group % 2 * BYTES)
}

/// Bytes that `pack` needs.
pub fn packed_len(rows: usize, columns: usize) -> usize {
    (rows + ROWS - 1) / ROWS * block_len(columns)
}

/// Rounds weights to 4 bits, in blocks. `out` holds zeros, `packed_len` of them.
pub fn pack(weights: &[f32], columns: usize, out: &mut [u8]) {
    for (row, weights) in weights.chunks_exact(columns).enumerate() {
        let block = &mut out[row / ROWS * block_len(columns)..];
        let row = row % ROWS;
        for (g, weights) in weights.chunks(GROUP).enumerate() {
            let (scales, numbers) = places(g);
            let mut group = [0.0; GROUP]; // beyond the last column activations are zero
            group[..weights.len()].copy_from_slice(weights);
            let (scale, rounded) = quantize(&group);
            block[scales + row * 2..][..2].copy_from_slice(&scale.to_ne_bytes());
            for (i, number) in rounded.iter().enumerate() {
                let half = i % 16;
                block[numbers + half / 4 * 64 + row * 4 + half % 4] |= ((number + 8.0) as u8) << (i / 16 * 4);
            }
        }
    }
}

/// The scale of a group, a bfloat16, NaN if a weight is not finite; and its weights as integers from −8 to 7.
///
/// There is one number more below 0 than above. So the weight of the largest magnitude becomes about −8: of five scales
/// the one with the smallest squared error.
fn quantize(weights: &[f32; GROUP]) -> (u16, [f32; GROUP]) {
    let most = largest(weights);
    let signed = if weights.contains(&most) { -most } else { most };
    let (mut best, mut least) = ((to_bf16(f32::NAN), [0.0; GROUP]), f32::INFINITY);
    for steps in [7.0, 7.5, 8.0, 8.5, 9.0] {
        let kept = to_bf16(signed / steps);
        let scale = from_bf16(kept);
        let inverse = if scale.abs() < f32::MIN_POSITIVE { 0.0 } else { 1.0 / scale };
        let (mut rounded, mut errors) = ([0.0; GROUP], [0.0; 8]);
        for i in 0..GROUP {
            rounded[i] = nearest(weights[i] * inverse).clamp(-8.0, 7.0);
            errors[i % 8] += (weights[i] - scale * rounded[i]).powi(2);
        }
        let error = errors.iter().sum();
        if error < least {
            (best, least) = ((kept, rounded), error);
        }
    }
    best
}

/// The outputs of R blocks of `size` bytes for B tokens, whose groups begin `groups` apart.
///
/// # Safety
/// The blocks and the tokens can be read, and the processor has the instructions of N.
#[inline(always)]
unsafe fn tile<N: Nibbles, const R: usize, const B: usize>(
    blocks: *const u8,
    size: usize,
    groups: usize,
    x: *const Group,
) -> [[[f32; ROWS]; B]; R] {
    let mut totals = [[[0.0; ROWS]; B]; R];
    for g in 0..groups {
        let (scales, numbers) = places(g);
        for (i, totals) in totals.iter_mut().enumerate() {
            // SAFETY: as the caller promises. Beyond the last block prefetching is a hint that comes to nothing.
            unsafe {
                let (scales, numbers) = (blocks.add(i * size + scales), blocks.add(i * size + numbers));
                N::prefetch(scales.wrapping_add(PREFETCH / R));
                let (mut upper, mut lower) = ([N::zero(); B], [N::zero(); B]);
                for k in 0..4 {
                    N::prefetch(numbers.wrapping_add(PREFETCH / R + k * 64));
                    for (half, numbers) in N::load(numbers.add(k * 64)).into_iter().enumerate() {
                        let at = half * 16 + k * 4;
                        for b in 0..B {
                            let x = x.add(b * groups + g);
                            let four = |part: *const i8| *(part.add(at) as *const [i8; 4]);
                            upper[b] = N::add(upper[b], numbers, four((*x).upper.as_ptr()));
                            lower[b] = N::add(lower[b], numbers, four((*x).lower.as_ptr()));
                        }
                    }
                }
                let scales = *(scales as *const [u16; ROWS]);
                for b in 0..B {
                    let (upper, lower) = (N::total(upper[b]), N::total(lower[b]));
                    let start = (*x.add(b * groups + g)).start;
                    for r in 0..ROWS {
                        // Below 2^24: exact as a float.
                        let sum = (upper[r] << 8) + lower[r] + start;
                        totals[b][r] += from_bf16(scales[r]) * sum as f32;
                    }
                }
            }
        }
    }
    totals
}

impl<N: Nibbles> Product for Four<N> {
    type Input = Group;

    fn stride(columns: usize) -> usize {
        groups(columns)
    }
    #[inline(always)]
    fn prepare(row: &[f32], out: &mut [Group]) -> f32 {
        // 127 · 256 + 127: the largest whose parts have 8 bits each.
        let (factor, inverse) = integer_factor(row, 32_639.0);
        for (group, row) in out.iter_mut().zip(row.chunks(GROUP)) {
            *group = Group { upper: [0; GROUP], lower: [0; GROUP], start: 0 };
            for (i, x) in row.iter().enumerate() {
                let x = round(x * inverse) as i16;
                (group.upper[i], group.lower[i]) = ((x.wrapping_add(128) >> 8) as i8, x as i8);
                group.start -= 8 * i32::from(x);
            }
        }
        factor
    }
    #[inline(always)]
    unsafe fn run(
        weights: *const u8,
        columns: usize,
        (first, count): (usize, usize),
        inputs: *const Group,
        batch: usize,
        out: Out,
    ) {
        let (size, groups) = (block_len(columns), groups(columns));
        let (mut block, end) = (first / ROWS, first + count);
        while block * ROWS < end {
            let left = (end - block * ROWS + ROWS - 1) / ROWS;
            // For one token several at once: each is a stream for the processor to fetch ahead of what is asked for.
            let together = match left {
                4.. if batch == 1 => 4,
                2.. if batch == 1 => 2,
                _ => 1,
            };
            let mut token = 0;
            macro_rules! tokens {
                ($r:literal, $b:literal) => {{
                    // SAFETY: as the caller promises.
                    unsafe {
                        let x = inputs.add(token * groups);
                        let totals = tile::<N, $r, $b>(weights.add(block * size), size, groups, x);
                        for (i, totals) in totals.iter().enumerate() {
                            let output = (block + i) * ROWS;
                            let (from, to) = (first.max(output), end.min(output + ROWS));
                            for (b, totals) in totals.iter().enumerate() {
                                let at = out.at.add((token + b) * out.tokens + from - first);
                                at.copy_from_nonoverlapping(totals.as_ptr().add(from - output), to - from);
                            }
                        }
                    }
                    token += $b;
                }};
            }
            while token < batch {
                match (together, (batch - token).min(N::TOKENS)) {
                    (4, _) => tokens!(4, 1),
                    (2, _) => tokens!(2, 1),
                    (_, 1) => tokens!(1, 1),
                    (_, 2 | 3) => tokens!(1, 2),
                    (_, 4..=7) => tokens!(1, 4),
                    _ => tokens!(1, 8),
                }
            }
            block += together;
        }
    }
}

/// Plain Rust. The sums of a group fit into 16 bits: 15 · 128 · 8.
pub struct PlainNibbles;

impl Nibbles for PlainNibbles {
    type Numbers = [i16; 64];
    type Sums = [i16; 64];
    const TOKENS: usize = 1;

    #[inline(always)]
    unsafe fn load(at: *const u8) -> [[i16; 64]; 2] {
        // SAFETY: as the caller promises.
        let both = unsafe { *(at as *const [u8; 64]) };
        let (mut lower, mut upper) = ([0; 64], [0; 64]);
        for i in 0..64 {
            (lower[i], upper[i]) = (i16::from(both[i] & 15), i16::from(both[i] >> 4));
        }
        [lower, upper]
    }
    #[inline(always)]
    unsafe fn add(mut sums: [i16; 64], numbers: [i16; 64], x: [i8; 4]) -> [i16; 64] {
        let [a, b, c, d] = x.map(i16::from);
        let x = [a, b, c, d, a, b, c, d]; // a register of 128 bits
        for (sums, numbers) in sums.chunks_exact_mut(8).zip(numbers.chunks_exact(8)) {
            for i in 0..8 {
                sums[i] += numbers[i] * x[i];
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn total(sums: [i16; 64]) -> [i32; ROWS] {
        let mut totals = [0; ROWS];
        for (total, four) in totals.iter_mut().zip(sums.chunks_exact(4)) {
            *total = four.iter().map(|&sum| i32::from(sum)).sum();
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// What a row's packed weights stand for.
    fn unpacked(packed: &[u8], columns: usize, row: usize) -> Vec<f32> {
        let block = &packed[row / ROWS * block_len(columns)..];
        let weight = |column: usize| {
            let ((scales, numbers), i, lane) = (places(column / GROUP), column % GROUP, row % ROWS);
            let scale = [block[scales + lane * 2], block[scales + lane * 2 + 1]];
            let scale = from_bf16(u16::from_ne_bytes(scale));
            let two = block[numbers + i % 16 / 4 * 64 + lane * 4 + i % 4];
            scale * (f32::from(two >> (i / 16 * 4) & 15) - 8.0)
        };
        (0..columns).map(weight).collect()
    }

    /// The products of some outputs with some tokens; the tokens' factors.
    fn products<N: Nibbles>(
        packed: &[u8],
        x: &[f32],
        columns: usize,
        (first, count): (usize, usize),
    ) -> (Vec<f32>, Vec<f32>) {
        let batch = x.len() / columns;
        let mut inputs = vec![Group::default(); batch * groups(columns)];
        let pairs = x.chunks(columns).zip(inputs.chunks_mut(groups(columns)));
        let factors = pairs.map(|(row, out)| Four::<N>::prepare(row, out)).collect();
        let mut out = vec![f32::NAN; batch * count];
        let to = Out { at: out.as_mut_ptr(), tokens: count };
        // SAFETY: the buffers have these sizes; callers ask for instructions that there are.
        unsafe { Four::<N>::run(packed.as_ptr(), columns, (first, count), inputs.as_ptr(), batch, to) };
        (out, factors)
    }

    fn on_every_processor(
        packed: &[u8],
        x: &[f32],
        columns: usize,
        outputs: (usize, usize),
    ) -> Vec<(Vec<f32>, Vec<f32>)> {
        #[allow(unused_mut)]
        let mut all = vec![products::<PlainNibbles>(packed, x, columns, outputs)];
        #[cfg(target_arch = "x86_64")]
        {
            use crate::decode::{x86, Level};
            if Level::available().contains(&Level::Avx2) {
                all.push(products::<x86::Avx2Nibbles>(packed, x, columns, outputs));
            }
            #[cfg(avx512)]
            if Level::available().contains(&Level::Avx512) {
                all.push(products::<x86::avx512::Avx512Nibbles>(packed, x, columns, outputs));
            }
        }
        all
    }

    #[test]
    fn every_processor_computes_the_same_bits_and_the_right_ones() {
        let outputs = [(0, 1), (0, 16), (3, 30), (17, 5), (0, 50)];
        for (columns, batch) in [(1, 1), (31, 2), (32, 3), (100, 5), (256, 8), (515, 13), (768, 16)] {
            let (weights, mut x) = (numbers(50 * columns, 1), numbers(batch * columns, 2));
            x[0] = 40.0; // an outlier leaves the others few digits
            let mut packed = vec![0; packed_len(50, columns)];
            pack(&weights, columns, &mut packed);
            for outputs in outputs {
                let all = on_every_processor(&packed, &x, columns, outputs);
                let (plain, factors) = &all[0];
                assert!(all.iter().all(|(out, _)| out == plain));
                for (i, product) in plain.iter().enumerate() {
                    let (b, row) = (i / outputs.1, outputs.0 + i % outputs.1);
                    let pairs = unpacked(&packed, columns, row);
                    let pairs = pairs.iter().zip(&x[b * columns..]);
                    let exact: f64 = pairs.map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                    let error = (f64::from(product * factors[b]) - exact).abs() / (columns as f64).sqrt();
                    assert!(error < 1e-3, "{columns} columns, {batch} tokens, output {row}: off by {error}");
                }
            }
        }
    }

    #[test]
    fn the_largest_integers_do_not_overflow() {
        for (byte, weight) in [(0, -8.0), (0xff, 7.0)] {
            let mut packed = vec![byte; packed_len(16, 64)];
            for scale in packed[..64].chunks_exact_mut(2) {
                scale.copy_from_slice(&to_bf16(1.0).to_ne_bytes());
            }
            for x in [1.0, -1.0] {
                for (out, factor) in on_every_processor(&packed, &[x; 64], 64, (0, 16)) {
                    assert_eq!(out.len(), 16);
                    assert!(out.iter().all(|out| (out * factor[0] / (64.0 * weight * x) - 1.0).abs() < 1e-5));
                }
            }
        }
    }

    #[test]
    fn weights_are_rounded_to_the_nearest_of_sixteen() {
        for weights in [&numbers(32, 5)[..], &numbers(7, 6), &[0.0; 32], &[1e-30; 32], &[-3.0], &[3.0, -3.0]] {
            let mut packed = vec![0; packed_len(1, weights.len())];
            pack(weights, weights.len(), &mut packed);
            let most = largest(weights);
            for (w, read) in weights.iter().zip(unpacked(&packed, weights.len(), 0)) {
                assert!((w - read).abs() <= most / 14.0 + most * 0.05, "{w} became {read}");
            }
        }
        let mut packed = vec![0; packed_len(1, 64)];
        pack(&[&[f32::INFINITY], &[1.0; 63][..]].concat(), 64, &mut packed);
        let read = unpacked(&packed, 64, 0);
        assert!(read[..32].iter().all(|w| w.is_nan()) && read[32..].iter().all(|&w| (w - 1.0).abs() < 0.005));
    }
}
