//! Products of bfloat16 matrices in AMX (see `decode::amx` for its tiles), for kernels that keep what they work on in a
//! core's second-level cache.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::slice::from_raw_parts;

use super::numbers::Bf16;
use crate::decode::amx::Shapes;

/// Rows and columns of a product: two tiles each way.
pub const STEP: usize = 32;
/// Elements of a tile of bfloat16, and rows of any.
pub const TILE: usize = 512;
pub const ROWS: usize = 16;
/// Bytes of a line. Rows of scores are a line longer than they need: no 16 of them share a set of the cache.
pub const LINE: usize = 64;

/// Rows of `size` elements; from one row to the next are `step`.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub at: *mut Bf16,
    pub step: usize,
    pub size: usize,
}

impl Matrix {
    #[inline(always)]
    pub unsafe fn row(&self, row: usize) -> &[Bf16] {
        unsafe { from_raw_parts(self.at.add(row * self.step), self.size) }
    }
    #[inline(always)]
    pub unsafe fn write(&self, row: usize, from: *const f32) {
        for n in (0..self.size).step_by(ROWS) {
            unsafe { narrow(_mm512_loadu_ps(from.add(n)), self.at.add(row * self.step + n)) };
        }
    }
}

/// Where 32 rows of a product begin, and the bytes from one to the next.
pub type Rows<X> = (*mut X, usize);

/// C (32, 32) = A (32, 32 · steps) · B, or C + A · B. `b` are the tiles of two times 16 columns, those of one column
/// one after another.
#[inline(always)]
pub unsafe fn multiply(a: Rows<Bf16>, b: [*const Bf16; 2], steps: usize, c: Rows<f32>, add: bool) {
    // SAFETY: the tiles have their shapes (`run`), and the memory is there, as the caller promises.
    unsafe {
        asm!(
            "test {add}, {add}",
            "jnz 3f",
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "jmp 4f",
            "3:",
            "tileloadd tmm0, [{c0} + {cs}*1]", "tileloadd tmm1, [{c0} + {cs}*1 + 64]",
            "tileloadd tmm2, [{c1} + {cs}*1]", "tileloadd tmm3, [{c1} + {cs}*1 + 64]",
            "4:",
            "tileloadd tmm4, [{a0} + {rs}*1]", "tileloadd tmm6, [{b0} + {line}*1]",
            "tileloadd tmm5, [{a1} + {rs}*1]", "tileloadd tmm7, [{b1} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 64", "add {a1}, 64", "add {b0}, 1024", "add {b1}, 1024",
            "dec {steps}",
            "jnz 4b",
            "tilestored [{c0} + {cs}*1], tmm0", "tilestored [{c0} + {cs}*1 + 64], tmm1",
            "tilestored [{c1} + {cs}*1], tmm2", "tilestored [{c1} + {cs}*1 + 64], tmm3",
            add = in(reg) add as usize,
            a0 = inout(reg) a.0 => _, a1 = inout(reg) (a.0 as *mut u8).add(ROWS * a.1) => _, rs = in(reg) a.1,
            b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _, line = in(reg) LINE,
            steps = inout(reg) steps => _,
            c0 = in(reg) c.0, c1 = in(reg) (c.0 as *mut u8).add(ROWS * c.1), cs = in(reg) c.1,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}

/// The tiles of two neighbouring blocks of 16 columns, from block `n` on, each with `all` tiles; from tile `first` on.
#[inline(always)]
pub unsafe fn pair(tiles: *const Bf16, n: usize, all: usize, first: usize) -> [*const Bf16; 2] {
    unsafe { [tiles.add((n * all + first) * TILE), tiles.add(((n + 1) * all + first) * TILE)] }
}

/// Tiles for products with the transpose of x (T, D): its rows become columns.
#[inline(always)]
pub unsafe fn pack_rows(x: Matrix, tokens: usize, out: *mut Bf16) {
    let d = x.size;
    for block in 0..tokens / ROWS {
        for n in (0..d).step_by(STEP) {
            unsafe {
                // Two channels side by side are one number of 32 bits.
                let mut lines = [_mm512_setzero_si512(); ROWS];
                for (i, line) in lines.iter_mut().enumerate() {
                    *line = load(x.at.add((block * ROWS + i) * x.step + n));
                }
                transpose(&mut lines);
                for (i, line) in lines.iter().enumerate() {
                    store(*line, out.add(block * ROWS * d + n * ROWS + i * STEP));
                }
            }
        }
    }
}

/// Tiles for products with the rows of x (K, N): two neighbouring ones are mixed, element by element.
#[inline(always)]
pub unsafe fn pack_pairs(x: Matrix, rows: usize, out: *mut Bf16) {
    for k in (0..rows).step_by(2) {
        for n in (0..x.size).step_by(ROWS) {
            let tile = n / ROWS * (rows / STEP) + k / STEP;
            unsafe {
                let row = x.at.add(k * x.step + n);
                let (one, two) = (widened(row), widened(row.add(x.step)));
                let mixed = _mm512_or_si512(one, _mm512_slli_epi32(two, 16));
                store(mixed, out.add(tile * TILE + k % STEP * ROWS));
            }
        }
    }
}

#[inline(always)]
pub unsafe fn load<X>(from: *const X) -> __m512i {
    unsafe { _mm512_loadu_si512(from as *const __m512i) }
}

#[inline(always)]
pub unsafe fn store<X>(x: __m512i, to: *mut X) {
    unsafe { _mm512_storeu_si512(to as *mut __m512i, x) }
}

/// 16 numbers of 16 bits in 32 each.
#[inline(always)]
pub unsafe fn widened(from: *const Bf16) -> __m512i {
    unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(from as *const __m256i)) }
}

