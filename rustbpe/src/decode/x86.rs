//! The products of `dot` in AVX2 (x86 processors since 2013) and AVX-512 with its instructions for bfloat16 and 8 bits
//! (Intel since Sapphire Rapids, AMD since Zen 4).

use std::arch::x86_64::*;

use super::dot::{from_bf16, prepare_int16, Dot, Processor};
use super::four::{Four, Nibbles};

/// AVX2 and FMA.
pub struct Avx2;
pub struct Avx2F32;
pub struct Avx2Bf16;
pub struct Avx2Int8;
pub struct Avx2Nibbles;

impl Processor for Avx2 {
    type F32 = Avx2F32;
    type Bf16 = Avx2Bf16;
    type Int8 = Avx2Int8;
    type Int4 = Four<Avx2Nibbles>;
    type Cached = Avx2Bf16;
}

// SAFETY (of all blocks here): callers of `Dot` promise readable memory and a processor with these instructions.

#[inline(always)]
fn prefetch<T>(at: *const T) {
    // SAFETY: a hint, which no address makes fail.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at as *const i8) }
}

/// The sum of 8 lanes.
#[inline(always)]
unsafe fn total_256(sum: __m256) -> f32 {
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

impl Dot for Avx2F32 {
    type Weight = f32;
    type Input = f32;
    type Weights = __m256;
    type Sum = __m256;
    const STEP: usize = 8;
    const MANY: bool = false;

    #[inline(always)]
    fn prepare(row: &[f32], out: &mut [f32]) -> f32 {
        out.copy_from_slice(row);
        1.0
    }
    #[inline(always)]
    fn prefetch(at: *const Self::Weight) {
        prefetch(at);
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn add(sum: __m256, weights: __m256, inputs: *const f32) -> __m256 {
        unsafe { _mm256_fmadd_ps(weights, _mm256_loadu_ps(inputs), sum) }
    }
    #[inline(always)]
    unsafe fn total(sum: __m256) -> f32 {
        unsafe { total_256(sum) }
    }
    #[inline(always)]
    fn single(weight: f32, input: f32) -> f32 {
        weight * input
    }
}

/// A bfloat16 is the upper half of a float32. Of each pair the second one is in its place already, beside digits to
/// clear, and the first one has to move there; so inputs are prepared as 8 of the first and 8 of the second.
impl Dot for Avx2Bf16 {
    type Weight = u16;
    type Input = f32;
    type Weights = (__m256, __m256);
    type Sum = __m256;
    const STEP: usize = 16;
    const MANY: bool = false;

    #[inline(always)]
    fn prepare(row: &[f32], out: &mut [f32]) -> f32 {
        let whole = row.len() - row.len() % 16;
        for (out, row) in out[..whole].chunks_exact_mut(16).zip(row.chunks_exact(16)) {
            for i in 0..8 {
                (out[i], out[8 + i]) = (row[2 * i], row[2 * i + 1]);
            }
        }
        out[whole..].copy_from_slice(&row[whole..]);
        1.0
    }
    #[inline(always)]
    fn prefetch(at: *const Self::Weight) {
        prefetch(at);
    }
    #[inline(always)]
    unsafe fn load(at: *const u16) -> (__m256, __m256) {
        unsafe {
            let pairs = _mm256_loadu_si256(at as *const __m256i);
            let second = _mm256_and_si256(pairs, _mm256_set1_epi32(-65536));
            (_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(second))
        }
    }
    #[inline(always)]
    unsafe fn add(sum: __m256, weights: (__m256, __m256), inputs: *const f32) -> __m256 {
        unsafe {
            let sum = _mm256_fmadd_ps(weights.0, _mm256_loadu_ps(inputs), sum);
            _mm256_fmadd_ps(weights.1, _mm256_loadu_ps(inputs.add(8)), sum)
        }
    }
    #[inline(always)]
    unsafe fn total(sum: __m256) -> f32 {
        unsafe { total_256(sum) }
    }
    #[inline(always)]
    fn single(weight: u16, input: f32) -> f32 {
        from_bf16(weight) * input
    }
}

impl Dot for Avx2Int8 {
    type Weight = i8;
    type Input = i16;
    type Weights = __m256i;
    type Sum = __m256i;
    const STEP: usize = 16;
    const MANY: bool = false;

    #[inline(always)]
    fn prepare(row: &[f32], out: &mut [i16]) -> f32 {
        prepare_int16(row, out, 8)
    }
    #[inline(always)]
    fn prefetch(at: *const Self::Weight) {
        prefetch(at);
    }
    #[inline(always)]
    unsafe fn load(at: *const i8) -> __m256i {
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(at as *const __m128i)) }
    }
    #[inline(always)]
    unsafe fn add(sum: __m256i, weights: __m256i, inputs: *const i16) -> __m256i {
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(weights, _mm256_loadu_si256(inputs as *const __m256i))) }
    }
    #[inline(always)]
    unsafe fn total(sum: __m256i) -> f32 {
        unsafe { total_256(_mm256_cvtepi32_ps(sum)) }
    }
    #[inline(always)]
    fn single(weight: i8, input: i16) -> f32 {
        (i32::from(weight) * i32::from(input)) as f32
    }
}

