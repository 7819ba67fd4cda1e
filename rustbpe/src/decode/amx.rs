//! Products of bfloat16 and 8-bit weights in AMX (Intel since Sapphire Rapids): a tile of weights times all tokens.
//!
//! A tile is a register of 16 rows of 64 bytes. `tdpbssd` and `tdpbf16ps` add to C, (tokens, 16 outputs), the product
//! of A, (tokens, 64 bytes of columns), with B, the weights of 16 outputs for these columns. It takes as many cycles as
//! A has rows, for up to 16 times 16 times 64 products; an instruction of AVX-512 has 32. So a few tokens cost hardly
//! more than reading the weights does. In return these lie as B wants them ([`pack`]): blocks of 16 outputs, in which
//! one tile follows the other; in a tile 4 bytes of the first output, 4 of the second and so on, 16 times.
//!
//! Rust has no stable functions for these instructions, but its assembler knows them. Every output is summed in one
//! order: what a token gets does not depend on the others that are decoded with it.

use std::arch::asm;
use std::arch::x86_64::*;
use std::os::raw::c_long;
use std::sync::OnceLock;

use super::dot::{integer_factor, round, to_bf16, Out, Processor, Product};
use super::four::Four;
use super::x86::avx512::{Avx512Bf16, Avx512F32, Avx512Nibbles};

/// Outputs of a tile, and rows of any: the most tokens, where a token is one row.
const ROWS: usize = 16;
/// Bytes of a row, and of a whole tile.
const LINE: usize = 64;
const TILE: usize = ROWS * LINE;

pub struct Amx;
/// Activations are rounded to bfloat16, sums are in float32.
pub struct AmxBf16;
/// Activations are 16-bit integers, in two rows: x = 256 · upper + lower. So sums of integers are exact.
pub struct AmxInt8;

impl Processor for Amx {
    type F32 = Avx512F32;
    type Bf16 = AmxBf16;
    type Int8 = AmxInt8;
    type Int4 = Four<Avx512Nibbles>;
    type Cached = Avx512Bf16;
}

/// Whether the processor has tiles and the system lets this process use them: Linux wants to be asked, since a thread
/// with tiles has 8 KB more to save.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        extern "C" {
            fn syscall(number: c_long, ...) -> c_long;
        }
        const ARCH_PRCTL: c_long = 158;
        const ARCH_REQ_XCOMP_PERM: c_long = 0x1023;
        const XTILEDATA: c_long = 18;
        const BF16_TILE_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        // Leaf 0 says how many leaves there are; of leaf 7 EDX has these bits.
        #[allow(unused_unsafe)] // safe functions in newer Rust
        // SAFETY: every x86-64 processor has CPUID.
        let has = unsafe { __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BF16_TILE_INT8 == BF16_TILE_INT8 };
        // SAFETY: it asks for a permission; older kernels answer with an error.
        has && unsafe { syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) } == 0
    })
}

/// Bytes of a row of weights in tiles, a whole number of lines.
fn padded(bytes: usize) -> usize {
    (bytes + LINE - 1) / LINE * LINE
}

/// Bytes that `pack` needs for some rows of `bytes` each.
pub fn packed_len(rows: usize, bytes: usize) -> usize {
    (rows + ROWS - 1) / ROWS * ROWS * padded(bytes)
}

/// Brings weights, rows of `bytes` each, into the order of tiles. `out` holds zeros, `packed_len` of them.
pub fn pack(weights: &[u8], bytes: usize, out: &mut [u8]) {
    for (row, weights) in weights.chunks_exact(bytes).enumerate() {
        let block = &mut out[row / ROWS * ROWS * padded(bytes)..];
        for (group, four) in weights.chunks(4).enumerate() {
            let at = group / ROWS * TILE + group % ROWS * LINE + row % ROWS * 4;
            block[at..at + four.len()].copy_from_slice(four);
        }
    }
}

/// The shapes of the 8 tiles, as the processor wants to be told: C is 0 to 3, A is 4, and B the rest.
#[repr(C, align(64))]
pub(crate) struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// For this many rows of A.
    pub(crate) fn new(a: usize) -> Self {
        let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        shapes.row_bytes[..8].fill(LINE as u16);
        shapes.rows[..8].fill(ROWS as u8);
        shapes.rows[..5].fill(a as u8);
        shapes
    }
}

/// Asks for all lines of the tile of a block after the next.
macro_rules! prefetch {
    ($block:ident) => {
        prefetch!($block 0 64 128 192 256 320 384 448 512 576 640 704 768 832 896 960)
    };
    ($block:ident $($byte:literal)+) => {
        concat!($("prefetcht0 [{", stringify!($block), "} + 2048 + ", $byte, "]\n"),+)
    };
}

