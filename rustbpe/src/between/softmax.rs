//! Probabilities: those of attention, and those of the next token with their loss and its gradient.

use std::ops::Range;
use std::slice::{from_raw_parts, from_raw_parts_mut};

use super::numbers::{exp, largest, sum, sum2, Number};
use super::team::Kernel;

/// Attention's probabilities in place of its scores: softmax(scale·s) over the keys that a query may see.
pub struct Softmax<X> {
    /// (N, queries, keys).
    pub scores: *mut X,
    pub queries: usize,
    pub keys: usize,
    pub scale: f32,
    /// (N / share, queries, masked): 0 where a query must not look, for the last `masked` keys; or null.
    pub mask: *const u8,
    pub masked: usize,
    pub share: usize,
}

// SAFETY: no two threads have the same query.
unsafe impl<X> Sync for Softmax<X> {}

impl<X: Number> Kernel for Softmax<X> {
    #[inline(always)]
    unsafe fn run(&self, rows: Range<usize>) {
        let keys = self.keys;
        let mut buffer = vec![0f32; keys];
        for row in rows {
            // SAFETY (of all blocks here): the row exists and is this thread's.
            let scores = unsafe { from_raw_parts_mut(self.scores.add(row * keys), keys) };
            for (score, x) in buffer.iter_mut().zip(scores.iter()) {
                *score = x.wide() * self.scale;
            }
            if !self.mask.is_null() {
                let at = (row / self.queries / self.share * self.queries + row % self.queries) * self.masked;
                let mask = unsafe { from_raw_parts(self.mask.add(at), self.masked) };
                for (score, &seen) in buffer[keys - self.masked..].iter_mut().zip(mask) {
                    *score = if seen != 0 { *score } else { f32::NEG_INFINITY };
                }
            }
            let most = largest(&buffer);
            for score in &mut buffer {
                *score = exp(*score - most);
            }
            let factor = 1.0 / sum(&buffer, |x| x);
            for (x, &e) in scores.iter_mut().zip(&buffer) {
                *x = X::narrow(e * factor);
            }
        }
    }
}

/// The gradient of the scores in place of that of the probabilities: ds = scale·p·(dp − Σ dp·p).
pub struct SoftmaxBack<X> {
    pub p: *const X,
    pub dp: *mut X,
    pub keys: usize,
    pub scale: f32,
}

unsafe impl<X> Sync for SoftmaxBack<X> {}

impl<X: Number> Kernel for SoftmaxBack<X> {
    #[inline(always)]
    unsafe fn run(&self, rows: Range<usize>) {
        for row in rows {
            unsafe {
                let p = from_raw_parts(self.p.add(row * self.keys), self.keys);
                let dp = from_raw_parts_mut(self.dp.add(row * self.keys), self.keys);
                let total = sum2(dp, p, |g: X, p: X| g.wide() * p.wide());
                for (g, p) in dp.iter_mut().zip(p) {
                    *g = X::narrow((g.wide() - total) * p.wide() * self.scale);
                }
            }
        }
    }
}

/// Tokens of the vocabulary whose exponentials are summed in float32 before they join the total.
const PART: usize = 4096;

/// The loss of each token, and in place of its logits their gradient. See `nanochat/ops/loss.py` for the formulas.
///
/// With a cap a logit z comes as 2·z/cap and counts as 2·cap·σ(2·z/cap); without one it comes as it is.
pub struct Loss<X> {
    /// (tokens, V).
    pub logits: *mut X,
    /// (tokens,); negative: ignored.
    pub targets: *const i64,
    pub losses: *mut f32,
    pub width: usize,
    /// The real tokens among the V.
    pub vocab: usize,
    /// 0: none.
    pub cap: f32,
}

unsafe impl<X> Sync for Loss<X> {}

/// The sigmoid.
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(if x < -80.0 { 80.0 } else { -x })) // below, it is too small to count; and exp ends at 88
}

impl<X: Number> Kernel for Loss<X> {
    #[inline(always)]
    unsafe fn run(&self, rows: Range<usize>) {
        let (width, vocab, cap) = (self.width, self.vocab, self.cap);
        let (mut z, mut e) = (vec![0f32; vocab], vec![0f32; vocab]);
        for row in rows {
            unsafe {
                let logits = from_raw_parts_mut(self.logits.add(row * width), width);
                let target = *self.targets.add(row);
                if target < 0 {
                    *self.losses.add(row) = 0.0;
                    logits.iter_mut().for_each(|x| *x = X::narrow(0.0));
                    continue;
                }
                let target = target as usize;
                for (z, x) in z.iter_mut().zip(logits.iter()) {
                    *z = x.wide();
                }
                if cap > 0.0 {
                    for (z, e) in z.iter_mut().zip(&mut e) {
                        *z = sigmoid(*z);
                        *e = exp(2.0 * cap * *z);
                    }
                } else {
                    let most = largest(&z);
                    for (z, e) in z.iter_mut().zip(&mut e) {
                        *z -= most;
                        *e = exp(*z);
                    }
                }
                let total = e.chunks(PART).map(|part| f64::from(sum(part, |x| x))).sum::<f64>();
                let score = if cap > 0.0 { 2.0 * cap * z[target] } else { z[target] };
                *self.losses.add(row) = (total.ln() - f64::from(score)) as f32;
                e[target] -= total as f32;
                let factor = (if cap > 0.0 { 4.0 } else { 1.0 }) / total as f32;
                if cap > 0.0 {
                    for ((x, &e), &sigma) in logits.iter_mut().zip(&e).zip(&z) {
                        *x = X::narrow(e * (sigma - sigma * sigma) * factor);
                    }
                } else {
                    for (x, &e) in logits.iter_mut().zip(&e) {
                        *x = X::narrow(e * factor);
                    }
                }
                logits[vocab..].iter_mut().for_each(|x| *x = X::narrow(0.0)); // padding has no probability
            }
        }
    }
}
