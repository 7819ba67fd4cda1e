//! The C ABI of the decoder: what `decoding.py` calls. The rules are those of the crate's `abi`.

use std::os::raw::c_int;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::choose::{choose, Room, Sampling};
use super::{Ahead, Cache, Decoder, Format, LayerWeights, Level, Recall, Weights};
use crate::abi::{borrow, free, guarded, put, view, view_mut};
use crate::matches::Text;

/// Counts the layouts below: `decoding.py` refuses a library with another number.
const VERSION: c_int = 5;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawFloats {
    data: *const f32,
    len: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawTokens {
    data: *const i32,
    len: usize,
}

#[repr(C)]
pub struct RawLayer {
    query: RawFloats,
    key: RawFloats,
    value: RawFloats,
    output: RawFloats,
    hidden: RawFloats,
    residual: RawFloats,
    value_table: RawFloats,
    value_gate: RawFloats,
    keep: f32,
    again: f32,
    scale: f32,
    window: usize,
}

#[repr(C)]
pub struct RawModel {
    layers: *const RawLayer,
    num_layers: usize,
    channels: usize,
    mlp: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    key_offset: usize,
    embedding: RawFloats,
    head: RawFloats,
    smear_gate: RawFloats,
    cos: RawFloats,
    sin: RawFloats,
    /// Of recall; empty where it is off.
    text: RawTokens,
    order: RawTokens,
    token_weights: RawTokens,
    followers: RawFloats,
    trust: RawFloats,
    follower_scale: RawFloats,
    smear: f32,
    backout: f32,
    softcap: f32,
    eps: f32,
}

/// The key/value cache; `len` floats in keys and as many in values, (layers, rows, positions, K, D) both.
#[repr(C)]
pub struct RawCache {
    keys: *mut u8,
    values: *mut u8,
    len: usize,
    /// Bytes of a float: 4 or 2 (bfloat16).
    width: usize,
    rows: usize,
    positions: usize,
    /// (rows, token_positions), or null.
    tokens: *mut i64,
    token_positions: usize,
}

/// A decoder, one step at a time, and the floats of its cache for one row and one position.
pub struct Guarded {
    decoder: Mutex<Decoder>,
    layers: usize,
    kv_width: usize,
}

impl Guarded {
    fn lock(&self) -> MutexGuard<'_, Decoder> {
        self.decoder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// The cache does not belong to this model.
    fn cache(&self, raw: &RawCache) -> Result<Cache, String> {
        let floats = [raw.rows, raw.positions, self.kv_width].iter().try_fold(self.layers, |a, &b| a.checked_mul(b));
        if raw.keys.is_null() || raw.values.is_null() || floats != Some(raw.len) || !matches!(raw.width, 2 | 4) {
            return Err("the cache has another shape than the model".into());
        }
        Ok(Cache {
            keys: raw.keys,
            values: raw.values,
            bf16: raw.width == 2,
            rows: raw.rows,
            positions: raw.positions,
            tokens: raw.tokens,
            token_positions: raw.token_positions,
        })
    }
}

impl RawFloats {
    /// # Safety
    /// `data` is valid for `len` floats for as long as the decoder lives.
    unsafe fn get(self) -> Result<&'static [f32], String> {
        // SAFETY: as the caller promises.
        unsafe { view(self.data, self.len) }
    }
}

#[no_mangle]
pub extern "C" fn rustbpe_decoder_version() -> c_int {
    VERSION
}

/// Makes a decoder. `format`: 0 float32, 1 bfloat16, 2 8 bits, 3 4 bits; `level`: 0 the best, 1 portable, 2 AVX2, 3 AVX-512, 4 AMX.
///
/// # Safety
/// `model` and what it points to are valid; all floats and tokens stay where they are, and do not change during a step, until the
/// decoder is freed. `out` is valid for writing a pointer.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_decoder_new(
    model: *const RawModel,
    format: usize,
    level: usize,
    threads: usize,
    out: *mut *mut Guarded,
) -> c_int {
    guarded(|| {
        // SAFETY: as the caller promises.
        unsafe {
            let raw = borrow(model)?;
            let mut layers = Vec::new();
            for layer in view(raw.layers, raw.num_layers)? {
                layers.push(LayerWeights {
                    query: layer.query.get()?,
                    key: layer.key.get()?,
                    value: layer.value.get()?,
                    output: layer.output.get()?,
                    hidden: layer.hidden.get()?,
                    residual: layer.residual.get()?,
                    value_table: layer.value_table.get()?,
                    value_gate: layer.value_gate.get()?,
                    keep: layer.keep,
                    again: layer.again,
                    scale: layer.scale,
                    window: layer.window,
                });
            }
            let recall = match view(raw.text.data, raw.text.len)? {
                [] => None,
                text => {
                    let (order, weights) =
                        (view(raw.order.data, raw.order.len)?, view(raw.token_weights.data, raw.token_weights.len)?);
                    let (trust, scale) = (raw.trust.get()?, raw.follower_scale.get()?);
                    Some(Recall {
                        text: Text::new(text, order, weights)?,
                        followers: raw.followers.get()?,
                        trust,
                        scale,
                    })
                }
            };
            let weights = Weights {
                channels: raw.channels,
                mlp: raw.mlp,
                heads: raw.heads,
                kv_heads: raw.kv_heads,
                vocab: raw.vocab,
                key_offset: raw.key_offset != 0,
                layers,
                embedding: raw.embedding.get()?,
                head: raw.head.get()?,
                recall,
                smear_gate: raw.smear_gate.get()?,
                smear: raw.smear,
                backout: raw.backout,
                softcap: raw.softcap,
                eps: raw.eps,
                cos: raw.cos.get()?,
                sin: raw.sin.get()?,
            };
            let format = match format {
                0 => Format::F32,
                1 => Format::Bf16,
                2 => Format::Int8,
                3 => Format::Int4,
                other => return Err(format!("there is no format {other}")),
            };
            let level = match level {
                0 => None,
                1 => Some(Level::Portable),
                2 => Some(Level::Avx2),
                3 => Some(Level::Avx512),
                4 => Some(Level::Amx),
                other => return Err(format!("there is no level {other}")),
            };
            if threads == 0 || threads > 1024 {
                return Err(format!("{threads} threads are not possible"));
            }
            let decoder = Decoder::new(weights, format, level, threads)?;
            let kv_width = raw.channels / raw.heads * raw.kv_heads;
            let made = Guarded { decoder: Mutex::new(decoder), layers: raw.num_layers, kv_width };
            put(out, Box::into_raw(Box::new(made)));
        }
        Ok(())
    })
}

