//! What works on each token by itself: the residual stream with its norm, and the squared ReLU.

use std::ops::Range;
use std::slice::{from_raw_parts, from_raw_parts_mut};

use super::numbers::{sum, sum2, Number};
use super::team::Kernel;

/// r = x + delta, and y = r · scale with scale = 1/√(mean(r²) + ε); all (rows, C), scale (rows,).
///
/// Without a delta r is x and is not written; without a y there is no norm. What a product gave and what the next one
/// takes have one dtype, Y.
pub struct AddNorm<X, Y> {
    pub x: *const X,
    pub delta: *const Y,
    pub r: *mut X,
    pub y: *mut Y,
    pub scale: *mut f32,
    pub channels: usize,
    pub eps: f32,
}

// SAFETY (of all kernels): no two threads have the same row.
unsafe impl<X, Y> Sync for AddNorm<X, Y> {}

impl<X: Number, Y: Number> Kernel for AddNorm<X, Y> {
    #[inline(always)]
    unsafe fn run(&self, rows: Range<usize>) {
        let c = self.channels;
        for row in rows {
            // SAFETY (of all blocks here): the row exists and is this thread's.
            unsafe {
                let x = from_raw_parts(self.x.add(row * c), c);
                let stream = if self.delta.is_null() {
                    x
                } else {
                    let delta = from_raw_parts(self.delta.add(row * c), c);
                    let r = from_raw_parts_mut(self.r.add(row * c), c);
                    for ((r, &x), &delta) in r.iter_mut().zip(x).zip(delta) {
                        *r = X::narrow(x.wide() + delta.wide());
                    }
                    r
                };
                if self.y.is_null() {
                    continue;
                }
                let square = sum(stream, |x: X| x.wide() * x.wide());
                let scale = 1.0 / (square / c as f32 + self.eps).sqrt();
                *self.scale.add(row) = scale;
                let y = from_raw_parts_mut(self.y.add(row * c), c);
                for (y, x) in y.iter_mut().zip(stream) {
                    *y = Y::narrow(x.wide() * scale);
                }
            }
        }
    }
}

/// The gradients: dx = dr + scale·(dy − n·mean(dy·n)) with n = r·scale, and the same in delta's dtype.
///
/// dr or ddelta may be missing. Source: `_RMSNormCPU` of nanochat/ops/pointwise.py.
pub struct AddNormBack<X, Y> {
    pub r: *const X,
    pub scale: *const f32,
    pub dy: *const Y,
    pub dr: *const X,
    pub dx: *mut X,
    pub ddelta: *mut Y,
    pub channels: usize,
}

unsafe impl<X, Y> Sync for AddNormBack<X, Y> {}

impl<X: Number, Y: Number> Kernel for AddNormBack<X, Y> {
    #[inline(always)]
    unsafe fn run(&self, rows: Range<usize>) {
        let c = self.channels;
        for row in rows {
            unsafe {
                let r = from_raw_parts(self.r.add(row * c), c);
                let dy = from_raw_parts(self.dy.add(row * c), c);
                let dx = from_raw_parts_mut(self.dx.add(row * c), c);
                let scale = *self.scale.add(row);
                let along = sum2(dy, r, |g: Y, r: X| g.wide() * r.wide()) * scale / c as f32;
                // scale·(g − r·scale·along), with one factor for r.
                let back = scale * scale * along;
                if self.dr.is_null() {
                    for ((dx, g), r) in dx.iter_mut().zip(dy).zip(r) {
                        *dx = X::narrow(scale * g.wide() - r.wide() * back);
                    }
                } else {
                    let dr = from_raw_parts(self.dr.add(row * c), c);
                    for (((dx, g), r), dr) in dx.iter_mut().zip(dy).zip(r).zip(dr) {
                        *dx = X::narrow(dr.wide() + (scale * g.wide() - r.wide() * back));
                    }
                }
                if !self.ddelta.is_null() {
                    let ddelta = from_raw_parts_mut(self.ddelta.add(row * c), c);
                    for (ddelta, dx) in ddelta.iter_mut().zip(dx.iter()) {
                        *ddelta = Y::narrow(dx.wide());
                    }
                }
            }
        }
    }
}

/// Elements of a row of what has no rows.
pub const FLAT: usize = 1 << 12;

/// y = relu(x)²; a NaN stays one.
pub struct ReluSquared<X> {
    pub x: *const X,
    pub y: *mut X,
    pub len: usize,
}

unsafe impl<X> Sync for ReluSquared<X> {}

/// `f32::max` would turn a NaN into 0 and hide it.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 {
        0.0
    } else {
        x
    }
}

impl<X: Number> Kernel for ReluSquared<X> {
    #[inline(always)]
    unsafe fn run(&self, rows: Range<usize>) {
        let (first, end) = (rows.start * FLAT, (rows.end * FLAT).min(self.len));
        unsafe {
            let x = from_raw_parts(self.x.add(first), end - first);
            let y = from_raw_parts_mut(self.y.add(first), end - first);
            for (y, x) in y.iter_mut().zip(x) {
                let r = relu(x.wide());
                *y = X::narrow(r * r);
            }
        }
    }
}

/// dx = 2·relu(x)·dy.
pub struct ReluSquaredBack<X> {
    pub x: *const X,
    pub dy: *const X,
    pub dx: *mut X,
    pub len: usize,
}

unsafe impl<X> Sync for ReluSquaredBack<X> {}

impl<X: Number> Kernel for ReluSquaredBack<X> {
    #[inline(always)]
    unsafe fn run(&self, rows: Range<usize>) {
        let (first, end) = (rows.start * FLAT, (rows.end * FLAT).min(self.len));
        unsafe {
            let x = from_raw_parts(self.x.add(first), end - first);
            let dy = from_raw_parts(self.dy.add(first), end - first);
            let dx = from_raw_parts_mut(self.dx.add(first), end - first);
            for ((dx, x), g) in dx.iter_mut().zip(x).zip(dy) {
                *dx = X::narrow(2.0 * relu(x.wide()) * g.wide());
            }
        }
    }
}
