//! The C ABI of the kernels: what `between.py` calls. The rules are those of the crate's `abi`.
//!
//! A dtype is 0 (float32) or 1 (bfloat16). All tensors are contiguous, aligned to their
//! elements, and do not overlap unless they are the same one.

use std::os::raw::{c_int, c_void};

use super::heads::{RotaryNorm, RotaryNormBack, Shape, MAX_HEAD};
use super::muon::{Apply, LookAhead};
use super::numbers::Bf16;
use super::rows::{AddNorm, AddNormBack, ReluSquared, ReluSquaredBack, FLAT};
use super::softmax::{Loss, Softmax, SoftmaxBack};
use super::team::{Parallel, Team};
use crate::abi::guarded;

/// Counts the functions and their arguments: `between.py` refuses a library with another number.
const VERSION: c_int = 5;

type Out = *mut c_void;
type In = *const c_void;

/// `$body` with the type `$name` that belongs to a dtype's number.
macro_rules! typed {
    ($code:expr, $name:ident, $body:expr) => {
        match $code {
            0 => {
                type $name = f32;
                $body
            }
            1 => {
                type $name = Bf16;
                $body
            }
            other => Err(format!("there is no dtype {other}")),
        }
    };
}

#[no_mangle]
pub extern "C" fn rustbpe_between_version() -> c_int {
    VERSION
}

/// # Safety
/// `parallel` is GOMP_parallel or null, as in all functions here; the tensors of `AddNorm` have so many rows.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_add_norm(
    parallel: Option<Parallel>,
    threads: usize,
    x_dtype: c_int,
    y_dtype: c_int,
    x: In,
    delta: In,
    r: Out,
    y: Out,
    scale: *mut f32,
    rows: usize,
    channels: usize,
    eps: f32,
) -> c_int {
    let team = Team { parallel, threads };
    guarded(|| {
        typed!(
            x_dtype,
            X,
            typed!(y_dtype, Y, {
                let (x, delta, r, y) = (x as *const X, delta as *const Y, r as *mut X, y as *mut Y);
                // SAFETY (of all blocks here): as the caller promises.
                unsafe { team.run(&AddNorm { x, delta, r, y, scale, channels, eps }, rows, channels) }
            })
        )
    })
}

/// # Safety
/// The tensors of `AddNormBack` have so many rows.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_add_norm_back(
    parallel: Option<Parallel>,
    threads: usize,
    x_dtype: c_int,
    y_dtype: c_int,
    r: In,
    scale: *const f32,
    dy: In,
    dr: In,
    dx: Out,
    ddelta: Out,
    rows: usize,
    channels: usize,
) -> c_int {
    let team = Team { parallel, threads };
    guarded(|| {
        typed!(
            x_dtype,
            X,
            typed!(y_dtype, Y, {
                let (r, dy, dr, dx) = (r as *const X, dy as *const Y, dr as *const X, dx as *mut X);
                let kernel = AddNormBack { r, scale, dy, dr, dx, ddelta: ddelta as *mut Y, channels };
                unsafe { team.run(&kernel, rows, channels) }
            })
        )
    })
}

/// # Safety
/// x and y have `len` elements.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_relu_squared(
    parallel: Option<Parallel>,
    threads: usize,
    dtype: c_int,
    x: In,
    y: Out,
    len: usize,
) -> c_int {
    let (team, rows) = (Team { parallel, threads }, (len + FLAT - 1) / FLAT);
    guarded(|| {
        typed!(dtype, X, unsafe { team.run(&ReluSquared { x: x as *const X, y: y as *mut X, len }, rows, FLAT) })
    })
}

/// # Safety
/// x, dy and dx have `len` elements; dx may be dy.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_relu_squared_back(
    parallel: Option<Parallel>,
    threads: usize,
    dtype: c_int,
    x: In,
    dy: In,
    dx: Out,
    len: usize,
) -> c_int {
    let (team, rows) = (Team { parallel, threads }, (len + FLAT - 1) / FLAT);
    guarded(|| {
        typed!(dtype, X, {
            let kernel = ReluSquaredBack { x: x as *const X, dy: dy as *const X, dx: dx as *mut X, len };
            unsafe { team.run(&kernel, rows, FLAT) }
        })
    })
}