/// Runs one token for each of `batch` rows of the cache from `first_row` on, and writes logits (batch, vocabulary).
///
/// # Safety
/// `decoder` is a live handle; the cache's pointers are valid for its shape, `ids` and `positions` for `batch` numbers,
/// `logits` for writing `num_logits`; nobody else uses the cache meanwhile.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_decoder_step(
    decoder: *const Guarded,
    cache: *const RawCache,
    ids: *const i64,
    positions: *const i64,
    batch: usize,
    first_row: usize,
    logits: *mut f32,
    num_logits: usize,
) -> c_int {
    guarded(|| {
        // SAFETY: as the caller promises.
        unsafe {
            let (guarded, ids, positions) = (borrow(decoder)?, view(ids, batch)?, view(positions, batch)?);
            let cache = guarded.cache(borrow(cache)?)?;
            guarded.lock().step(ids, positions, first_row, cache, view_mut(logits, num_logits)?)
        }
    })
}

/// What `Ahead` has, `steps` for each of `batch` rows.
#[repr(C)]
pub struct RawAhead {
    sampling: *const Sampling,
    uniforms: *const f32,
    stops: *const i64,
    num_stops: usize,
    chosen: *mut i64,
    steps: usize,
}

/// Runs up to `ahead.steps` steps, see `Decoder::ahead`; writes how many to `done`.
///
/// # Safety
/// As for `rustbpe_decoder_step`; what `ahead` points to is valid for its sizes, `done` for writing.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_decoder_ahead(
    decoder: *const Guarded,
    cache: *const RawCache,
    ids: *const i64,
    positions: *const i64,
    batch: usize,
    first_row: usize,
    ahead: *const RawAhead,
    done: *mut usize,
) -> c_int {
    guarded(|| {
        // SAFETY: as the caller promises.
        unsafe {
            let (guarded, ids, positions) = (borrow(decoder)?, view(ids, batch)?, view(positions, batch)?);
            let (cache, raw) = (guarded.cache(borrow(cache)?)?, borrow(ahead)?);
            let tokens = raw.steps.checked_mul(batch).ok_or("too many steps")?;
            let ahead = Ahead {
                sampling: view(raw.sampling, batch)?,
                uniforms: view(raw.uniforms, tokens)?,
                stops: view(raw.stops, raw.num_stops)?,
                chosen: view_mut(raw.chosen, tokens)?,
            };
            put(done, guarded.lock().ahead(ids, positions, first_row, cache, ahead)?);
        }
        Ok(())
    })
}

/// Chooses a token from each row of logits (batch, vocab); see `choose`.
///
/// # Safety
/// `logits` is valid for that many floats, `sampling` for one, `uniforms` and `chosen` for `batch`.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_choose(
    logits: *const f32,
    batch: usize,
    vocab: usize,
    sampling: *const Sampling,
    uniforms: *const f32,
    chosen: *mut i64,
) -> c_int {
    guarded(|| {
        let numbers = batch.checked_mul(vocab).filter(|&n| n > 0).ok_or("there are no logits")?;
        // SAFETY: as the caller promises.
        unsafe {
            let (logits, sampling) = (view(logits, numbers)?, borrow(sampling)?);
            let (uniforms, mut room) = (view(uniforms, batch)?, Room::default());
            for ((token, logits), uniform) in
                view_mut(chosen, batch)?.iter_mut().zip(logits.chunks_exact(vocab)).zip(uniforms)
            {
                *token = choose(logits, sampling, *uniform, &mut room);
            }
        }
        Ok(())
    })
}

/// # Safety
/// `decoder` is null or a live handle, which ends here.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_decoder_free(decoder: *mut Guarded) {
    // SAFETY: as the caller promises.
    unsafe { free(decoder) }
}
