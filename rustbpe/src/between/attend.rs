//! Causal attention of a training step in bfloat16, forward and backward, by AMX (see `tiles`).
//!
//! One head at a time: what belongs to it stays in a core's second-level cache, and neither scores nor probabilities
//! are written to memory. The backward pass makes the probabilities once more, from the logarithm of their sum, as
//! FlashAttention does (arXiv 2205.14135). Queries, keys, values and all gradients are read and written where the
//! products before and after have them, in any order of sequences, heads and tokens.
//!
//! Shapes: T tokens and D channels of a head, both multiples of 32.

use std::arch::x86_64::*;
use std::ops::Range;
use std::slice::from_raw_parts_mut;

use super::numbers::{sum2, Bf16, Number};
use super::team::Kernel;
use super::tiles::*;

/// The keys of a block in the backward pass.
const KEYS: usize = 64;

/// A tensor (B, H, T, D) whose D lie side by side; steps are in elements.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct View {
    pub at: *mut Bf16,
    pub sequence: usize,
    pub head: usize,
    pub token: usize,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub tokens: usize,
    pub size: usize,
    /// On the products of queries and keys; positive.
    pub scale: f32,
}

impl View {
    unsafe fn of(&self, sequence: usize, head: usize, size: usize) -> Matrix {
        // SAFETY: as the caller promises.
        Matrix { at: unsafe { self.at.add(sequence * self.sequence + head * self.head) }, step: self.token, size }
    }
}

/// e^x for x up to 80, to 1e-5 of itself: bfloat16 has 4e-3.
#[inline(always)]
unsafe fn exp(x: __m512) -> __m512 {
    unsafe {
        // 2^t = 2^n · e^r, with n the nearest integer. Below 2^-100 it is 0, so that nothing becomes a number with fewer
        // digits: a processor takes a hundred cycles for one. A NaN stays one: `max` gives the second.
        let (least, t) = (_mm512_set1_ps(-100.0), _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
        let more = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(t, least);
        let t = _mm512_max_ps(least, t);
        let n = _mm512_roundscale_ps::<0x08>(t);
        let r = _mm512_mul_ps(_mm512_sub_ps(t, n), _mm512_set1_ps(std::f32::consts::LN_2));
        let mut p = _mm512_set1_ps(1.0 / 720.0);
        for term in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
        }
        _mm512_maskz_scalef_ps(more, p, n)
    }
}

/// y = softmax(scale · q · kᵀ) · v, each query with the keys up to its own.
pub struct Attend {
    pub q: View,
    pub k: View,
    pub v: View,
    pub y: View,
    /// (B, H, T): logarithms of the sums of exponentials, for the backward pass.
    pub sums: *mut f32,
    pub shape: Shape,
}

// SAFETY (of both): no two threads have the same head of keys.
unsafe impl Sync for Attend {}

impl Kernel for Attend {
    unsafe fn run(&self, heads: Range<usize>) {
        // SAFETY: `available` has said that the processor has the instructions; else as the caller promises.
        unsafe { self.heads(heads) }
    }
}

