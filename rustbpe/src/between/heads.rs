//! Queries and keys: rotated by their position, then normed, and put in the order of attention's products.

use std::ops::Range;
use std::slice::{from_raw_parts, from_raw_parts_mut};

use super::numbers::{sum, sum2, Number};
use super::team::Kernel;

/// Largest head.
pub const MAX_HEAD: usize = 512;

/// Where the tokens of a (B, T, H, D) tensor lie, and the angles of their positions.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Shape {
    pub tokens: usize,
    pub heads: usize,
    pub size: usize,
    /// (1 or B, T, D) float32: cosines; sines, negative in the second half.
    pub cos: *const f32,
    pub sin: *const f32,
    /// Not 0: each sequence has angles of its own.
    pub own_angles: usize,
    /// From one token of x to the next: more heads than these may lie side by side.
    pub x_heads: usize,
}

impl Shape {
    /// The cosines and sines of a token, counted over all sequences.
    #[inline(always)]
    unsafe fn angles(&self, row: usize) -> (&[f32], &[f32]) {
        let at = if self.own_angles != 0 { row } else { row % self.tokens } * self.size;
        // SAFETY: as the caller promises.
        unsafe { (from_raw_parts(self.cos.add(at), self.size), from_raw_parts(self.sin.add(at), self.size)) }
    }

    /// Where head h of a token begins, as a vector of D, in (B, H, T): the order of attention.
    #[inline(always)]
    fn by_head(&self, row: usize, head: usize) -> usize {
        (row / self.tokens * self.heads + head) * self.tokens + row % self.tokens
    }
}

/// y = norm(rotate(x)): x (B, T, x_heads, D), of which the first H are taken, y (B, H, T, D), scale (B, H, T).
pub struct RotaryNorm<X, Y> {
    pub x: *const X,
    pub y: *mut Y,
    pub scale: *mut f32,
    pub shape: Shape,
    pub eps: f32,
}

// SAFETY: no two threads have the same token.
unsafe impl<X, Y> Sync for RotaryNorm<X, Y> {}

impl<X: Number, Y: Number> Kernel for RotaryNorm<X, Y> {
    #[inline(always)]
    unsafe fn run(&self, rows: Range<usize>) {
        let (d, half) = (self.shape.size, self.shape.size / 2);
        let mut buffer = [0f32; MAX_HEAD];
        for row in rows {
            // SAFETY (of all blocks here): the token exists and is this thread's.
            let (cos, sin) = unsafe { self.shape.angles(row) };
            for head in 0..self.shape.heads {
                let at = self.shape.by_head(row, head);
                unsafe {
                    let x = from_raw_parts(self.x.add((row * self.shape.x_heads + head) * d), d);
                    let (x1, x2) = x.split_at(half);
                    let (turned1, turned2) = buffer[..d].split_at_mut(half);
                    for i in 0..half {
                        turned1[i] = x1[i].wide() * cos[i] + x2[i].wide() * sin[i];
                    }
                    let (cos2, sin2) = (&cos[half..], &sin[half..]);
                    for i in 0..half {
                        turned2[i] = x2[i].wide() * cos2[i] + x1[i].wide() * sin2[i];
                    }
                    let scale = 1.0 / (sum(&buffer[..d], |x| x * x) / d as f32 + self.eps).sqrt();
                    *self.scale.add(at) = scale;
                    let y = from_raw_parts_mut(self.y.add(at * d), d);
                    for (y, &x) in y.iter_mut().zip(&buffer) {
                        *y = Y::narrow(x * scale);
                    }
                }
            }
        }
    }
}

/// The gradient: dx (B, T, H, D), from dy and y (B, H, T, D).
pub struct RotaryNormBack<X, Y> {
    pub y: *const Y,
    pub dy: *const Y,
    pub scale: *const f32,
    pub dx: *mut X,
    pub shape: Shape,
}

unsafe impl<X, Y> Sync for RotaryNormBack<X, Y> {}

impl<X: Number, Y: Number> Kernel for RotaryNormBack<X, Y> {
    #[inline(always)]
    unsafe fn run(&self, rows: Range<usize>) {
        let (d, half) = (self.shape.size, self.shape.size / 2);
        let mut buffer = [0f32; MAX_HEAD];
        for row in rows {
            let (cos, sin) = unsafe { self.shape.angles(row) };
            for head in 0..self.shape.heads {
                let at = self.shape.by_head(row, head);
                unsafe {
                    let y = from_raw_parts(self.y.add(at * d), d);
                    let dy = from_raw_parts(self.dy.add(at * d), d);
                    let scale = *self.scale.add(at);
                    let mean = sum2(dy, y, |g: Y, y: Y| g.wide() * y.wide()) / d as f32;
                    for ((turned, g), y) in buffer.iter_mut().zip(dy).zip(y) {
                        *turned = (g.wide() - y.wide() * mean) * scale;
                    }
                    // Turned back: the angle's opposite.
                    let dx = from_raw_parts_mut(self.dx.add((row * self.shape.x_heads + head) * d), d);
                    let (dx1, dx2) = dx.split_at_mut(half);
                    let (turned1, turned2) = buffer[..d].split_at(half);
                    for i in 0..half {
                        dx1[i] = X::narrow(turned1[i] * cos[i] - turned2[i] * sin[i]);
                    }
                    let (cos2, sin2) = (&cos[half..], &sin[half..]);
                    for i in 0..half {
                        dx2[i] = X::narrow(turned2[i] * cos2[i] - turned1[i] * sin2[i]);
                    }
                }
            }
        }
    }
}