/// 16 numbers rounded to bfloat16.
#[inline(always)]
pub unsafe fn narrow(x: __m512, to: *mut Bf16) {
    unsafe { _mm256_storeu_si256(to as *mut __m256i, std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))) }
}

/// Rows of 16 numbers of 32 bits become columns: in pairs, in fours, then whole lanes.
#[inline(always)]
pub unsafe fn transpose(rows: &mut [__m512i; ROWS]) {
    unsafe {
        let mut t = *rows;
        for i in (0..ROWS).step_by(2) {
            t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        let mut r = t;
        for i in (0..ROWS).step_by(4) {
            for j in 0..2 {
                r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
                r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
            }
        }
        for j in 0..4 {
            let (a, b, c, d) = (r[j], r[4 + j], r[8 + j], r[12 + j]);
            let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
            rows[j] = _mm512_shuffle_i32x4::<0x88>(even, even2);
            rows[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
            rows[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
            rows[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
        }
    }
}

/// out = the transpose of x, whose rows and size are multiples of 32.
#[inline(always)]
pub unsafe fn turn(x: Matrix, rows: usize, out: Matrix) {
    for i in (0..rows).step_by(STEP) {
        for n in (0..x.size).step_by(STEP) {
            unsafe {
                // Two rows side by side are numbers of 32 bits: in each lane of eight columns the first or last four.
                let mut halves = [[_mm512_setzero_si512(); ROWS]; 2];
                for j in 0..ROWS {
                    let row = x.at.add((i + 2 * j) * x.step + n);
                    let (one, two) = (load(row), load(row.add(x.step)));
                    halves[0][j] = _mm512_unpacklo_epi16(one, two);
                    halves[1][j] = _mm512_unpackhi_epi16(one, two);
                }
                for (half, lines) in halves.iter_mut().enumerate() {
                    transpose(lines);
                    for (j, line) in lines.iter().enumerate() {
                        let column = n + 8 * (j / 4) + 4 * half + j % 4;
                        store(*line, out.at.add(column * out.step + i));
                    }
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; LINE]);

/// More than this is given back after a call: a thread lives as long as the process.
const MOST_KEPT: usize = 32 << 20;

thread_local! {
    /// A thread's memory, kept from call to call.
    static KEPT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Memory for one head or matrix, in parts, and tiles that have shapes.
pub struct Room {
    lines: Vec<Line>,
    used: usize,
}

impl Room {
    pub fn new(bytes: usize) -> Room {
        let mut lines = KEPT.with(Cell::take);
        // Each part begins on a line, and so may waste one: room for 31 parts, and for the rest of the division.
        lines.resize((bytes / LINE + 32).max(lines.len()), Line([0; LINE]));
        // SAFETY: `available` has said that there are tiles.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &Shapes::new(ROWS), options(nostack, readonly)) };
        Room { lines, used: 0 }
    }

    pub fn take<X>(&mut self, count: usize) -> *mut X {
        let first = self.used;
        self.used += (count * std::mem::size_of::<X>() + LINE - 1) / LINE;
        assert!(self.used <= self.lines.len());
        unsafe { self.lines.as_mut_ptr().add(first) as *mut X }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: as above. Other users of tiles find none in use.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
        if self.lines.len() * LINE <= MOST_KEPT {
            KEPT.with(|kept| kept.set(std::mem::take(&mut self.lines)));
        }
    }
}
