//! The two dtypes, sums in a fixed order, and an exponential that a compiler can vectorize.

use crate::decode::dot::{from_bf16, to_bf16};

/// An element of a tensor.
pub trait Number: Copy + Send + Sync + 'static {
    fn wide(self) -> f32;
    fn narrow(x: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(x: f32) -> f32 {
        x
    }
}

/// The upper half of a float32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Number for Bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        from_bf16(self.0)
    }
    /// To the nearest, of two equally near to the even one, as torch rounds.
    #[inline(always)]
    fn narrow(x: f32) -> Bf16 {
        Bf16(to_bf16(x))
    }
}

/// Sums that run side by side: a register of AVX-512, two of AVX2, four of SSE or NEON.
pub const LANES: usize = 16;

pub type Lanes = [f32; LANES];

/// The sum of all lanes, by halves.
#[inline(always)]
pub fn total(mut lanes: Lanes) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Σ term(a[i], b[i]); element i goes to lane i % LANES.
#[inline(always)]
pub fn sum2<A: Copy, B: Copy>(a: &[A], b: &[B], term: impl Fn(A, B) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (wholes_a, wholes_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (rest_a, rest_b) = (wholes_a.remainder(), wholes_b.remainder());
    for (a, b) in wholes_a.zip(wholes_b) {
        for i in 0..LANES {
            lanes[i] += term(a[i], b[i]);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(rest_a.iter().zip(rest_b)) {
        *lane += term(a, b);
    }
    total(lanes)
}

/// Σ term(a[i]), in the order of `sum2`.
#[inline(always)]
pub fn sum<A: Copy>(a: &[A], term: impl Fn(A) -> f32) -> f32 {
    sum2(a, a, |x, _| term(x))
}

/// The largest element.
#[inline(always)]
pub fn largest(a: &[f32]) -> f32 {
    let bigger = |x: f32, y: f32| if x > y { x } else { y };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let wholes = a.chunks_exact(LANES);
    let rest = wholes.remainder();
    for whole in wholes {
        for i in 0..LANES {
            lanes[i] = bigger(whole[i], lanes[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = bigger(x, *lane);
    }
    lanes.iter().fold(f32::NEG_INFINITY, |most, &x| bigger(x, most))
}

/// e^x to 2 units in the last place; 0 below −87.3, where the result would be no normal number. x is below 88.3.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts; n times the first is exact for |n| < 2^11.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it leaves no digits behind the point
    let clamped = if x > -87.3 { x } else { -87.3 };
    let shifted = clamped * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW; // |r| <= ln 2 / 2

    // The Taylor series to r^7: what is left out is below 2^-27 of the result.
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // 2^n: the integer stands in the last digits of `shifted`.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x > -87.3 {
        p * power
    } else if x.is_nan() {
        x
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_exact_to_two_units() {
        let mut x = -87.2f32;
        while x < 88.2 {
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / exact - 1.0).abs() < 2.0 * f64::from(f32::EPSILON), "{x}: {ours} {exact}");
            x += 0.000_731;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn bfloat16_rounds_to_the_nearest_even() {
        let round = |x: f32| Bf16::narrow(x).wide();
        assert_eq!([1.0, -2.5, 1.003_9, 1.003_91].map(round), [1.0, -2.5, 1.0, 1.007_812_5]);
        assert_eq!(round(1.0 + 1.0 / 256.0), 1.0); // exactly between 1 and 1.0078125
        assert_eq!(round(1.0 + 3.0 / 256.0), 1.015_625);
        assert_eq!(round(f32::INFINITY), f32::INFINITY);
        assert_eq!(round(f32::MAX), f32::INFINITY);
        assert!(round(f32::from_bits(0x7f80_0001)).is_nan());
    }

    #[test]
    fn sums_take_every_element_once() {
        for n in 0..50 {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(sum(&a, |x| x), (n * (n - 1).max(0) / 2) as f32);
            assert_eq!(largest(&a), if n > 0 { n as f32 - 1.0 } else { f32::NEG_INFINITY });
        }
    }
}
