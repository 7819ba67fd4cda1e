//! Products of weights with the activations of a few tokens, one dot product per output.
//!
//! A token multiplies with every weight once, so what counts is that weights are read at the speed of the memory. Rows
//! of the matrix are read from their first column to their last, and while a part of some rows is in registers it is
//! multiplied with all tokens' activations. [`Dot`] is what a processor must know for one format of the weights:
//! `portable` here is plain Rust, `x86` has AVX2 and AVX-512.
//!
//! An output is summed in one order, whatever number of tokens there is: what a token gets does not depend on the
//! others that are decoded with it.

use super::four::{Four, PlainNibbles};

/// Adding 1.5 · 2^23 leaves a float32 no digits behind the point: rounds to the nearest integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;
const INFINITE: u32 = 0x7f80_0000;

/// Dot products for one format of the weights on one kind of processor.
pub trait Dot {
    /// A weight as it is kept: float32, the upper half of one (bfloat16), or an 8-bit integer.
    type Weight: Copy;
    /// An activation as `prepare` makes it.
    type Input: Copy;
    /// `STEP` weights in registers.
    type Weights: Copy;
    /// Numbers: all bits 0 are zero.
    type Sum: Copy;
    /// Columns that are multiplied at once.
    const STEP: usize;
    /// There are 32 registers, enough for the sums of 4 rows times 4 tokens.
    const MANY: bool;

    /// Brings activations into the form for `add`; returns a factor that belongs to the product.
    fn prepare(row: &[f32], out: &mut [Self::Input]) -> f32;
    #[inline(always)]
    fn zero() -> Self::Sum {
        // SAFETY: see `Sum`.
        unsafe { std::mem::zeroed() }
    }
    /// Asks for the memory at an address, if the processor can be asked.
    #[inline(always)]
    fn prefetch(_at: *const Self::Weight) {}
    /// # Safety
    /// `STEP` weights can be read at `at`, and the processor has the instructions of this implementation.
    unsafe fn load(at: *const Self::Weight) -> Self::Weights;
    /// # Safety
    /// As `load`, for inputs.
    unsafe fn add(sum: Self::Sum, weights: Self::Weights, inputs: *const Self::Input) -> Self::Sum;
    /// # Safety
    /// The processor has the instructions of this implementation.
    unsafe fn total(sum: Self::Sum) -> f32;
    /// The product of one of the last columns, those behind the last whole `STEP`.
    fn single(weight: Self::Weight, input: Self::Input) -> f32;
}

/// A matrix times the activations of a few tokens, both in a form of its own: rows one after another for every [`Dot`].
pub trait Product {
    /// An activation, or a part of one, as `prepare` makes it.
    type Input: Copy;

    /// Inputs from one token to the next.
    fn stride(columns: usize) -> usize;
    /// Brings a token's activations into the form for `run`; returns a factor that belongs to its products.
    fn prepare(row: &[f32], out: &mut [Self::Input]) -> f32;
    /// Writes the products of `outputs`, (first, count), with each of `batch` tokens, the first one's at `out`.
    ///
    /// # Safety
    /// The processor has the instructions, the matrix has `columns` and these outputs, `inputs` holds the tokens and
    /// has memory for 16 more, and `out` has room.
    unsafe fn run(
        weights: *const u8,
        columns: usize,
        outputs: (usize, usize),
        inputs: *const Self::Input,
        batch: usize,
        out: Out,
    );
}

impl<D: Dot> Product for D {
    type Input = D::Input;

    #[inline(always)]
    fn stride(columns: usize) -> usize {
        columns
    }
    #[inline(always)]
    fn prepare(row: &[f32], out: &mut [D::Input]) -> f32 {
        <D as Dot>::prepare(row, out)
    }
    #[inline(always)]
    unsafe fn run(
        weights: *const u8,
        columns: usize,
        (first, count): (usize, usize),
        inputs: *const D::Input,
        batch: usize,
        out: Out,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            let weights = (weights as *const D::Weight).add(first * columns);
            multiply::<D>(weights, columns, columns, count, inputs, batch, out);
        }
    }
}