/// One to four tiles C from as many blocks of weights: a function with these arguments for each instruction.
macro_rules! tiles {
    ($name:ident, $product:literal, $($c:literal $b:literal $block:ident $index:literal)+) => {
        /// # Safety
        /// The tiles have shapes; `steps` tiles can be read from each block and as many lines from A's rows, which are
        /// `stride` bytes apart; there is room for the tiles C.
        #[inline(always)]
        unsafe fn $name(weights: *const u8, a: *const u8, stride: usize, steps: usize, c: *mut u8) {
            // SAFETY: as the caller promises.
            unsafe {
                asm!(
                    $(concat!("tilezero tmm", $c),)+
                    "2:",
                    "tileloadd tmm4, [{a} + {stride}*1]",
                    "add {a}, 64",
                    $(
                        concat!("tileloadd tmm", $b, ", [{", stringify!($block), "} + {line}*1]"),
                        concat!($product, " tmm", $c, ", tmm4, tmm", $b),
                        prefetch!($block),
                        concat!("add {", stringify!($block), "}, 1024"),
                    )+
                    "dec {steps}",
                    "jnz 2b",
                    $(
                        concat!("tilestored [{c} + {line}*1], tmm", $c),
                        "add {c}, 1024",
                    )+
                    $($block = inout(reg) weights.add($index * steps * TILE) => _,)+
                    a = inout(reg) a => _, stride = in(reg) stride, line = in(reg) LINE,
                    steps = inout(reg) steps => _, c = inout(reg) c => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                );
            }
        }
    };
}

tiles!(int8_4, "tdpbssd", 0 5 w0 0 1 6 w1 1 2 7 w2 2 3 5 w3 3);
tiles!(int8_2, "tdpbssd", 0 5 w0 0 1 6 w1 1);
tiles!(int8_1, "tdpbssd", 0 5 w0 0);
tiles!(bf16_4, "tdpbf16ps", 0 5 w0 0 1 6 w1 1 2 7 w2 2 3 5 w3 3);
tiles!(bf16_2, "tdpbf16ps", 0 5 w0 0 1 6 w1 1);
tiles!(bf16_1, "tdpbf16ps", 0 5 w0 0);

/// A format of weights in tiles.
trait Tiled {
    /// Bytes of a weight.
    const BYTES: usize;
    /// Rows of A that a token has.
    const TOKEN_ROWS: usize;

    /// 1, 2 or 4 tiles C.
    ///
    /// # Safety
    /// See `tiles`.
    unsafe fn tiles(count: usize, weights: *const u8, a: *const u8, stride: usize, steps: usize, c: *mut u8);

    /// The products of 16 outputs with one token.
    ///
    /// # Safety
    /// A token's rows of C can be read.
    unsafe fn total(c: *const u8) -> __m512;
}

/// Bytes from one row of A to the next: a line more than its columns, so that 16 rows do not share a set of the cache.
fn row_bytes<T: Tiled>(columns: usize) -> usize {
    padded(columns * T::BYTES) + LINE
}

