//! The next token from its logits: the likeliest one, or one that is drawn.
//!
//! `sample` of nanochat/generate/sampling.py has the same in torch. Probabilities are in float32 as there, and equal
//! within rounding: both take the same token, unless the random number falls between two that differ by it.

use crate::between::numbers::{exp, largest};

/// Stands for a token where the logits are not numbers.
pub const NOT_FINITE: i64 = -1;

/// How a sequence's tokens are chosen.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Sampling {
    /// 0: the likeliest.
    pub temperature: f32,
    /// Only the likeliest that together reach this probability; 1: all.
    pub top_p: f32,
    /// Only those at least this many times as likely as the likeliest; 0: all.
    pub min_p: f32,
    /// Only so many; 0: all.
    pub top_k: usize,
}

/// Memory that is kept from one token to the next.
#[derive(Default)]
pub struct Room {
    sorted: Vec<f32>,
    ids: Vec<u32>,
    p: Vec<f32>,
}

/// The token of these logits; `uniform` is a random number in [0, 1), which is not needed for the likeliest.
pub fn choose(logits: &[f32], how: &Sampling, uniform: f32, room: &mut Room) -> i64 {
    let most = largest(logits);
    if most.is_infinite() || logits.iter().fold(false, |any, x| any | x.is_nan()) {
        return NOT_FINITE;
    }
    if how.temperature <= 0.0 {
        return logits.iter().position(|&x| x == most).map_or(NOT_FINITE, |i| i as i64);
    }
    let Room { sorted, ids, p } = room;
    let all = logits.len();
    let top_k = if how.top_k == 0 { all } else { how.top_k.min(all) };
    let chosen = top_k < all || how.top_p < 1.0; // else all, in the order of their ids
    ids.clear();
    if top_k < all {
        sorted.clear();
        sorted.extend_from_slice(logits);
        let (_, &mut bound, _) = sorted.select_nth_unstable_by(all - top_k, f32::total_cmp);
        ids.extend((0..all as u32).filter(|&i| logits[i as usize] >= bound));
    } else if chosen {
        ids.extend(0..all as u32);
    }
    if chosen {
        // The likeliest first, of equal ones the lower token.
        ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        ids.truncate(top_k);
    }
    let top = most / how.temperature;
    let weight = |x: f32| exp(x / how.temperature - top);
    p.clear();
    if chosen {
        p.extend(ids.iter().map(|&i| weight(logits[i as usize])));
    } else {
        p.extend(logits.iter().map(|&x| weight(x)));
    }
    let sum: f64 = p.iter().map(|&p| f64::from(p)).sum();
    if !sum.is_finite() {
        return NOT_FINITE; // a finite logit over a small temperature need not be finite
    }
    p.iter_mut().for_each(|p| *p /= sum as f32);
    if how.min_p > 0.0 {
        let least = how.min_p * largest(p);
        p.iter_mut().for_each(|p| *p = if *p >= least { *p } else { 0.0 });
    }
    let mut total = running(p, 0, f32::INFINITY).1;
    if how.top_p < 1.0 {
        let enough = if how.min_p > 0.0 { how.top_p * total } else { how.top_p };
        // Those whose betters do not reach it yet.
        let mut sum = 0.0;
        for p in p.iter_mut() {
            sum += f64::from(*p);
            *p = if sum as f32 - *p < enough { *p } else { 0.0 };
        }
        total = running(p, 0, f32::INFINITY).1;
    }
    // The first token whose running total exceeds a random share of it all; a share of all of it may be rounded up.
    const BELOW_ONE: f32 = 1.0 - f32::EPSILON;
    let (at, _) = running(p, p.len() - 1, uniform.min(BELOW_ONE) * total);
    if chosen {
        i64::from(ids[at])
    } else {
        at as i64
    }
}

/// The first place whose running total exceeds `bound`, `else_at` if none does; and the total there or of all.
fn running(p: &[f32], else_at: usize, bound: f32) -> (usize, f32) {
    let mut total = 0.0;
    for (i, &p) in p.iter().enumerate() {
        total += f64::from(p);
        if total as f32 > bound {
            return (i, total as f32);
        }
    }
    (else_at, total as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, min_p: 0.0, top_k: 0 };

    #[test]
    fn the_likeliest_or_nothing() {
        let mut room = Room::default();
        let mut greedy = |logits: &[f32]| choose(logits, &GREEDY, 0.0, &mut room);
        assert_eq!(greedy(&[1.0, 3.0, 3.0, f32::NEG_INFINITY]), 1);
        assert_eq!(greedy(&[1.0, f32::INFINITY]), NOT_FINITE);
        assert_eq!(greedy(&[1.0, f32::NAN]), NOT_FINITE);
        assert_eq!(greedy(&[f32::NEG_INFINITY; 20]), NOT_FINITE);
    }

    #[test]
    fn a_share_of_the_total_picks_the_token() {
        let logits = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln);
        let mut room = Room::default();
        let mut drawn = |how: Sampling, uniform: f32| choose(&logits, &how, uniform, &mut room);
        let plain = Sampling { temperature: 1.0, ..GREEDY };
        assert_eq!([0.05, 0.25, 0.55, 0.65, 1.0].map(|u| drawn(plain, u)), [0, 1, 2, 3, 3]);
        // Sorted, the likeliest first: 3 has 4/7 of the two that are left, then 2.
        assert_eq!([0.5, 0.6].map(|u| drawn(Sampling { top_k: 2, ..plain }, u)), [3, 2]);
        assert_eq!([0.5, 0.6].map(|u| drawn(Sampling { top_p: 0.5, ..plain }, u)), [3, 2]);
        assert_eq!([0.4, 0.5].map(|u| drawn(Sampling { min_p: 0.7, ..plain }, u)), [2, 3]);
    }
}