/// The formats on one kind of processor.
pub trait Processor {
    type F32: Dot<Weight = f32>;
    type Bf16: Product;
    type Int8: Product;
    type Int4: Product;
    /// For keys and values in bfloat16.
    type Cached: Dot<Weight = u16>;
}

/// R rows times B tokens.
///
/// # Safety
/// See `multiply`.
#[inline(always)]
unsafe fn tile<D: Dot, const R: usize, const B: usize>(
    weights: *const D::Weight,
    stride: usize,
    columns: usize,
    inputs: *const D::Input,
) -> [[f32; B]; R] {
    let mut sums = [[D::zero(); B]; R];
    let whole = columns - columns % D::STEP;
    let mut column = 0;
    // SAFETY (of all blocks here): every index is below R rows, B tokens and `columns`, as the caller promises.
    while column < whole {
        for (r, sums) in sums.iter_mut().enumerate() {
            // The rows of the next tile are on their way while these are multiplied. Beyond the last one it is a hint
            // that comes to nothing.
            D::prefetch(weights.wrapping_add((R + r) * stride + column));
            let part = unsafe { D::load(weights.add(r * stride + column)) };
            for (b, sum) in sums.iter_mut().enumerate() {
                *sum = unsafe { D::add(*sum, part, inputs.add(b * columns + column)) };
            }
        }
        column += D::STEP;
    }
    // A loop of its own, that compilers unroll: only then are the sums in registers.
    let mut totals = [[0.0; B]; R];
    for r in 0..R {
        for b in 0..B {
            totals[r][b] = unsafe { D::total(sums[r][b]) };
        }
    }
    for column in whole..columns {
        for (r, totals) in totals.iter_mut().enumerate() {
            for (b, total) in totals.iter_mut().enumerate() {
                let (w, x) = unsafe { (*weights.add(r * stride + column), *inputs.add(b * columns + column)) };
                *total += D::single(w, x);
            }
        }
    }
    totals
}

/// Where the products of a row begin: `at[token * tokens + row]`.
#[derive(Clone, Copy)]
pub struct Out {
    pub at: *mut f32,
    /// From one token to the next.
    pub tokens: usize,
}

/// R rows times all tokens.
///
/// # Safety
/// See `multiply`.
#[inline(always)]
unsafe fn block<D: Dot, const R: usize>(
    weights: *const D::Weight,
    stride: usize,
    columns: usize,
    inputs: *const D::Input,
    batch: usize,
    out: Out,
) {
    let mut first = 0;
    macro_rules! tokens {
        ($b:literal) => {{
            // SAFETY: as the caller promises.
            unsafe {
                let totals = tile::<D, R, $b>(weights, stride, columns, inputs.add(first * columns));
                for b in 0..$b {
                    for r in 0..R {
                        *out.at.add((first + b) * out.tokens + r) = totals[r][b];
                    }
                }
            }
            first += $b;
        }};
    }
    // Sums for which there are registers, beside those for weights and inputs.
    let most = if D::MANY { 16 } else { 8 };
    while first < batch {
        match batch - first {
            n if n >= 8 && R * 8 <= most => tokens!(8),
            n if n >= 4 && R * 4 <= most => tokens!(4),
            n if n >= 2 => tokens!(2),
            _ => tokens!(1),
        }
    }
}

/// Writes the products of each of `rows` with each of `batch` tokens.
///
/// # Safety
/// The processor has the instructions of D. Rows of `columns` weights begin every `stride` weights from `weights` on,
/// and can be read up to `rows`; `inputs` holds `batch` times `columns` inputs; `out` has room for all.
#[inline(always)]
pub unsafe fn multiply<D: Dot>(
    weights: *const D::Weight,
    stride: usize,
    columns: usize,
    rows: usize,
    inputs: *const D::Input,
    batch: usize,
    out: Out,
) {
    let mut row = 0;
    macro_rules! rows {
        ($r:literal) => {{
            // SAFETY: as the caller promises.
            unsafe {
                let out = Out { at: out.at.add(row), tokens: out.tokens };
                block::<D, $r>(weights.add(row * stride), stride, columns, inputs, batch, out);
            }
            row += $r;
        }};
    }
    // The more tokens, the fewer rows: each weight and each input is read once for several products.
    let together = (if D::MANY { 16 } else { 8 } / batch.max(1)).max(1);
    while row < rows {
        match (rows - row).min(together) {
            1 => rows!(1),
            2 | 3 => rows!(2),
            _ => rows!(4),
        }
    }
}