impl Attend {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    unsafe fn heads(&self, heads: Range<usize>) {
        let Shape { heads: all, kv_heads, tokens: t, size: d, scale } = self.shape;
        let (wide, slim) = (4 * t + LINE, 2 * t + LINE); // bytes of a row
        let mut room = Room::new(4 * t * d + STEP * (wide + slim + 4 * d));
        let (keys, values) = (room.take::<Bf16>(t * d), room.take::<Bf16>(t * d));
        let (scores, p) = (room.take::<f32>(STEP * wide / 4), room.take::<Bf16>(STEP * slim / 2));
        let mixed = room.take::<f32>(STEP * d);
        for job in heads {
            // SAFETY (of all blocks here): the head exists and is this thread's.
            let (b, group, repeats) = (job / kv_heads, job % kv_heads, all / kv_heads);
            unsafe {
                pack_rows(self.k.of(b, group, d), t, keys);
                pack_pairs(self.v.of(b, group, d), t, values);
            }
            for head in group * repeats..(group + 1) * repeats {
                let (q, y) = unsafe { (self.q.of(b, head, d), self.y.of(b, head, d)) };
                let sums = unsafe { from_raw_parts_mut(self.sums.add((b * all + head) * t), t) };
                for first in (0..t).step_by(STEP) {
                    let end = first + STEP;
                    unsafe {
                        let rows = (q.at.add(first * q.step), 2 * q.step);
                        for key in (0..end).step_by(STEP) {
                            let tiles = pair(keys, key / ROWS, d / STEP, 0);
                            multiply(rows, tiles, d / STEP, (scores.add(key), wide), false);
                        }
                        for i in 0..STEP {
                            // To the end of the block: whole vectors, of which the last counts nothing.
                            let (s, p) = (scores.add(i * wide / 4), p.add(i * slim / 2));
                            from_raw_parts_mut(s, end)[first + i + 1..].fill(f32::NEG_INFINITY);
                            let mut most = _mm512_loadu_ps(s);
                            for n in (ROWS..end).step_by(ROWS) {
                                most = _mm512_max_ps(most, _mm512_loadu_ps(s.add(n)));
                            }
                            let most = _mm512_reduce_max_ps(most) * scale;
                            let (factor, less) = (_mm512_set1_ps(scale), _mm512_set1_ps(most));
                            let mut total = _mm512_setzero_ps();
                            for n in (0..end).step_by(ROWS) {
                                let e = exp(_mm512_fmsub_ps(_mm512_loadu_ps(s.add(n)), factor, less));
                                _mm512_storeu_ps(s.add(n), e);
                                total = _mm512_add_ps(total, e);
                            }
                            let total = _mm512_reduce_add_ps(total);
                            sums[first + i] = most + total.ln();
                            let share = _mm512_set1_ps(1.0 / total);
                            for n in (0..end).step_by(ROWS) {
                                narrow(_mm512_mul_ps(_mm512_loadu_ps(s.add(n)), share), p.add(n));
                            }
                        }
                        for n in (0..d).step_by(STEP) {
                            let tiles = pair(values, n / ROWS, t / STEP, 0);
                            multiply((p, slim), tiles, end / STEP, (mixed.add(n), 4 * d), false);
                        }
                        for i in 0..STEP {
                            y.write(first + i, mixed.add(i * d));
                        }
                    }
                }
            }
        }
    }
}

/// The gradients: with p the probabilities, dv = pᵀ·dy, dp = dy·vᵀ, ds = scale·p∘(dp − Σ dy∘y), dq = ds·k, dk = dsᵀ·q.
pub struct AttendBack {
    pub q: View,
    pub k: View,
    pub v: View,
    pub y: View,
    pub dy: View,
    pub dq: View,
    pub dk: View,
    pub dv: View,
    pub sums: *const f32,
    pub shape: Shape,
}

unsafe impl Sync for AttendBack {}

/// What the backward pass needs of a head of queries.
struct Queries {
    /// Tiles for q and dy as columns, and as rows.
    columns: [*mut Bf16; 2],
    rows: [*mut Bf16; 2],
    /// dq, (D, T) float32.
    dq: *mut f32,
    /// Σ dy∘y of each query.
    along: *mut f32,
}

impl Kernel for AttendBack {
    unsafe fn run(&self, heads: Range<usize>) {
        // SAFETY: as for `Attend`.
        unsafe { self.heads(heads) }
    }
}

