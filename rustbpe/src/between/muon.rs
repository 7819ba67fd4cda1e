//! Muon's steps before and after its products: momentum and norm, and the update of the weights. For the formulas see
//! `nanochat/muon.py`. A matrix at a time, on one thread each: a stack of
//! fewer matrices than cores leaves some idle.

use std::ops::Range;
use std::slice::{from_raw_parts, from_raw_parts_mut};

use super::numbers::{sum, sum2, Number};
use super::team::Kernel;

/// Nesterov's momentum of `matrices` (R, C), scaled to a Frobenius norm of 1 / safety.
pub struct LookAhead<Y> {
    /// The gradients, each (R, C).
    pub grads: *const *const f32,
    /// (N, R, C) both.
    pub momentum: *mut f32,
    pub y: *mut Y,
    pub rows: usize,
    pub columns: usize,
    /// On the gradients.
    pub multiplier: f32,
    pub beta: f32,
    /// Not 0: every row gets the length 1 first.
    pub equalize: usize,
    pub safety: f32,
}

// SAFETY: no two threads have the same matrix.
unsafe impl<Y> Sync for LookAhead<Y> {}

const SMALLEST: f32 = 1e-20;

impl<Y: Number> Kernel for LookAhead<Y> {
    #[inline(always)]
    unsafe fn run(&self, matrices: Range<usize>) {
        let (c, size) = (self.columns, self.rows * self.columns);
        let (multiplier, beta) = (self.multiplier, self.beta);
        for matrix in matrices {
            // SAFETY (of all blocks here): the matrix exists and is this thread's.
            let (grad, momentum, y) = unsafe {
                (
                    from_raw_parts(*self.grads.add(matrix), size),
                    from_raw_parts_mut(self.momentum.add(matrix * size), size),
                    from_raw_parts_mut(self.y.add(matrix * size), size),
                )
            };
            // Without a gradient the momentum stays, and there is no update.
            if grad.iter().all(|g| g * multiplier == 0.0) {
                y.iter_mut().for_each(|y| *y = Y::narrow(0.0));
                continue;
            }
            let ahead = |g: f32, m: f32| m - (m - g * multiplier) * (1.0 - beta);
            let mut factors = vec![0f32; self.rows];
            let rows = grad.chunks_exact(c).zip(momentum.chunks_exact_mut(c));
            for (factor, (grad, momentum)) in factors.iter_mut().zip(rows) {
                for (m, &g) in momentum.iter_mut().zip(grad) {
                    *m += (1.0 - beta) * (g * multiplier - *m);
                }
                // The row's length.
                *factor = sum2(grad, momentum, |g, m| ahead(g, m) * ahead(g, m)).sqrt();
            }
            let mut square = 0f64;
            for factor in &mut factors {
                let length = *factor;
                *factor = if self.equalize != 0 { 1.0 / length.max(SMALLEST) } else { 1.0 };
                square += f64::from(length * *factor).powi(2);
            }
            let norm = (square.sqrt() as f32 * self.safety).max(SMALLEST);
            let rows = grad.chunks_exact(c).zip(momentum.chunks_exact(c));
            for ((y, factor), (grad, momentum)) in y.chunks_exact_mut(c).zip(&factors).zip(rows) {
                let factor = factor / norm;
                for ((y, &g), &m) in y.iter_mut().zip(grad).zip(momentum) {
                    *y = Y::narrow(ahead(g, m) * factor);
                }
            }
        }
    }
}

/// p -= rate·(u + decay·p) with the orthogonalised update u, (N, R, C).
pub struct Apply<Y> {
    pub update: *const Y,
    /// The weights, each (R, C).
    pub params: *const *mut f32,
    /// NorMuon's second moment, (N, R) if `by_rows` is not 0, else (N, C); null: none.
    pub moment: *mut f32,
    pub by_rows: usize,
    pub rows: usize,
    pub columns: usize,
    pub beta2: f32,
    pub rate: f32,
    /// Already times the rate.
    pub decay: f32,
    /// Not 0: decay only where the update shrinks a weight too.
    pub cautious: usize,
}

unsafe impl<Y> Sync for Apply<Y> {}

const LEAST_SQUARE: f32 = 1e-10;

impl<Y: Number> Apply<Y> {
    /// The factor of each row or column, which gives all neurons a mean square of their own; updates the moment.
    #[inline(always)]
    fn normalize(&self, update: &[Y], moment: &mut [f32]) -> Vec<f32> {
        let c = self.columns;
        let mut square = vec![0f32; moment.len()];
        if self.by_rows != 0 {
            for (square, row) in square.iter_mut().zip(update.chunks_exact(c)) {
                *square = sum(row, |u: Y| u.wide() * u.wide()) / c as f32;
            }
        } else {
            for row in update.chunks_exact(c) {
                for (square, u) in square.iter_mut().zip(row) {
                    *square += u.wide() * u.wide();
                }
            }
            square.iter_mut().for_each(|square| *square /= self.rows as f32);
        }
        if square.iter().all(|&square| square == 0.0) {
            return vec![0.0; moment.len()]; // no update: the moment stays
        }
        let mut factors = vec![0f32; moment.len()];
        let (mut before, mut after) = (0f64, 0f64);
        for ((factor, moment), &square) in factors.iter_mut().zip(moment.iter_mut()).zip(&square) {
            *moment += (1.0 - self.beta2) * (square - *moment);
            *factor = 1.0 / moment.max(LEAST_SQUARE).sqrt();
            before += f64::from(square);
            after += f64::from(square * *factor * *factor);
        }
        let same_norm = (before / after.max(f64::from(LEAST_SQUARE))).sqrt() as f32;
        factors.iter_mut().for_each(|factor| *factor *= same_norm);
        factors
    }
}

impl<Y: Number> Kernel for Apply<Y> {
    #[inline(always)]
    unsafe fn run(&self, matrices: Range<usize>) {
        let (c, size) = (self.columns, self.rows * self.columns);
        let neurons = if self.by_rows != 0 { self.rows } else { c };
        let (rate, decay, cautious) = (self.rate, self.decay, self.cautious != 0);
        let moved = |u: f32, p: f32| {
            let decayed = if !cautious || u * p >= 0.0 { p - decay * p } else { p };
            decayed - rate * u
        };
        for matrix in matrices {
            // SAFETY (of all blocks here): the matrix exists and is this thread's.
            let (update, params) = unsafe {
                (
                    from_raw_parts(self.update.add(matrix * size), size),
                    from_raw_parts_mut(*self.params.add(matrix), size),
                )
            };
            let factors = if self.moment.is_null() {
                Vec::new()
            } else {
                self.normalize(update, unsafe { from_raw_parts_mut(self.moment.add(matrix * neurons), neurons) })
            };
            for (row, (params, update)) in params.chunks_exact_mut(c).zip(update.chunks_exact(c)).enumerate() {
                if !factors.is_empty() && self.by_rows == 0 {
                    for ((p, u), factor) in params.iter_mut().zip(update).zip(&factors) {
                        *p = moved(u.wide() * factor, *p);
                    }
                } else {
                    let factor = if factors.is_empty() { 1.0 } else { factors[row] };
                    for (p, u) in params.iter_mut().zip(update) {
                        *p = moved(u.wide() * factor, *p);
                    }
                }
            }
        }
    }
}