/// The largest magnitude; NaN if any of them is not finite.
#[inline(always)]
pub fn largest(row: &[f32]) -> f32 {
    // The bits of floats without their sign are in the order of the numbers, NaN above infinity.
    let bits = row.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    if bits < INFINITE {
        f32::from_bits(bits)
    } else {
        f32::NAN
    }
}

/// The nearest integer to |x| < 2^22, as the lowest bits of the result.
#[inline(always)]
pub fn round(x: f32) -> u32 {
    (x + ROUNDER).to_bits()
}

/// The nearest integer to |x| < 2^22.
#[inline(always)]
pub fn nearest(x: f32) -> f32 {
    (x + ROUNDER) - ROUNDER
}

/// float32 to bfloat16, the nearest, ties to even.
#[inline(always)]
pub fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // The carry must not turn a NaN into infinity.
    (if bits & 0x7fff_ffff > INFINITE { bits >> 16 | 0x40 } else { rounded }) as u16
}

#[inline(always)]
pub fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Activations as 16-bit integers, with one factor for all of them; NaN as the factor if one is not finite.
///
/// Integers are summed in 32 bits, in `lanes` sums at least. They are as large as these can hold: 15 bits up to about
/// 4,000 columns, 14 up to 8,000. bfloat16 has 8.
#[inline(always)]
pub fn prepare_int16(row: &[f32], out: &mut [i16], lanes: usize) -> f32 {
    let most = (i32::MAX as usize / 127 * lanes / (row.len() + 2 * lanes)).min(32_767) as f32;
    let (factor, inverse) = integer_factor(row, most);
    for (out, x) in out.iter_mut().zip(row) {
        *out = round(x * inverse) as i16;
    }
    factor
}

/// What activations as integers up to `most` count, NaN if one of them is not finite; and by what to multiply them.
#[inline(always)]
pub fn integer_factor(row: &[f32], most: f32) -> (f32, f32) {
    let largest = largest(row);
    let factor = largest.max(f32::MIN_POSITIVE * 1e5) / most;
    (if largest.is_nan() { f32::NAN } else { factor }, 1.0 / factor)
}

/// An 8-bit row of weights and its scale: the largest becomes ±127.
pub fn quantize(row: &[f32], out: &mut [i8]) -> f32 {
    let largest = largest(row);
    let scale = largest.max(1e-12) / 127.0;
    for (out, w) in out.iter_mut().zip(row) {
        *out = round(w / scale) as i8;
    }
    if largest.is_nan() {
        f32::NAN
    } else {
        scale
    }
}

/// Plain Rust, which compilers turn into the vector instructions that every processor of its kind has.
pub struct Portable;

const LANES: usize = 8;

pub struct PlainF32;
pub struct PlainBf16;
pub struct PlainInt8;

impl Processor for Portable {
    type F32 = PlainF32;
    type Bf16 = PlainBf16;
    type Int8 = PlainInt8;
    type Int4 = Four<PlainNibbles>;
    type Cached = PlainBf16;
}

/// sum + a · b: one instruction where every processor has it, and never a call of a library.
#[inline(always)]
pub fn fused(a: f32, b: f32, sum: f32) -> f32 {
    if cfg!(target_arch = "aarch64") {
        a.mul_add(b, sum)
    } else {
        a * b + sum
    }
}

#[inline(always)]
fn lanes_total(sum: [f32; LANES]) -> f32 {
    ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]))
}