/// Pairs of columns are summed in 16 bits, of which 15 · 128 · 2 · 8 takes no more.
impl Nibbles for Avx2Nibbles {
    type Numbers = [__m256i; 2];
    type Sums = [__m256i; 2];
    const TOKENS: usize = 2;

    #[inline(always)]
    fn prefetch(at: *const u8) {
        prefetch(at);
    }
    #[inline(always)]
    unsafe fn load(at: *const u8) -> [[__m256i; 2]; 2] {
        unsafe {
            let (a, b) = (_mm256_loadu_si256(at as *const __m256i), _mm256_loadu_si256(at.add(32) as *const __m256i));
            let lower = |two| _mm256_and_si256(two, _mm256_set1_epi8(15));
            [[lower(a), lower(b)], [lower(_mm256_srli_epi16(a, 4)), lower(_mm256_srli_epi16(b, 4))]]
        }
    }
    #[inline(always)]
    unsafe fn add(sums: [__m256i; 2], numbers: [__m256i; 2], x: [i8; 4]) -> [__m256i; 2] {
        unsafe {
            let x = _mm256_set1_epi32(std::mem::transmute::<[i8; 4], i32>(x));
            let add = |i: usize| _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(numbers[i], x));
            [add(0), add(1)]
        }
    }
    #[inline(always)]
    unsafe fn total(sums: [__m256i; 2]) -> [i32; 16] {
        unsafe { std::mem::transmute(sums.map(|pairs| _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))) }
    }
}

/// Rust has these instructions since 1.89; build.rs looks which one compiles this.
#[cfg(avx512)]
#[allow(clippy::incompatible_msrv)]
pub mod avx512 {
    use super::super::dot::to_bf16;
    use super::*;

    pub struct Avx512;
    pub struct Avx512F32;
    pub struct Avx512Bf16;
    pub struct Avx512Int8;
    pub struct Avx512Nibbles;

    impl Processor for Avx512 {
        type F32 = Avx512F32;
        type Bf16 = Avx512Bf16;
        type Int8 = Avx512Int8;
        type Int4 = Four<Avx512Nibbles>;
        type Cached = Avx512Bf16;
    }