/// # Safety
/// The tensors of `RotaryNorm` are there, as the shape says, with `sequences` · `shape.tokens` tokens.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_rotary_norm(
    parallel: Option<Parallel>,
    threads: usize,
    x_dtype: c_int,
    y_dtype: c_int,
    x: In,
    y: Out,
    scale: *mut f32,
    shape: *const Shape,
    sequences: usize,
    eps: f32,
) -> c_int {
    let team = Team { parallel, threads };
    guarded(|| {
        let shape = unsafe { checked(shape)? };
        let (rows, width) = (sequences * shape.tokens, shape.heads * shape.size);
        typed!(
            x_dtype,
            X,
            typed!(y_dtype, Y, {
                let kernel = RotaryNorm { x: x as *const X, y: y as *mut Y, scale, shape, eps };
                unsafe { team.run(&kernel, rows, width) }
            })
        )
    })
}

/// # Safety
/// As for `rustbpe_rotary_norm`.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_rotary_norm_back(
    parallel: Option<Parallel>,
    threads: usize,
    x_dtype: c_int,
    y_dtype: c_int,
    y: In,
    dy: In,
    scale: *const f32,
    dx: Out,
    shape: *const Shape,
    sequences: usize,
) -> c_int {
    let team = Team { parallel, threads };
    guarded(|| {
        let shape = unsafe { checked(shape)? };
        let (rows, width) = (sequences * shape.tokens, shape.heads * shape.size);
        typed!(
            x_dtype,
            X,
            typed!(y_dtype, Y, {
                let kernel = RotaryNormBack { y: y as *const Y, dy: dy as *const Y, scale, dx: dx as *mut X, shape };
                unsafe { team.run(&kernel, rows, width) }
            })
        )
    })
}

/// # Safety
/// `shape` is valid.
unsafe fn checked(shape: *const Shape) -> Result<Shape, String> {
    let shape = unsafe { *shape };
    if shape.size > MAX_HEAD || shape.size % 2 == 1 || shape.tokens == 0 || shape.x_heads < shape.heads {
        return Err(format!(
            "heads of {} are odd, larger than {MAX_HEAD} or too many, or there is no token",
            shape.size
        ));
    }
    Ok(shape)
}

/// # Safety
/// The tensors of `Softmax` have so many rows, and the mask as many as it says.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_softmax(
    parallel: Option<Parallel>,
    threads: usize,
    dtype: c_int,
    scores: Out,
    rows: usize,
    queries: usize,
    keys: usize,
    scale: f32,
    mask: *const u8,
    masked: usize,
    share: usize,
) -> c_int {
    let team = Team { parallel, threads };
    guarded(|| {
        typed!(dtype, X, {
            let kernel = Softmax { scores: scores as *mut X, queries, keys, scale, mask, masked, share };
            unsafe { team.run(&kernel, rows, keys) }
        })
    })
}

/// # Safety
/// p and dp have so many rows.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_softmax_back(
    parallel: Option<Parallel>,
    threads: usize,
    dtype: c_int,
    p: In,
    dp: Out,
    rows: usize,
    keys: usize,
    scale: f32,
) -> c_int {
    let team = Team { parallel, threads };
    guarded(|| {
        typed!(dtype, X, {
            unsafe { team.run(&SoftmaxBack { p: p as *const X, dp: dp as *mut X, keys, scale }, rows, keys) }
        })
    })
}

/// # Safety
/// The tensors of `Loss` have so many rows.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_loss(
    parallel: Option<Parallel>,
    threads: usize,
    dtype: c_int,
    logits: Out,
    targets: *const i64,
    losses: *mut f32,
    rows: usize,
    width: usize,
    vocab: usize,
    cap: f32,
) -> c_int {
    let team = Team { parallel, threads };
    guarded(|| {
        typed!(dtype, X, {
            let kernel = Loss { logits: logits as *mut X, targets, losses, width, vocab, cap };
            unsafe { team.run(&kernel, rows, width) }
        })
    })
}

/// # Safety
/// The tensors of `LookAhead` are there, for so many matrices.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_muon_look_ahead(
    parallel: Option<Parallel>,
    threads: usize,
    y_dtype: c_int,
    grads: *const *const f32,
    momentum: *mut f32,
    y: Out,
    matrices: usize,
    rows: usize,
    columns: usize,
    multiplier: f32,
    beta: f32,
    equalize: usize,
    safety: f32,
) -> c_int {
    let team = Team { parallel, threads };
    guarded(|| {
        typed!(y_dtype, Y, {
            let y = y as *mut Y;
            let kernel = LookAhead { grads, momentum, y, rows, columns, multiplier, beta, equalize, safety };
            unsafe { team.run(&kernel, matrices, rows * columns) }
        })
    })
}