/// The products of outputs `first..first + count` with some tokens.
///
/// # Safety
/// See `Product::run`.
#[inline(always)]
unsafe fn run<T: Tiled>(
    weights: *const u8,
    columns: usize,
    (first, count): (usize, usize),
    inputs: *const u8,
    batch: usize,
    out: Out,
) {
    #[repr(align(64))]
    struct Results(#[allow(dead_code)] [u8; 4 * TILE]);
    let (block, stride) = (ROWS * padded(columns * T::BYTES), row_bytes::<T>(columns));
    let end = first + count;
    // Groups of the same size: the last one may have a token too much, for which there is memory.
    let groups = (batch * T::TOKEN_ROWS + ROWS - 1) / ROWS;
    let group = (batch + groups - 1) / groups;
    let shapes = Shapes::new(group * T::TOKEN_ROWS);
    let mut results = std::mem::MaybeUninit::<Results>::uninit();
    let results = results.as_mut_ptr() as *mut u8;
    // SAFETY: the sizes are those that the caller promises; lanes beyond the wanted outputs are not written.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly));
        let mut at = first / ROWS;
        while at * ROWS < end {
            let left = (end - at * ROWS + ROWS - 1) / ROWS;
            let together = match left {
                1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
            for token in (0..batch).step_by(group) {
                let a = inputs.add(token * T::TOKEN_ROWS * stride);
                T::tiles(together, weights.add(at * block), a, stride, block / TILE, results);
                for r in 0..together {
                    let output = (at + r) * ROWS;
                    let from = first.saturating_sub(output).min(ROWS);
                    let to = (end - output).min(ROWS);
                    let lanes = ((1u32 << to) - (1u32 << from)) as __mmask16;
                    for b in token..(token + group).min(batch) {
                        let c = results.add(r * TILE + (b - token) * T::TOKEN_ROWS * LINE);
                        let to = out.at.wrapping_add(b * out.tokens + output).wrapping_sub(first);
                        _mm512_mask_storeu_ps(to, lanes, T::total(c));
                    }
                }
            }
            at += together;
        }
        // Other users of tiles find none in use.
        asm!("tilerelease", options(nostack, nomem));
    }
}

impl Tiled for AmxBf16 {
    const BYTES: usize = 2;
    const TOKEN_ROWS: usize = 1;

    #[inline(always)]
    unsafe fn tiles(count: usize, weights: *const u8, a: *const u8, stride: usize, steps: usize, c: *mut u8) {
        // SAFETY: as the caller promises.
        unsafe {
            match count {
                4 => bf16_4(weights, a, stride, steps, c),
                2 => bf16_2(weights, a, stride, steps, c),
                _ => bf16_1(weights, a, stride, steps, c),
            }
        }
    }
    #[inline(always)]
    unsafe fn total(c: *const u8) -> __m512 {
        // SAFETY: as the caller promises.
        unsafe { _mm512_loadu_ps(c as *const f32) }
    }
}

impl Tiled for AmxInt8 {
    const BYTES: usize = 1;
    const TOKEN_ROWS: usize = 2;

    #[inline(always)]
    unsafe fn tiles(count: usize, weights: *const u8, a: *const u8, stride: usize, steps: usize, c: *mut u8) {
        // SAFETY: as the caller promises.
        unsafe {
            match count {
                4 => int8_4(weights, a, stride, steps, c),
                2 => int8_2(weights, a, stride, steps, c),
                _ => int8_1(weights, a, stride, steps, c),
            }
        }
    }
    #[inline(always)]
    unsafe fn total(c: *const u8) -> __m512 {
        // SAFETY: as the caller promises.
        unsafe {
            let upper = _mm512_cvtepi32_ps(_mm512_loadu_si512(c as *const __m512i));
            let lower = _mm512_cvtepi32_ps(_mm512_loadu_si512(c.add(LINE) as *const __m512i));
            _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0), lower)
        }
    }
}

impl Product for AmxBf16 {
    type Input = u16;

    fn stride(columns: usize) -> usize {
        row_bytes::<Self>(columns) / 2
    }
    #[inline(always)]
    fn prepare(row: &[f32], out: &mut [u16]) -> f32 {
        let (out, rest) = out.split_at_mut(row.len());
        for (out, &x) in out.iter_mut().zip(row) {
            *out = to_bf16(x);
        }
        rest.fill(0); // what stands there multiplies with weights of 0, and might be NaN
        1.0
    }
    #[inline(always)]
    unsafe fn run(
        weights: *const u8,
        columns: usize,
        outputs: (usize, usize),
        inputs: *const u16,
        batch: usize,
        out: Out,
    ) {
        // SAFETY: as the caller promises.
        unsafe { run::<Self>(weights, columns, outputs, inputs as *const u8, batch, out) }
    }
}

impl Product for AmxInt8 {
    type Input = i8;

    fn stride(columns: usize) -> usize {
        2 * row_bytes::<Self>(columns)
    }
    #[inline(always)]
    fn prepare(row: &[f32], out: &mut [i8]) -> f32 {
        let (upper, lower) = out.split_at_mut(row_bytes::<Self>(row.len()));
        // 127 · 256 + 127: the largest whose parts have 8 bits each.
        let (factor, inverse) = integer_factor(row, 32_639.0);
        for ((upper, lower), x) in upper.iter_mut().zip(lower).zip(row) {
            let x = round(x * inverse) as i16;
            (*upper, *lower) = ((x.wrapping_add(128) >> 8) as i8, x as i8);
        }
        factor
    }
    #[inline(always)]
    unsafe fn run(
        weights: *const u8,
        columns: usize,
        outputs: (usize, usize),
        inputs: *const i8,
        batch: usize,
        out: Out,
    ) {
        // SAFETY: as the caller promises.
        unsafe { run::<Self>(weights, columns, outputs, inputs as *const u8, batch, out) }
    }
}