    #[inline(always)]
    unsafe fn total_512(sum: __m512) -> f32 {
        unsafe {
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sum), 1));
            total_256(_mm256_add_ps(_mm512_castps512_ps256(sum), upper))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(at: *const u16) -> __m512bh {
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at as *const __m512i)) }
    }

    impl Dot for Avx512F32 {
        type Weight = f32;
        type Input = f32;
        type Weights = __m512;
        type Sum = __m512;
        const STEP: usize = 16;
        const MANY: bool = true;

        #[inline(always)]
        fn prepare(row: &[f32], out: &mut [f32]) -> f32 {
            out.copy_from_slice(row);
            1.0
        }
        #[inline(always)]
        fn prefetch(at: *const Self::Weight) {
            prefetch(at);
        }
        #[inline(always)]
        unsafe fn load(at: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(at) }
        }
        #[inline(always)]
        unsafe fn add(sum: __m512, weights: __m512, inputs: *const f32) -> __m512 {
            unsafe { _mm512_fmadd_ps(weights, _mm512_loadu_ps(inputs), sum) }
        }
        #[inline(always)]
        unsafe fn total(sum: __m512) -> f32 {
            unsafe { total_512(sum) }
        }
        #[inline(always)]
        fn single(weight: f32, input: f32) -> f32 {
            weight * input
        }
    }

    /// Activations are rounded to bfloat16 too: 32 products in one instruction, summed in float32.
    impl Dot for Avx512Bf16 {
        type Weight = u16;
        type Input = u16;
        type Weights = __m512bh;
        type Sum = __m512;
        const STEP: usize = 32;
        const MANY: bool = true;

        #[inline(always)]
        fn prepare(row: &[f32], out: &mut [u16]) -> f32 {
            for (out, &x) in out.iter_mut().zip(row) {
                *out = to_bf16(x);
            }
            1.0
        }
        #[inline(always)]
        fn prefetch(at: *const Self::Weight) {
            prefetch(at);
        }
        #[inline(always)]
        unsafe fn load(at: *const u16) -> __m512bh {
            unsafe { load_bf16(at) }
        }
        #[inline(always)]
        unsafe fn add(sum: __m512, weights: __m512bh, inputs: *const u16) -> __m512 {
            unsafe { _mm512_dpbf16_ps(sum, weights, load_bf16(inputs)) }
        }
        #[inline(always)]
        unsafe fn total(sum: __m512) -> f32 {
            unsafe { total_512(sum) }
        }
        #[inline(always)]
        fn single(weight: u16, input: u16) -> f32 {
            from_bf16(weight) * from_bf16(input)
        }
    }

    impl Dot for Avx512Int8 {
        type Weight = i8;
        type Input = i16;
        type Weights = __m512i;
        type Sum = __m512i;
        const STEP: usize = 32;
        const MANY: bool = true;

        #[inline(always)]
        fn prepare(row: &[f32], out: &mut [i16]) -> f32 {
            prepare_int16(row, out, 16)
        }
        #[inline(always)]
        fn prefetch(at: *const Self::Weight) {
            prefetch(at);
        }
        #[inline(always)]
        unsafe fn load(at: *const i8) -> __m512i {
            unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(at as *const __m256i)) }
        }
        #[inline(always)]
        unsafe fn add(sum: __m512i, weights: __m512i, inputs: *const i16) -> __m512i {
            unsafe { _mm512_dpwssd_epi32(sum, weights, _mm512_loadu_si512(inputs as *const __m512i)) }
        }
        #[inline(always)]
        unsafe fn total(sum: __m512i) -> f32 {
            unsafe { total_512(_mm512_cvtepi32_ps(sum)) }
        }
        #[inline(always)]
        fn single(weight: i8, input: i16) -> f32 {
            (i32::from(weight) * i32::from(input)) as f32
        }
    }

    impl Nibbles for Avx512Nibbles {
        type Numbers = __m512i;
        type Sums = __m512i;
        const TOKENS: usize = 8;

        #[inline(always)]
        fn prefetch(at: *const u8) {
            prefetch(at);
        }
        #[inline(always)]
        unsafe fn load(at: *const u8) -> [__m512i; 2] {
            unsafe {
                let two = _mm512_loadu_si512(at as *const __m512i);
                let lower = |two| _mm512_and_si512(two, _mm512_set1_epi8(15));
                [lower(two), lower(_mm512_srli_epi16(two, 4))]
            }
        }
        #[inline(always)]
        unsafe fn add(sums: __m512i, numbers: __m512i, x: [i8; 4]) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(sums, numbers, _mm512_set1_epi32(std::mem::transmute::<[i8; 4], i32>(x))) }
        }
        #[inline(always)]
        unsafe fn total(sums: __m512i) -> [i32; 16] {
            unsafe { std::mem::transmute(sums) }
        }
    }
}