macro_rules! plain_float {
    ($name:ident, $weight:ty, $widen:expr) => {
        impl Dot for $name {
            type Weight = $weight;
            type Input = f32;
            type Weights = [f32; LANES];
            type Sum = [f32; LANES];
            const STEP: usize = LANES;
            const MANY: bool = cfg!(target_arch = "aarch64");

            #[inline(always)]
            fn prepare(row: &[f32], out: &mut [f32]) -> f32 {
                out.copy_from_slice(row);
                1.0
            }
            #[inline(always)]
            unsafe fn load(at: *const $weight) -> Self::Weights {
                // SAFETY: as the caller promises; an array may lie at any multiple of its element.
                unsafe { *(at as *const [$weight; LANES]) }.map($widen)
            }
            #[inline(always)]
            unsafe fn add(mut sum: Self::Sum, weights: Self::Weights, inputs: *const f32) -> Self::Sum {
                // SAFETY: as the caller promises.
                let inputs = unsafe { *(inputs as *const [f32; LANES]) };
                for i in 0..LANES {
                    sum[i] = fused(weights[i], inputs[i], sum[i]);
                }
                sum
            }
            #[inline(always)]
            unsafe fn total(sum: Self::Sum) -> f32 {
                lanes_total(sum)
            }
            #[inline(always)]
            fn single(weight: $weight, input: f32) -> f32 {
                $widen(weight) * input
            }
        }
    };
}

plain_float!(PlainF32, f32, |w| w);
plain_float!(PlainBf16, u16, from_bf16);

impl Dot for PlainInt8 {
    type Weight = i8;
    type Input = i16;
    type Weights = [i16; LANES];
    type Sum = [i32; LANES];
    const STEP: usize = LANES;
    const MANY: bool = cfg!(target_arch = "aarch64");

