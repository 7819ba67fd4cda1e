//! Muon's products in bfloat16, by AMX (see `tiles`): Newton-Schulz's iterations, which move all singular values to 1.
//!
//! A matrix at a time, on one thread each: one of 256 by 1024 and what is made of it stays in a core's second-level
//! cache. Every product is rounded to bfloat16 once, where `newton_schulz` of `nanochat/muon.py` rounds it.

use std::arch::x86_64::*;
use std::ops::Range;

use super::numbers::Bf16;
use super::team::Kernel;
use super::tiles::*;

/// For each of `matrices`: x -> y, both (R, C), multiples of 32. The singular values of x are at most 1.
pub struct Orthogonalize {
    pub x: *const Bf16,
    pub y: *mut Bf16,
    pub rows: usize,
    pub columns: usize,
    /// (a, b, c) of each iteration.
    pub coefficients: *const [f32; 3],
    pub iterations: usize,
}

// SAFETY: no two threads have the same matrix.
unsafe impl Sync for Orthogonalize {}

impl Kernel for Orthogonalize {
    unsafe fn run(&self, matrices: Range<usize>) {
        // SAFETY: `available` has said that the processor has the instructions; else as the caller promises.
        unsafe { self.matrices(matrices) }
    }
}

/// What becomes of a product of `rows` by out.size: out = by · product, or that and `factor` times `old`.
#[derive(Clone, Copy)]
struct Sum {
    rows: usize,
    by: f32,
    old: Option<(Matrix, f32)>,
    out: Matrix,
    /// What is below the diagonal is mirrored.
    symmetric: bool,
}

impl Sum {
    /// Of the product a · B; `tiles` are B's, `block` is room for 32 by 32.
    #[inline(always)]
    unsafe fn of(self, a: Matrix, tiles: *const Bf16, block: *mut f32) {
        let (steps, out) = (a.size / STEP, self.out);
        for n in (0..out.size).step_by(STEP) {
            for i in (0..if self.symmetric { n + STEP } else { self.rows }).step_by(STEP) {
                // SAFETY: as the caller promises.
                unsafe {
                    let b = pair(tiles, n / ROWS, steps, 0);
                    multiply((a.at.add(i * a.step), 2 * a.step), b, steps, (block, 4 * STEP), false);
                    for j in 0..STEP {
                        for m in [0, ROWS] {
                            let by = _mm512_set1_ps(self.by);
                            let mut x = _mm512_mul_ps(_mm512_loadu_ps(block.add(j * STEP + m)), by);
                            if let Some((old, factor)) = self.old {
                                let old = _mm512_slli_epi32::<16>(widened(old.at.add((i + j) * old.step + n + m)));
                                x = _mm512_fmadd_ps(_mm512_castsi512_ps(old), _mm512_set1_ps(factor), x);
                            }
                            narrow(x, out.at.add((i + j) * out.step + n + m));
                        }
                    }
                    if self.symmetric && i < n {
                        let (from, to) = (out.at.add(i * out.step + n), out.at.add(n * out.step + i));
                        turn(Matrix { at: from, size: STEP, ..out }, STEP, Matrix { at: to, ..out });
                    }
                }
            }
        }
    }
}

impl Orthogonalize {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    unsafe fn matrices(&self, matrices: Range<usize>) {
        // The products are those of wide matrices (r, c), whose x·xᵀ is the smaller one.
        let (r, c) = (self.rows.min(self.columns), self.rows.max(self.columns));
        let bytes = 2 * (r * (c + STEP) + 2 * r * (r + STEP) + r * c) + 4 * STEP * STEP;
        let mut room = Room::new(bytes);
        // A line more than a row needs: no 16 of them share a set of the cache.
        let mut matrix = |size| Matrix { at: room.take(r * (size + STEP)), step: size + STEP, size };
        let (x, gram, poly) = (matrix(c), matrix(r), matrix(r));
        let (tiles, block) = (room.take(r * c), room.take(STEP * STEP));
        for matrix in matrices {
            // SAFETY: the matrix exists and is this thread's.
            unsafe {
                let whole =
                    |at: *mut Bf16| Matrix { at: at.add(matrix * r * c), step: self.columns, size: self.columns };
                let (from, to) = (whole(self.x as *mut Bf16), whole(self.y));
                if self.rows > self.columns {
                    turn(from, c, x);
                } else {
                    (0..r).for_each(|i| std::ptr::copy_nonoverlapping(from.row(i).as_ptr(), x.at.add(i * x.step), c));
                }
                for k in 0..self.iterations {
                    let [a1, a3, a5] = *self.coefficients.add(k);
                    pack_rows(x, r, tiles);
                    Sum { rows: r, by: 1.0, old: None, out: gram, symmetric: true }.of(x, tiles, block); // x·xᵀ
                    pack_pairs(gram, r, tiles);
                    let sum = Sum { rows: r, by: a5, old: Some((gram, a3)), out: poly, symmetric: true };
                    sum.of(gram, tiles, block); // b·gram + c·gram²
                    pack_pairs(x, r, tiles);
                    let sum = Sum { rows: r, by: 1.0, old: Some((x, a1)), out: x, symmetric: false };
                    sum.of(poly, tiles, block); // a·x + poly·x
                }
                if self.rows > self.columns {
                    turn(x, r, to);
                } else {
                    (0..r).for_each(|i| std::ptr::copy_nonoverlapping(x.row(i).as_ptr(), to.at.add(i * c), c));
                }
            }
        }
    }
}