/// # Safety
/// The tensors of `Apply` are there, for so many matrices.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_muon_apply(
    parallel: Option<Parallel>,
    threads: usize,
    dtype: c_int,
    update: In,
    params: *const *mut f32,
    moment: *mut f32,
    matrices: usize,
    by_rows: usize,
    rows: usize,
    columns: usize,
    beta2: f32,
    rate: f32,
    decay: f32,
    cautious: usize,
) -> c_int {
    let team = Team { parallel, threads };
    guarded(|| {
        typed!(dtype, Y, {
            let update = update as *const Y;
            let kernel = Apply { update, params, moment, by_rows, rows, columns, beta2, rate, decay, cautious };
            unsafe { team.run(&kernel, matrices, rows * columns) }
        })
    })
}

/// Attention and Muon's products by AMX; without these functions, or without tiles, there are none.
#[cfg(all(target_os = "linux", target_arch = "x86_64", avx512))]
mod by_tiles {
    use super::*;
    use crate::between::attend::{Attend, AttendBack, Shape, View};
    use crate::between::newton::Orthogonalize;
    use crate::decode::Level;

    #[no_mangle]
    pub extern "C" fn rustbpe_tiles_available() -> c_int {
        c_int::from(available())
    }

    fn available() -> bool {
        Level::available().contains(&Level::Amx)
    }

    fn in_tiles(sizes: &[usize]) -> Result<(), String> {
        match available() && sizes.iter().all(|&size| size > 0 && size % 32 == 0) {
            true => Ok(()),
            false => Err(format!("there are no tiles for sizes of {sizes:?}")),
        }
    }

    /// # Safety
    /// The tensors of `Orthogonalize` are there, for so many matrices.
    #[no_mangle]
    pub unsafe extern "C" fn rustbpe_muon_orthogonalize(
        parallel: Option<Parallel>,
        threads: usize,
        x: In,
        y: Out,
        matrices: usize,
        rows: usize,
        columns: usize,
        coefficients: *const [f32; 3],
        iterations: usize,
    ) -> c_int {
        let team = Team { parallel, threads };
        guarded(|| {
            in_tiles(&[rows, columns])?;
            let (x, y) = (x as *const Bf16, y as *mut Bf16);
            let kernel = Orthogonalize { x, y, rows, columns, coefficients, iterations };
            unsafe { team.run(&kernel, matrices, rows * columns) }
        })
    }

    /// # Safety
    /// `views` are q, k, v and y of `Attend`, with `sequences`; the shape is valid.
    #[no_mangle]
    pub unsafe extern "C" fn rustbpe_attend(
        parallel: Option<Parallel>,
        threads: usize,
        views: *const View,
        sums: *mut f32,
        shape: *const Shape,
        sequences: usize,
    ) -> c_int {
        let team = Team { parallel, threads };
        guarded(|| unsafe {
            let (shape, &[q, k, v, y]) = (known(shape)?, &*(views as *const [View; 4]));
            let heads = sequences * shape.kv_heads;
            team.run(&Attend { q, k, v, y, sums, shape }, heads, shape.tokens * shape.size)
        })
    }

    /// # Safety
    /// `views` are q, k, v, y, dy, dq, dk and dv of `AttendBack`, with `sequences`; the shape is valid.
    #[no_mangle]
    pub unsafe extern "C" fn rustbpe_attend_back(
        parallel: Option<Parallel>,
        threads: usize,
        views: *const View,
        sums: *mut f32,
        shape: *const Shape,
        sequences: usize,
    ) -> c_int {
        let team = Team { parallel, threads };
        guarded(|| unsafe {
            let (shape, &[q, k, v, y, dy, dq, dk, dv]) = (known(shape)?, &*(views as *const [View; 8]));
            let heads = sequences * shape.kv_heads;
            let kernel = AttendBack { q, k, v, y, dy, dq, dk, dv, sums, shape };
            team.run(&kernel, heads, shape.tokens * shape.size)
        })
    }

    /// # Safety
    /// `shape` is valid.
    unsafe fn known(shape: *const Shape) -> Result<Shape, String> {
        let shape = unsafe { *shape };
        in_tiles(&[shape.tokens, shape.size])?;
        if shape.kv_heads == 0 || shape.heads % shape.kv_heads != 0 {
            return Err("the heads of keys do not divide those of queries".into());
        }
        Ok(shape)
    }
}