    #[inline(always)]
    fn prepare(row: &[f32], out: &mut [i16]) -> f32 {
        prepare_int16(row, out, LANES)
    }
    #[inline(always)]
    unsafe fn load(at: *const i8) -> Self::Weights {
        // SAFETY: as the caller promises; bytes lie anywhere.
        unsafe { *(at as *const [i8; LANES]) }.map(i16::from)
    }
    #[inline(always)]
    unsafe fn add(mut sum: Self::Sum, weights: Self::Weights, inputs: *const i16) -> Self::Sum {
        // SAFETY: as the caller promises.
        let inputs = unsafe { *(inputs as *const [i16; LANES]) };
        for i in 0..LANES {
            sum[i] += i32::from(weights[i]) * i32::from(inputs[i]);
        }
        sum
    }
    #[inline(always)]
    unsafe fn total(sum: Self::Sum) -> f32 {
        lanes_total(sum.map(|lane| lane as f32)) // as floats: together they may exceed 32 bits
    }
    #[inline(always)]
    fn single(weight: i8, input: i16) -> f32 {
        (i32::from(weight) * i32::from(input)) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between -1 and 1 that look random.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(747_796_405) | 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// How the weights of a test are arranged: rows of some bytes each, to what a `Product` wants.
    type Arrange = fn(&[u8], usize) -> Vec<u8>;

    /// The products of `rows` with `batch` tokens, a part of them too, and their difference from those in double precision.
    fn check<D: Product, W: Copy>(keep: impl Fn(f32) -> W, read: impl Fn(W) -> f32, arrange: Arrange, tolerance: f64)
    where
        D::Input: Default,
    {
        let shapes = [(1, 1, 0), (3, 2, 1), (4, 8, 0), (9, 5, 2), (6, 13, 0), (70, 17, 33), (150, 9, 0)];
        for columns in [1, 7, 8, 31, 32, 64, 100, 515] {
            for (rows, batch, first) in shapes {
                let weights: Vec<_> = numbers(rows * columns, 1).into_iter().map(&keep).collect();
                let bytes = std::mem::size_of::<W>();
                // SAFETY: plain numbers.
                let raw = unsafe { std::slice::from_raw_parts(weights.as_ptr() as *const u8, weights.len() * bytes) };
                let kept = arrange(raw, columns * bytes);
                let (tokens, stride) = (numbers(batch * columns, 2), D::stride(columns));
                let mut inputs = vec![D::Input::default(); (batch + 16) * stride];
                let pairs = tokens.chunks(columns).zip(inputs.chunks_mut(stride));
                let factors: Vec<f32> = pairs.map(|(row, out)| D::prepare(row, out)).collect();
                let count = rows - first - first.min(1); // not up to the last one either
                let mut out = vec![f32::NAN; count * batch];
                let to = Out { at: out.as_mut_ptr(), tokens: count };
                // SAFETY: the buffers have these sizes; callers ask for instructions that there are.
                unsafe { D::run(kept.as_ptr(), columns, (first, count), inputs.as_ptr(), batch, to) };
                for (i, total) in out.iter().enumerate() {
                    let (b, r) = (i / count, first + i % count);
                    let row = weights[r * columns..][..columns].iter();
                    let pairs = row.zip(&tokens[b * columns..][..columns]);
                    let exact: f64 = pairs.map(|(&w, &x)| f64::from(read(w)) * f64::from(x)).sum();
                    let error = (f64::from(total * factors[b]) - exact).abs() / (columns as f64).sqrt();
                    assert!(error < tolerance, "{rows}x{columns}, {batch} tokens: off by {error}");
                }
            }
        }
    }

    fn check_all<P: Processor>(arrange: Arrange, bf16_tolerance: f64)
    where
        <P::F32 as Product>::Input: Default,
        <P::Bf16 as Product>::Input: Default,
        <P::Int8 as Product>::Input: Default,
    {
        let plain: Arrange = |weights, _| weights.to_vec();
        check::<P::F32, f32>(|w| w, |w| w, plain, 1e-6);
        check::<P::Bf16, u16>(to_bf16, from_bf16, arrange, bf16_tolerance);
        check::<P::Int8, i8>(|w| (w * 127.0) as i8, f32::from, arrange, 1e-2);
    }

    #[test]
    fn every_processor_multiplies_alike() {
        let plain: Arrange = |weights, _| weights.to_vec();
        check_all::<Portable>(plain, 1e-6);
        #[cfg(target_arch = "x86_64")]
        {
            use crate::decode::{x86, Level};
            let available = Level::available();
            if available.contains(&Level::Avx2) {
                check_all::<x86::Avx2>(plain, 1e-6);
            }
            #[cfg(avx512)]
            if available.contains(&Level::Avx512) {
                check_all::<x86::avx512::Avx512>(plain, 4e-3); // activations are rounded too
            }
            #[cfg(all(target_os = "linux", avx512))]
            if available.contains(&Level::Amx) {
                use crate::decode::amx;
                let tiles: Arrange = |weights, bytes| {
                    let mut out = vec![0; amx::packed_len(weights.len() / bytes, bytes)];
                    amx::pack(weights, bytes, &mut out);
                    out
                };
                check_all::<amx::Amx>(tiles, 4e-3);
            }
        }
    }

    #[test]
    fn the_largest_integers_do_not_overflow() {
        for columns in [64, 4096, 65_536] {
            let row = vec![3.0; columns];
            let mut inputs = vec![0; columns];
            let factor = <PlainInt8 as Dot>::prepare(&row, &mut inputs);
            let weights = vec![127; columns];
            let mut total = 0.0;
            let out = Out { at: &mut total, tokens: 1 };
            // SAFETY: the buffers have these sizes.
            unsafe { multiply::<PlainInt8>(weights.as_ptr(), columns, columns, 1, inputs.as_ptr(), 1, out) };
            let exact = 3.0 * 127.0 * columns as f32;
            assert!((total * factor / exact - 1.0).abs() < 1e-3, "{columns}: {} instead of {exact}", total * factor);
        }
    }

    #[test]
    fn narrow_numbers_are_rounded_to_the_nearest() {
        assert_eq!([1.0, -2.5, 1.003_9, 1.003_91].map(|x| from_bf16(to_bf16(x))), [1.0, -2.5, 1.0, 1.007_812_5]);
        assert!(from_bf16(to_bf16(f32::from_bits(0x7f80_0001))).is_nan());
        assert_eq!(from_bf16(to_bf16(f32::INFINITY)), f32::INFINITY);
        let mut out = [0; 4];
        assert_eq!(quantize(&[1.27, -0.635, 0.005, -1.27], &mut out), 0.01);
        assert_eq!(out, [127, -64, 0, -127]);
        assert!(quantize(&[1.0, f32::NAN], &mut out).is_nan());
        assert!(largest(&[1.0, f32::INFINITY]).is_nan());
        assert_eq!(largest(&[1.0, -3.0]), 3.0);
    }
}