impl AttendBack {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    unsafe fn heads(&self, heads: Range<usize>) {
        let Shape { heads: all, kv_heads, tokens: t, size: d, scale } = self.shape;
        let repeats = all / kv_heads;
        let (wide, slim) = (4 * t + LINE, 2 * t + LINE); // bytes of a row
        let bytes = repeats * (d * (8 * t + wide) + 4 * t) + d * slim + KEYS * (2 * wide + 3 * slim + 8 * d);
        let mut room = Room::new(bytes + 6 * repeats * LINE); // a line for each part of a head of queries
        let own: Vec<Queries> = (0..repeats)
            .map(|_| Queries {
                columns: [room.take(t * d), room.take(t * d)],
                rows: [room.take(t * d), room.take(t * d)],
                dq: room.take(d * wide / 4),
                along: room.take(t),
            })
            .collect();
        let across = room.take::<Bf16>(d * slim / 2); // k, (D, T)
        let (s, dp) = (room.take::<f32>(KEYS * wide / 4), room.take::<f32>(KEYS * wide / 4));
        let (p, ds) = (room.take::<Bf16>(KEYS * slim / 2), room.take::<Bf16>(KEYS * slim / 2));
        let mixed = room.take::<Bf16>(KEYS * t);
        let (dk, dv) = (room.take::<f32>(KEYS * d), room.take::<f32>(KEYS * d));
        for job in heads {
            let (b, group) = (job / kv_heads, job % kv_heads);
            // SAFETY (of all blocks here): the head exists and is this thread's.
            let (k, v) = unsafe { (self.k.of(b, group, d), self.v.of(b, group, d)) };
            for (r, own) in own.iter().enumerate() {
                let head = group * repeats + r;
                unsafe {
                    let (q, y, dy) = (self.q.of(b, head, d), self.y.of(b, head, d), self.dy.of(b, head, d));
                    for (i, x) in [q, dy].into_iter().enumerate() {
                        pack_rows(x, t, own.columns[i]);
                        pack_pairs(x, t, own.rows[i]);
                    }
                    for i in 0..t {
                        *own.along.add(i) = sum2(y.row(i), dy.row(i), |y: Bf16, g: Bf16| y.wide() * g.wide());
                    }
                    from_raw_parts_mut(own.dq, d * wide / 4).fill(0.0);
                }
            }
            unsafe { turn(k, t, Matrix { at: across, step: slim / 2, size: t }) };
            for first in (0..t).step_by(KEYS) {
                // The keys of this block, and the queries that see one of them: both begin at `first`.
                let (keys, queries) = (KEYS.min(t - first), t - first);
                for (r, own) in own.iter().enumerate() {
                    unsafe {
                        // Scores and their gradients, (keys, queries).
                        for i in (0..keys).step_by(STEP) {
                            for n in (0..queries).step_by(STEP) {
                                for (x, tiles, out) in [(k, own.columns[0], s), (v, own.columns[1], dp)] {
                                    let rows = (x.at.add((first + i) * x.step), 2 * x.step);
                                    let tiles = pair(tiles, (first + n) / ROWS, d / STEP, 0);
                                    let out = (out.add(i * wide / 4 + n), wide);
                                    multiply(rows, tiles, d / STEP, out, false);
                                }
                            }
                        }
                        let sums = self.sums.add((b * all + group * repeats + r) * t + first);
                        let along = own.along.add(first);
                        let factor = _mm512_set1_ps(scale);
                        for i in 0..keys {
                            let (p, ds) = (p.add(i * slim / 2), ds.add(i * slim / 2));
                            let (s, dp) = (s.add(i * wide / 4), dp.add(i * wide / 4));
                            from_raw_parts_mut(s, i).fill(f32::NEG_INFINITY); // queries before this key
                            for n in (0..queries).step_by(ROWS) {
                                let less = _mm512_loadu_ps(sums.add(n));
                                let share = exp(_mm512_fmsub_ps(_mm512_loadu_ps(s.add(n)), factor, less));
                                narrow(share, p.add(n));
                                let g = _mm512_sub_ps(_mm512_loadu_ps(dp.add(n)), _mm512_loadu_ps(along.add(n)));
                                narrow(_mm512_mul_ps(_mm512_mul_ps(share, factor), g), ds.add(n));
                            }
                        }
                        pack_pairs(Matrix { at: ds, step: slim / 2, size: queries }, keys, mixed);
                        for n in (0..d).step_by(STEP) {
                            for i in (0..keys).step_by(STEP) {
                                for (x, tiles, out) in [(p, own.rows[1], dv), (ds, own.rows[0], dk)] {
                                    let rows = (x.add(i * slim / 2), slim);
                                    let tiles = pair(tiles, n / ROWS, t / STEP, first / STEP);
                                    multiply(rows, tiles, queries / STEP, (out.add(i * d + n), 4 * d), r > 0);
                                }
                            }
                            for i in (0..queries).step_by(STEP) {
                                let rows = (across.add(n * slim / 2 + first), slim);
                                let tiles = pair(mixed, i / ROWS, keys / STEP, 0);
                                let out = (own.dq.add(n * wide / 4 + first + i), wide);
                                multiply(rows, tiles, keys / STEP, out, true);
                            }
                        }
                    }
                }
                for i in 0..keys {
                    unsafe {
                        self.dk.of(b, group, d).write(first + i, dk.add(i * d));
                        self.dv.of(b, group, d).write(first + i, dv.add(i * d));
                    }
                }
            }
            for (r, own) in own.iter().enumerate() {
                let dq = unsafe { self.dq.of(b, group * repeats + r, d) };
                for i in (0..t).step_by(ROWS) {
                    for n in (0..d).step_by(ROWS) {
                        unsafe {
                            let mut lines = [_mm512_setzero_si512(); ROWS];
                            for (j, line) in lines.iter_mut().enumerate() {
                                *line = load(own.dq.add((n + j) * wide / 4 + i));
                            }
                            transpose(&mut lines);
                            for (j, line) in lines.iter().enumerate() {
                                narrow(_mm512_castsi512_ps(*line), dq.at.add((i + j) * dq.step + n));
                            }
                        }
                    }
                }
            }
        }
    }
}
