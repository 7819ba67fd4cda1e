//! The decode step: one token for each of a few sequences, through the whole model, in one call.
//!
//! The arithmetic is that of `nanochat/gpt.py`, with all its switches; sums are in float32. What it costs is reading the
//! weights, so they are kept as small as the caller wants ([`Format`]), read once for all sequences ([`dot`], `amx`) and shared
//! among threads that stay ([`pool`]). A layer has five phases: query, key and value; attention; its output; and the two
//! matrices of the MLP. Norms and residuals are no phases of their own: each thread norms what it is about to multiply.
//!
//! Shapes: B sequences, C channels, H query heads, K key/value heads, D head size, T positions of the cache.

pub mod abi;
#[cfg(all(target_os = "linux", target_arch = "x86_64", avx512))]
#[allow(clippy::incompatible_msrv)] // build.rs looks which Rust compiles it
pub(crate) mod amx;
pub mod choose;
pub mod dot;
mod four;
mod memory;
mod pool;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::UnsafeCell;
use std::ops::Range;

use choose::{choose, Room, Sampling, NOT_FINITE};
use dot::{from_bf16, fused, multiply, quantize, to_bf16, Dot, Out, Portable, Processor, Product};
use memory::Buffer;
use pool::{Job, Pool};

use crate::matches::{Text, FOLLOWERS, KINDS, LEVELS, LONGEST, SHORTEST, WINDOW};

/// Phases of a layer.
const PROJECT: usize = 0;
const ATTEND: usize = 1;
const OUTPUT: usize = 2;
const HIDDEN: usize = 3;
const PHASES: usize = 5;

/// Chunks per thread and phase: enough to share with a thread that is late. And the fewest outputs of one.
const CHUNKS_PER_THREAD: usize = 4;
const LEAST_ROWS: usize = 16;

/// What a matrix is kept as: as it is, in bfloat16, in 8 bits with a scale for each output, or in 4 bits with one for each 32
/// weights. The head is in 8 bits then: there rounding costs most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    F32,
    Bf16,
    Int8,
    Int4,
}

impl Format {
    /// Bytes of a weight; of two in 4 bits, whose rows are no bytes one after another.
    fn bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::Bf16 => 2,
            Format::Int8 | Format::Int4 => 1,
        }
    }
}

/// Instructions to use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    Portable,
    Avx2,
    Avx512,
    /// AVX-512, and tiles for bfloat16 and 8 bits.
    Amx,
}

impl Level {
    /// All that this processor has, the best one last.
    pub fn available() -> Vec<Level> {
        #[allow(unused_mut)]
        let mut levels = vec![Level::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                levels.push(Level::Avx2);
                #[cfg(avx512)]
                // All that `chunk_avx512` enables: the compiler may use any of it.
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512bf16")
                {
                    levels.push(Level::Avx512);
                    #[cfg(target_os = "linux")]
                    if amx::available() {
                        levels.push(Level::Amx);
                    }
                }
            }
        }
        levels
    }
}

type Floats = &'static [f32];

/// A matrix (rows, columns); where its rows begin, in the model's format.
struct Matrix {
    weights: *const u8,
    rows: usize,
    columns: usize,
    /// For each row, in 8 bits; else empty.
    scales: Vec<f32>,
}

/// A layer as the caller gives it; a matrix is (outputs, inputs).
pub struct LayerWeights {
    pub query: Floats,
    pub key: Floats,
    pub value: Floats,
    pub output: Floats,
    pub hidden: Floats,
    pub residual: Floats,
    /// (vocabulary, K·D) and (K, channels), or both empty.
    pub value_table: Floats,
    pub value_gate: Floats,
    /// The layer begins with x = keep · x + again · x0.
    pub keep: f32,
    pub again: f32,
    /// On the products of queries and keys.
    pub scale: f32,
    /// Tokens before its own that a query sees.
    pub window: usize,
}

/// How good the best matches are: their length, their number, their level in grades. As in nanochat/ops/recall.py.
const SURENESS: [usize; 3] = [LONGEST - SHORTEST + 1, 4, 4];

/// The text in which a model looks up its last tokens, and what it makes of what followed there.
pub struct Recall {
    pub text: Text<'static>,
    /// (vocabulary or more, C), of the tokens that followed.
    pub followers: Floats,
    /// By the length of a match, and by its level.
    pub trust: Floats,
    /// A factor for each sureness, (…, C).
    pub scale: Floats,
}

/// A model as the caller gives it. Switches that are off have empty slices or neutral numbers.
pub struct Weights {
    pub channels: usize,
    pub mlp: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocab: usize,
    pub key_offset: bool,
    pub layers: Vec<LayerWeights>,
    /// (vocabulary or more, C).
    pub embedding: Floats,
    pub head: Floats,
    pub recall: Option<Recall>,
    pub smear_gate: Floats,
    pub smear: f32,
    pub backout: f32,
    /// Bound of the logits; 0: none.
    pub softcap: f32,
    pub eps: f32,
    /// (positions, D).
    pub cos: Floats,
    pub sin: Floats,
}

struct Layer {
    weights: LayerWeights,
    project: Vec<Matrix>,
    output: Vec<Matrix>,
    hidden: Vec<Matrix>,
    residual: Vec<Matrix>,
}

/// The key/value cache, (layers, rows, T, K, D) both; of a kind of floats.
#[derive(Clone, Copy)]
pub struct Cache {
    pub keys: *mut u8,
    pub values: *mut u8,
    pub bf16: bool,
    pub rows: usize,
    pub positions: usize,
    /// (rows, token_positions) ids, for the switches that look at the tokens before; else null.
    pub tokens: *mut i64,
    pub token_positions: usize,
}

/// What a step is asked for.
struct Call {
    serial: u64,
    ids: Vec<usize>,
    positions: Vec<usize>,
    cache: Cache,
    first_row: usize,
    logits: *mut f32,
}

/// Floats that the threads write at different places, or read after the phase that wrote them.
struct Common(UnsafeCell<Buffer<f32>>);

impl Common {
    fn new() -> Self {
        Common(UnsafeCell::new(Buffer::new(0)))
    }

    /// # Safety
    /// Nobody writes there meanwhile.
    unsafe fn read(&self, range: Range<usize>) -> &[f32] {
        // SAFETY: as the caller promises.
        unsafe { &(&*self.0.get())[range] }
    }

    /// # Safety
    /// Nobody else reads or writes there meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn write(&self, range: Range<usize>) -> &mut [f32] {
        // SAFETY: as the caller promises. The slice is made from its first element, so that the rest is not borrowed.
        unsafe {
            let buffer = &*self.0.get();
            assert!(range.start <= range.end && range.end <= buffer.len());
            std::slice::from_raw_parts_mut((buffer.as_ptr() as *mut f32).add(range.start), range.len())
        }
    }
}

/// What one thread alone uses.
struct Scratch {
    /// The call and the phase whose inputs are prepared.
    ready: (u64, usize),
    inputs: Buffer<f32>,
    factors: Vec<f32>,
    row: Buffer<f32>,
    heads: Buffer<f32>,
    scores: Buffer<f32>,
    products: Buffer<f32>,
}

/// The part of the decoder that the threads share.
struct Step {
    format: Format,
    head_format: Format,
    entry: unsafe fn(&Step, usize, usize, usize),
    weights: Weights,
    layers: Vec<Layer>,
    head: Vec<Matrix>,
    /// The matrices, where they are not the caller's.
    _store: Buffer<u8>,
    call: UnsafeCell<Call>,
    /// The residual stream, its beginning and its middle (B, C).
    x: Common,
    x0: Common,
    middle: Common,
    /// (B, (H + 2K)·D), (B, C), (B, 4C).
    qkv: Common,
    attended: Common,
    hidden: Common,
    scratch: Vec<UnsafeCell<Scratch>>,
    threads: usize,
}

// SAFETY: the pool runs phases one after another, and the chunks of a phase write at different places. Pointers are to
// memory that the caller keeps.
unsafe impl Send for Step {}
// SAFETY: as above.
unsafe impl Sync for Step {}

/// A model that decodes. Made once; the caller's slices must live as long.
pub struct Decoder {
    pool: Pool<Step>,
    serial: u64,
    batch: usize,
    logits: Vec<f32>,
    room: Room,
}

/// What `Decoder::ahead` is asked for.
pub struct Ahead<'a> {
    /// Of each row.
    pub sampling: &'a [Sampling],
    /// (steps, B) random numbers.
    pub uniforms: &'a [f32],
    /// Tokens after which Python must look.
    pub stops: &'a [i64],
    /// (steps, B), room for the tokens.
    pub chosen: &'a mut [i64],
}

/// The chunks of `rows` outputs for a number of threads, and the outputs of each.
fn chunks(rows: usize, threads: usize) -> (usize, usize) {
    let size = (rows + threads * CHUNKS_PER_THREAD - 1) / (threads * CHUNKS_PER_THREAD);
    let size = (size.max(LEAST_ROWS) + 15) / 16 * 16; // whole tiles
    ((rows + size - 1) / size, size)
}

fn check(len: usize, expected: Option<usize>, what: &str) -> Result<(), String> {
    if Some(len) == expected {
        return Ok(());
    }
    Err(format!("{what} has {len} numbers, expected {expected:?}"))
}

impl Recall {
    /// Adds what followed the longest matches of a context: `Recall.forward` has the arithmetic.
    fn add(&self, context: &[i64], out: &mut [f32]) -> Result<(), String> {
        let mut last = [0; WINDOW];
        last.iter_mut().zip(context).for_each(|(last, &token)| *last = i32::try_from(token).unwrap_or(-1));
        let found = self.text.find(&last[..context.len().min(WINDOW)])?;
        let kinds = found
            .map(|packed| (packed.rem_euclid(KINDS) as usize / LEVELS, packed.rem_euclid(KINDS) as usize % LEVELS));
        let all = kinds.iter().take_while(|(length, _)| *length > 0).count();
        if all == 0 {
            return Ok(());
        }
        let c = out.len();
        let mut shares = [0.0; FOLLOWERS];
        let mut most = f32::NEG_INFINITY;
        for (share, (length, level)) in shares.iter_mut().zip(&kinds[..all]) {
            *share = self.trust[*length] + self.trust[LONGEST + 1 + level];
            most = most.max(*share);
        }
        shares[..all].iter_mut().for_each(|share| *share = (*share - most).exp());
        let sum: f32 = shares[..all].iter().sum();
        let mut mean = vec![0.0; c];
        for (share, packed) in shares[..all].iter().zip(&found) {
            let at = packed.div_euclid(KINDS) as usize; // a negative one becomes large
            let row = at
                .checked_mul(c)
                .and_then(|first| self.followers.get(first..)?.get(..c))
                .ok_or("the text has a token that is not in the vocabulary")?;
            mean.iter_mut().zip(row).for_each(|(mean, row)| *mean += share / sum * row);
        }
        let [_, many, grades] = SURENESS;
        let longest = kinds[0].0;
        let number = kinds[..all].iter().filter(|kind| kind.0 == longest).count().min(many) - 1;
        let grade = kinds[..all].iter().map(|kind| kind.1).max().unwrap_or(0) * grades / LEVELS;
        let sureness = ((longest - SHORTEST) * many + number) * grades + grade;
        let scale = &self.scale[sureness * c..(sureness + 1) * c];
        for i in 0..c {
            out[i] += mean[i] * scale[i];
        }
        Ok(())
    }
}

impl Weights {
    fn head_dim(&self) -> usize {
        self.channels / self.heads
    }

    /// The width of query, key and value together.
    fn qkv(&self) -> usize {
        self.channels + 2 * self.kv_heads * self.head_dim()
    }

    /// Everything that a step will read must be there.
    fn check(&self) -> Result<(), String> {
        let (c, h, k) = (self.channels, self.heads, self.kv_heads);
        if c == 0 || h == 0 || k == 0 || self.mlp == 0 || self.vocab == 0 || c % (2 * h) != 0 || h % k != 0 {
            return Err("the shape of the model is impossible".into());
        }
        let head_dim = self.head_dim();
        if self.key_offset && head_dim % 4 != 0 {
            return Err("key_offset needs heads of a multiple of 4 channels".into());
        }
        let square = |rows: usize, columns: usize| rows.checked_mul(columns);
        for layer in &self.layers {
            check(layer.query.len(), square(c, c), "query")?;
            check(layer.key.len(), square(k * head_dim, c), "key")?;
            check(layer.value.len(), square(k * head_dim, c), "value")?;
            check(layer.output.len(), square(c, c), "output")?;
            check(layer.hidden.len(), square(self.mlp, c), "hidden")?;
            check(layer.residual.len(), square(self.mlp, c), "residual")?;
            let gated = !layer.value_gate.is_empty();
            let enough = layer.value_table.len() >= if gated { self.vocab * k * head_dim } else { 0 };
            if !enough || layer.value_gate.len() % k != 0 || layer.value_gate.len() / k > c {
                return Err("the value embeddings have another size".into());
            }
        }
        check(self.head.len(), square(self.vocab, c), "head")?;
        check(self.sin.len(), Some(self.cos.len()), "sin")?;
        let rows = self.embedding.len() / c;
        if rows < self.vocab || self.cos.len() % head_dim != 0 || self.smear_gate.len() > c {
            return Err("the embedding or a table has another size".into());
        }
        if let Some(recall) = &self.recall {
            check(recall.scale.len(), square(SURENESS.iter().product(), c), "recall's scale")?;
            check(recall.trust.len(), Some(LONGEST + 1 + LEVELS), "recall's trust")?;
            if recall.followers.len() / c < self.vocab {
                return Err("recall's table has another size".into());
            }
        }
        Ok(())
    }
}

impl Decoder {
    /// # Errors
    /// Sizes that do not belong together, or instructions that this processor does not have.
    pub fn new(weights: Weights, format: Format, level: Option<Level>, threads: usize) -> Result<Decoder, String> {
        weights.check()?;
        let available = Level::available();
        let level = level.unwrap_or(available[available.len() - 1]);
        if !available.contains(&level) {
            return Err(format!("this processor or this build has no {level:?}"));
        }
        let entry: unsafe fn(&Step, usize, usize, usize) = match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => chunk_avx2,
            #[cfg(all(target_arch = "x86_64", avx512))]
            Level::Avx512 => chunk_avx512,
            #[cfg(all(target_os = "linux", target_arch = "x86_64", avx512))]
            Level::Amx => chunk_amx,
            _ => chunk_portable,
        };
        let mut step = Step::new(weights, format, level, entry)?;
        step.set_threads(threads);
        let phases = step.layers.len() * PHASES + 1;
        let (logits, room) = (Vec::new(), Room::default());
        Ok(Decoder { pool: Pool::new(step, phases, threads)?, serial: 0, batch: 0, logits, room })
    }

    /// The number of tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.pool.job().weights.vocab
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs one token for each of some neighbouring rows of the cache, from `first_row` on, each at its position, and
    /// stores its key and value there. `logits` has room for (B, vocabulary).
    ///
    /// # Safety
    /// The cache's pointers are valid for its shape, and nobody else uses it or the logits meanwhile.
    pub unsafe fn step(
        &mut self,
        ids: &[i64],
        positions: &[i64],
        first_row: usize,
        cache: Cache,
        logits: &mut [f32],
    ) -> Result<(), String> {
        let step = self.pool.job();
        let w = &step.weights;
        let batch = ids.len();
        if batch == 0 || positions.len() != batch || first_row.checked_add(batch).map_or(true, |end| end > cache.rows) {
            return Err("the rows are not in the cache".into());
        }
        check(logits.len(), batch.checked_mul(w.vocab), "logits")?;
        if ids.iter().any(|&id| id < 0 || id as usize >= w.vocab) {
            return Err(format!("a token is outside the vocabulary of {}", w.vocab));
        }
        let room = (w.cos.len() / w.head_dim()).min(cache.positions - usize::from(w.key_offset).min(cache.positions));
        let remembers = w.recall.is_some() || !w.smear_gate.is_empty();
        if remembers && cache.tokens.is_null() {
            return Err("this model needs the tokens before".into());
        }
        let room = if remembers { room.min(cache.token_positions) } else { room };
        if positions.iter().any(|&p| p < 0 || p as usize >= room) {
            return Err(format!("a position is outside the {room} that there is room for"));
        }
        self.serial += 1;
        // SAFETY: between two runs nobody else looks at the job.
        unsafe {
            if batch > self.batch {
                step.grow(batch);
                self.batch = batch;
            }
            let call = &mut *step.call.get();
            call.serial = self.serial;
            call.ids.clear();
            call.ids.extend(ids.iter().map(|&id| id as usize));
            call.positions.clear();
            call.positions.extend(positions.iter().map(|&p| p as usize));
            (call.cache, call.first_row, call.logits) = (cache, first_row, logits.as_mut_ptr());
            let longest = call.positions.iter().max().map_or(0, |p| p + 1);
            step.grow_scores(longest);
            step.embed()?;
        }
        let counts = step.counts(batch);
        self.pool.run(&counts)
    }

    /// Runs up to so many steps as there is room for tokens, each with the tokens that the one before has chosen.
    /// Ends after one that has chosen a stop or found no number. Returns how many steps it ran.
    ///
    /// # Safety
    /// As `step`.
    pub unsafe fn ahead(
        &mut self,
        ids: &[i64],
        positions: &[i64],
        first_row: usize,
        cache: Cache,
        ahead: Ahead,
    ) -> Result<usize, String> {
        let (batch, vocab) = (ids.len(), self.vocab());
        check(ahead.sampling.len(), Some(batch), "sampling")?;
        check(ahead.uniforms.len(), Some(ahead.chosen.len()), "uniforms")?;
        let (mut ids, mut positions) = (ids.to_vec(), positions.to_vec());
        let mut logits = std::mem::take(&mut self.logits);
        logits.resize(batch * vocab, 0.0);
        let mut done = 0;
        for (chosen, uniforms) in ahead.chosen.chunks_exact_mut(batch).zip(ahead.uniforms.chunks_exact(batch)) {
            // SAFETY: as the caller promises.
            unsafe { self.step(&ids, &positions, first_row, cache, &mut logits) }?;
            for (b, (chosen, logits)) in chosen.iter_mut().zip(logits.chunks_exact(vocab)).enumerate() {
                *chosen = choose(logits, &ahead.sampling[b], uniforms[b], &mut self.room);
            }
            done += 1;
            if chosen.iter().any(|token| *token == NOT_FINITE || ahead.stops.contains(token)) {
                break;
            }
            ids.copy_from_slice(chosen);
            positions.iter_mut().for_each(|p| *p += 1);
        }
        self.logits = logits;
        Ok(done)
    }
}

/// # Safety
/// As `Step::chunk`.
unsafe fn chunk_portable(step: &Step, phase: usize, chunk: usize, thread: usize) {
    // SAFETY: as the caller promises.
    unsafe { step.chunk::<Portable>(phase, chunk, thread) }
}

/// # Safety
/// As `Step::chunk`, and the processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn chunk_avx2(step: &Step, phase: usize, chunk: usize, thread: usize) {
    // SAFETY: as the caller promises.
    unsafe { step.chunk::<x86::Avx2>(phase, chunk, thread) }
}

/// # Safety
/// As `Step::chunk`, and the processor has these instructions.
#[cfg(all(target_arch = "x86_64", avx512))]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
unsafe fn chunk_avx512(step: &Step, phase: usize, chunk: usize, thread: usize) {
    // SAFETY: as the caller promises.
    unsafe { step.chunk::<x86::avx512::Avx512>(phase, chunk, thread) }
}

/// # Safety
/// As `Step::chunk`, and the processor has these instructions and tiles.
#[cfg(all(target_os = "linux", target_arch = "x86_64", avx512))]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
unsafe fn chunk_amx(step: &Step, phase: usize, chunk: usize, thread: usize) {
    // SAFETY: as the caller promises.
    unsafe { step.chunk::<amx::Amx>(phase, chunk, thread) }
}

impl Job for Step {
    unsafe fn run(&self, phase: usize, chunk: usize, thread: usize) {
        // SAFETY: the level is one that the processor has; the rest is the pool's promise.
        unsafe { (self.entry)(self, phase, chunk, thread) }
    }
}

impl Step {
    fn new(
        weights: Weights,
        format: Format,
        level: Level,
        entry: unsafe fn(&Step, usize, usize, usize),
    ) -> Result<Step, String> {
        let matrices = |layer: &LayerWeights| {
            [
                [layer.query, layer.key, layer.value].to_vec(),
                vec![layer.output],
                vec![layer.hidden],
                vec![layer.residual],
            ]
        };
        let (c, mlp) = (weights.channels, weights.mlp);
        let head_format = if format == Format::Int4 { Format::Int8 } else { format };
        let width = |floats: Floats, columns: usize, format: Format| match format {
            Format::F32 => 0, // read where they are
            Format::Int4 => four::packed_len(floats.len() / columns, columns),
            #[cfg(all(target_os = "linux", target_arch = "x86_64", avx512))]
            _ if level == Level::Amx => amx::packed_len(floats.len() / columns, columns * format.bytes()),
            _ => (floats.len() * format.bytes() + 63) / 64 * 64,
        };
        let mut bytes = width(weights.head, c, head_format);
        for layer in &weights.layers {
            let [project, output, hidden, residual] = matrices(layer);
            bytes += [project, output, hidden].concat().iter().map(|floats| width(floats, c, format)).sum::<usize>();
            bytes += width(residual[0], mlp, format);
        }
        let mut store = Buffer::new(bytes);
        let mut at = 0;
        let mut keep = |floats: &[Floats], columns: usize, format: Format| -> Vec<Matrix> {
            let mut made = Vec::new();
            for &floats in floats {
                let end = at + width(floats, columns, format);
                made.push(Matrix::new(floats, columns, format, level, &mut store[at..end]));
                at = end;
            }
            made
        };
        let head = keep(&[weights.head], c, head_format);
        let mut weights = weights;
        let layers = std::mem::take(&mut weights.layers);
        let layers = layers.into_iter().map(|layer| {
            let [project, output, hidden, residual] = matrices(&layer);
            let mut inner = |floats: &[Floats], columns| keep(floats, columns, format);
            let (project, output) = (inner(&project, c), inner(&output, c));
            Layer { weights: layer, project, output, hidden: inner(&hidden, c), residual: inner(&residual, mlp) }
        });
        let layers = layers.collect();
        let cache = Cache {
            keys: std::ptr::null_mut(),
            values: std::ptr::null_mut(),
            bf16: false,
            rows: 0,
            positions: 0,
            tokens: std::ptr::null_mut(),
            token_positions: 0,
        };
        let (ids, positions) = (Vec::new(), Vec::new());
        let call = Call { serial: 0, ids, positions, cache, first_row: 0, logits: std::ptr::null_mut() };
        Ok(Step {
            format,
            head_format,
            entry,
            weights,
            layers,
            head,
            _store: store,
            call: UnsafeCell::new(call),
            x: Common::new(),
            x0: Common::new(),
            middle: Common::new(),
            qkv: Common::new(),
            attended: Common::new(),
            hidden: Common::new(),
            scratch: Vec::new(),
            threads: 0,
        })
    }

    fn set_threads(&mut self, threads: usize) {
        self.threads = threads;
        let empty = || Scratch {
            ready: (0, 0),
            inputs: Buffer::new(0),
            factors: Vec::new(),
            row: Buffer::new(0),
            heads: Buffer::new(0),
            scores: Buffer::new(0),
            products: Buffer::new(0),
        };
        self.scratch = (0..threads).map(|_| UnsafeCell::new(empty())).collect();
    }

    /// # Safety
    /// Between two runs.
    unsafe fn grow(&self, batch: usize) {
        let (w, c) = (&self.weights, self.weights.channels);
        let widest = w.channels.max(w.mlp);
        let sizes = [w.channels, w.channels, w.channels, w.qkv(), w.channels, w.mlp];
        let buffers = [&self.x, &self.x0, &self.middle, &self.qkv, &self.attended, &self.hidden];
        for (buffer, size) in buffers.into_iter().zip(sizes) {
            // SAFETY: as the caller promises.
            unsafe { *buffer.0.get() = Buffer::new(batch * size) };
        }
        for scratch in &self.scratch {
            // SAFETY: as the caller promises.
            let scratch = unsafe { &mut *scratch.get() };
            scratch.inputs = Buffer::new((batch + 16) * (widest + 64)); // as `Product` wants them
            scratch.factors = vec![1.0; batch];
            scratch.row = Buffer::new(widest);
            let largest = [w.qkv(), c, w.mlp, w.vocab].iter().map(|&rows| chunks(rows, self.threads).1).max();
            scratch.products = Buffer::new(batch * largest.unwrap_or(0));
            scratch.heads = Buffer::new(w.channels + w.head_dim());
        }
    }

    /// # Safety
    /// Between two runs.
    unsafe fn grow_scores(&self, longest: usize) {
        let needed = longest * (self.weights.heads / self.weights.kv_heads);
        for scratch in &self.scratch {
            // SAFETY: as the caller promises.
            let scratch = unsafe { &mut *scratch.get() };
            if scratch.scores.len() < needed {
                scratch.scores = Buffer::new(2 * needed); // twice: they grow by one position per call
            }
        }
    }

    /// The chunks of every phase.
    fn counts(&self, batch: usize) -> Vec<usize> {
        let w = &self.weights;
        let of = |rows| chunks(rows, self.threads).0;
        let layer = [of(w.qkv()), batch * w.kv_heads, of(w.channels), of(w.mlp), of(w.channels)];
        let mut counts = layer.repeat(self.layers.len());
        counts.push(of(w.vocab));
        counts
    }

    /// Writes the embeddings of the call's tokens to x and x0. `GPT.embed` has the arithmetic.
    ///
    /// # Errors
    /// The text of a model with recall is not one of its tokens, or its order none of the text.
    ///
    /// # Safety
    /// Between two runs.
    unsafe fn embed(&self) -> Result<(), String> {
        let (w, c) = (&self.weights, self.weights.channels);
        // SAFETY: as the caller promises; the tokens' rows and positions are checked.
        let (call, x0, x) = unsafe {
            let call = &*self.call.get();
            (call, self.x0.write(0..call.ids.len() * c), self.x.write(0..call.ids.len() * c))
        };
        let embedding = |id: usize| &w.embedding[id * c..(id + 1) * c];
        for (b, (&id, &position)) in call.ids.iter().zip(&call.positions).enumerate() {
            // This token and those before it, as many as a switch looks at; none where none does.
            let mut context: &[i64] = &[];
            if !call.cache.tokens.is_null() {
                let first = (position + 1).saturating_sub(WINDOW);
                let row = (call.first_row + b) * call.cache.token_positions;
                // SAFETY: as above.
                unsafe {
                    *call.cache.tokens.add(row + position) = id as i64;
                    context = std::slice::from_raw_parts(call.cache.tokens.add(row + first), position + 1 - first);
                }
            }
            let out = &mut x0[b * c..(b + 1) * c];
            out.copy_from_slice(embedding(id));
            norm(out, w.eps);
            // From the token itself, before anything is added.
            let gate = w.smear * sigmoid(w.smear_gate.iter().zip(out.iter()).map(|(a, b)| a * b).sum());
            if let Some(recall) = &w.recall {
                recall.add(context, out)?;
            }
            let before = context.iter().rev().nth(1);
            if let (Some(&before), false) = (before, w.smear_gate.is_empty()) {
                let mut last = embedding((before.max(0) as usize).min(w.vocab - 1)).to_vec();
                norm(&mut last, w.eps);
                for (x, last) in out.iter_mut().zip(last) {
                    *x += gate * last;
                }
            }
        }
        x.copy_from_slice(x0);
        Ok(())
    }

    /// One chunk of one phase.
    ///
    /// # Safety
    /// Called by the pool, in a function that has the instructions of P.
    #[inline(always)]
    unsafe fn chunk<P: Processor>(&self, phase: usize, chunk: usize, thread: usize) {
        // SAFETY: the call is not written while a job runs; the scratch is this thread's.
        let (call, scratch) = unsafe { (&*self.call.get(), &mut *self.scratch[thread].get()) };
        // SAFETY: as the caller promises.
        unsafe {
            if phase % PHASES == ATTEND {
                if call.cache.bf16 {
                    self.attend::<P::Cached>(phase / PHASES, chunk, call, scratch);
                } else {
                    self.attend::<P::F32>(phase / PHASES, chunk, call, scratch);
                }
                return;
            }
            let head = phase == self.layers.len() * PHASES;
            match if head { self.head_format } else { self.format } {
                Format::F32 => self.product::<P::F32>(phase, chunk, call, scratch),
                Format::Bf16 => self.product::<P::Bf16>(phase, chunk, call, scratch),
                Format::Int8 => self.product::<P::Int8>(phase, chunk, call, scratch),
                Format::Int4 => self.product::<P::Int4>(phase, chunk, call, scratch),
            }
        }
    }

    /// The normed input of a layer's attention for sequence b.
    ///
    /// # Safety
    /// Nobody writes to x meanwhile.
    #[inline(always)]
    unsafe fn layer_input(&self, layer: &LayerWeights, b: usize, out: &mut [f32]) {
        let c = self.weights.channels;
        // SAFETY: as the caller promises.
        let (x, x0) = unsafe { (self.x.read(b * c..(b + 1) * c), self.x0.read(b * c..(b + 1) * c)) };
        for ((out, x), x0) in out.iter_mut().zip(x).zip(x0) {
            *out = layer.keep * x + layer.again * x0;
        }
        norm(out, self.weights.eps);
    }

    /// Some outputs of a matrix for all sequences, and what follows it.
    ///
    /// # Safety
    /// As `chunk`, and D is of the model's format.
    #[inline(always)]
    unsafe fn product<D: Product>(&self, phase: usize, chunk: usize, call: &Call, scratch: &mut Scratch) {
        let (w, c, batch) = (&self.weights, self.weights.channels, call.ids.len());
        let layer = self.layers.get(phase / PHASES);
        let kind = phase % PHASES;
        let (matrices, rows): (&[Matrix], usize) = match (layer, kind) {
            (None, _) => (&self.head, w.vocab),
            (Some(layer), PROJECT) => (&layer.project, w.qkv()),
            (Some(layer), OUTPUT) => (&layer.output, c),
            (Some(layer), HIDDEN) => (&layer.hidden, w.mlp),
            (Some(layer), _) => (&layer.residual, c),
        };
        let columns = matrices[0].columns;
        let stride = D::stride(columns);
        let size = chunks(rows, self.threads).1;
        let wanted = chunk * size..((chunk + 1) * size).min(rows);

        let inputs = scratch.inputs.as_mut_ptr() as *mut D::Input;
        if scratch.ready != (call.serial, phase) {
            scratch.ready = (call.serial, phase);
            for b in 0..batch {
                let row = &mut scratch.row[..columns];
                // SAFETY: what is read was written in earlier phases; the scratch has room.
                unsafe {
                    match (layer, kind) {
                        (None, _) => {
                            row.copy_from_slice(self.x.read(b * c..(b + 1) * c));
                            if w.backout != 0.0 {
                                let middle = self.middle.read(b * c..(b + 1) * c);
                                row.iter_mut().zip(middle).for_each(|(x, m)| *x -= w.backout * m);
                            }
                            norm(row, w.eps);
                        }
                        (Some(layer), PROJECT) => self.layer_input(&layer.weights, b, row),
                        (_, OUTPUT) => row.copy_from_slice(self.attended.read(b * c..(b + 1) * c)),
                        (_, HIDDEN) => {
                            row.copy_from_slice(self.x.read(b * c..(b + 1) * c));
                            norm(row, w.eps);
                        }
                        _ => row.copy_from_slice(self.hidden.read(b * columns..(b + 1) * columns)),
                    }
                    let out = std::slice::from_raw_parts_mut(inputs.add(b * stride), stride);
                    scratch.factors[b] = D::prepare(row, out);
                }
            }
        }

        // The products of this chunk, (B, wanted).
        let mut done = 0;
        let mut offset = 0; // of the matrix's first output
        for matrix in matrices {
            let first = wanted.start.max(offset) - offset;
            let count = wanted.end.min(offset + matrix.rows).saturating_sub(offset + first);
            offset += matrix.rows;
            if count == 0 {
                continue;
            }
            let products = &mut scratch.products[done..];
            // SAFETY: the rows are the matrix's, the inputs were prepared for all its columns, and there is room for
            // the products of a chunk.
            unsafe {
                let out = Out { at: products.as_mut_ptr(), tokens: size };
                D::run(matrix.weights, columns, (first, count), inputs, batch, out);
            }
            for b in 0..batch {
                let products = &mut products[b * size..][..count];
                if matrix.scales.is_empty() {
                    continue;
                }
                for (product, scale) in products.iter_mut().zip(&matrix.scales[first..]) {
                    *product *= scale * scratch.factors[b];
                }
            }
            done += count;
        }
        for b in 0..batch {
            let products = &scratch.products[b * size..][..done];
            // SAFETY: outputs of this chunk are written by nobody else, and read in later phases only.
            unsafe {
                let mine = |width: usize| b * width + wanted.start..b * width + wanted.end;
                match (layer, kind) {
                    (None, _) => {
                        let logits = std::slice::from_raw_parts_mut(call.logits.add(mine(rows).start), done);
                        for (logit, &product) in logits.iter_mut().zip(products) {
                            *logit = if w.softcap > 0.0 { w.softcap * tanh(product / w.softcap) } else { product };
                        }
                    }
                    (_, PROJECT) => self.qkv.write(mine(rows)).copy_from_slice(products),
                    (Some(layer), OUTPUT) => {
                        let (x, x0) = (self.x.write(mine(c)), self.x0.read(mine(c)));
                        for ((x, x0), product) in x.iter_mut().zip(x0).zip(products) {
                            *x = layer.weights.keep * *x + layer.weights.again * x0 + product;
                        }
                    }
                    (_, HIDDEN) => {
                        for (h, &product) in self.hidden.write(mine(rows)).iter_mut().zip(products) {
                            *h = if product < 0.0 { 0.0 } else { product * product };
                            // NaN stays NaN
                        }
                    }
                    _ => {
                        let x = self.x.write(mine(c));
                        x.iter_mut().zip(products).for_each(|(x, product)| *x += product);
                        if w.backout != 0.0 && phase / PHASES == self.layers.len() / 2 {
                            self.middle.write(mine(c)).copy_from_slice(x);
                        }
                    }
                }
            }
        }
    }

    /// Attention of the query heads that share one key/value head, for one sequence.
    ///
    /// # Safety
    /// As `chunk`, and D::Weight is what the cache holds.
    #[inline(always)]
    unsafe fn attend<D: Dot>(&self, layer: usize, chunk: usize, call: &Call, scratch: &mut Scratch)
    where
        D::Weight: Element,
    {
        let (w, layer_weights) = (&self.weights, &self.layers[layer].weights);
        let (c, d, kv_heads) = (w.channels, w.head_dim(), w.kv_heads);
        let (b, head, repeats) = (chunk / kv_heads, chunk % kv_heads, w.heads / kv_heads);
        let (position, cache) = (call.positions[b], &call.cache);
        let stride = kv_heads * d; // from one position to the next
        let start = ((layer * cache.rows + call.first_row + b) * cache.positions) * stride + head * d;
        // SAFETY: the row and the position are in the cache, whose pointers the caller of `step` vouches for. This
        // chunk alone touches this row and head; x and qkv were written in earlier phases.
        let (keys, values, qkv) = unsafe {
            let (keys, values) = (cache.keys as *mut D::Weight, cache.values as *mut D::Weight);
            (keys.add(start), values.add(start), self.qkv.read(b * w.qkv()..(b + 1) * w.qkv()))
        };
        let (cos, sin) = (&w.cos[position * d..][..d], &w.sin[position * d..][..d]);
        let (mixed, new) = scratch.heads.split_at_mut(c); // (repeats, D) and (D,)

        rotate(&qkv[c + head * d..][..d], cos, sin, w.eps, new);
        for (i, &k) in new.iter().enumerate() {
            // With an offset the second half of each half of the channels is the next token's.
            let ahead = usize::from(w.key_offset && (i * 4 / d) % 2 == 1);
            // SAFETY: as above; with an offset the cache has a position more.
            unsafe { *keys.add((position + ahead) * stride + i) = D::Weight::put(k) };
        }
        new.copy_from_slice(&qkv[c + (kv_heads + head) * d..][..d]);
        if !layer_weights.value_gate.is_empty() {
            let channels = layer_weights.value_gate.len() / kv_heads;
            let row = &mut scratch.row[..c];
            // SAFETY: x is not written in this phase.
            unsafe { self.layer_input(layer_weights, b, row) };
            let gate = layer_weights.value_gate[head * channels..].iter().zip(&row[..channels]);
            let share = 3.0 * sigmoid(gate.map(|(a, b)| a * b).sum());
            let table = &layer_weights.value_table[call.ids[b] * stride + head * d..];
            new.iter_mut().zip(table).for_each(|(v, t)| *v += share * t);
        }
        for (i, &v) in new.iter().enumerate() {
            // SAFETY: as above.
            unsafe { *values.add(position * stride + i) = D::Weight::put(v) };
        }

        let first = position.saturating_sub(layer_weights.window);
        let count = position + 1 - first;
        let scores = &mut scratch.scores[..repeats * count]; // (repeats, count)
        let inputs = scratch.inputs.as_mut_ptr() as *mut D::Input;
        scratch.ready = (0, 0); // the inputs are used for the queries
        for r in 0..repeats {
            rotate(&qkv[(head * repeats + r) * d..][..d], cos, sin, w.eps, new);
            // SAFETY: room for C inputs.
            D::prepare(new, unsafe { std::slice::from_raw_parts_mut(inputs.add(r * d), d) });
        }
        // SAFETY: `count` positions from `first` on were written, this one just now.
        unsafe {
            let keys = keys.add(first * stride) as *const D::Weight;
            let out = Out { at: scores.as_mut_ptr(), tokens: count };
            multiply::<D>(keys, stride, d, count, inputs, repeats, out);
        }
        for scores in scores.chunks_exact_mut(count) {
            softmax(scores, layer_weights.scale);
        }
        let mixed = &mut mixed[..repeats * d];
        mixed.fill(0.0);
        // SAFETY: as above.
        let value =
            |p: usize| unsafe { std::slice::from_raw_parts(values.add((first + p) * stride) as *const D::Weight, d) };
        let mut p = 0;
        while p < count {
            // Four positions at a time: the sums are read and written a quarter as often.
            let four = p + 4 <= count;
            let rows = if four { [value(p), value(p + 1), value(p + 2), value(p + 3)] } else { [value(p); 4] };
            for (mixed, scores) in mixed.chunks_exact_mut(d).zip(scores.chunks_exact(count)) {
                if four {
                    let s = &scores[p..p + 4];
                    for i in 0..d {
                        let sum = fused(s[0], rows[0][i].get(), mixed[i]);
                        let sum = fused(s[1], rows[1][i].get(), sum);
                        let sum = fused(s[2], rows[2][i].get(), sum);
                        mixed[i] = fused(s[3], rows[3][i].get(), sum);
                    }
                } else {
                    for i in 0..d {
                        mixed[i] = fused(scores[p], rows[0][i].get(), mixed[i]);
                    }
                }
            }
            p += if four { 4 } else { 1 };
        }
        let at = b * c + head * repeats * d;
        // SAFETY: this chunk's own heads.
        unsafe { self.attended.write(at..at + repeats * d) }.copy_from_slice(mixed);
    }
}

/// What a cache holds.
pub trait Element: Copy {
    fn get(self) -> f32;
    fn put(x: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
    #[inline(always)]
    fn put(x: f32) -> f32 {
        x
    }
}

impl Element for u16 {
    #[inline(always)]
    fn get(self) -> f32 {
        from_bf16(self)
    }
    #[inline(always)]
    fn put(x: f32) -> u16 {
        to_bf16(x)
    }
}

impl Matrix {
    /// A matrix in `format`, in `store` unless it stays where it is.
    fn new(floats: Floats, columns: usize, format: Format, level: Level, store: &mut [u8]) -> Matrix {
        let rows = floats.len() / columns;
        let mut scales = Vec::new();
        if format == Format::F32 {
            return Matrix { weights: floats.as_ptr() as *const u8, rows, columns, scales };
        }
        if format == Format::Int4 {
            four::pack(floats, columns, store); // their scales are beside them
            return Matrix { weights: store.as_ptr(), rows, columns, scales: vec![1.0; rows] };
        }
        let mut bytes = vec![0; floats.len() * format.bytes()];
        if format == Format::Bf16 {
            for (out, &w) in bytes.chunks_exact_mut(2).zip(floats) {
                out.copy_from_slice(&to_bf16(w).to_ne_bytes());
            }
        } else {
            let mut row = vec![0; columns];
            for (out, floats) in bytes.chunks_exact_mut(columns).zip(floats.chunks_exact(columns)) {
                scales.push(quantize(floats, &mut row));
                out.iter_mut().zip(&row).for_each(|(out, &w)| *out = w as u8);
            }
        }
        match level {
            #[cfg(all(target_os = "linux", target_arch = "x86_64", avx512))]
            Level::Amx => amx::pack(&bytes, columns * format.bytes(), store),
            _ => store[..bytes.len()].copy_from_slice(&bytes),
        }
        let weights = store.as_ptr();
        Matrix { weights, rows, columns, scales }
    }
}

/// RMSNorm in place, without parameters.
#[inline(always)]
fn norm(row: &mut [f32], eps: f32) {
    let mut lanes = [0.0f32; 16];
    let chunks = row.chunks_exact(16);
    let mut sum: f32 = chunks.remainder().iter().map(|x| x * x).sum();
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] += chunk[i] * chunk[i];
        }
    }
    sum += lanes.iter().sum::<f32>();
    let scale = 1.0 / (sum / row.len() as f32 + eps).sqrt();
    row.iter_mut().for_each(|x| *x *= scale);
}

/// A query or key at its position: rotated (`apply_rotary` in nanochat/ops/pointwise.py), then normed.
#[inline(always)]
fn rotate(head: &[f32], cos: &[f32], sin: &[f32], eps: f32, out: &mut [f32]) {
    let half = head.len() / 2;
    for i in 0..half {
        out[i] = head[i] * cos[i] + head[half + i] * sin[i];
        out[half + i] = head[half + i] * cos[half + i] + head[i] * sin[half + i];
    }
    norm(out, eps);
}

/// softmax(scale · scores) in place; scale is positive.
#[inline(always)]
fn softmax(scores: &mut [f32], scale: f32) {
    let most = scores.iter().fold(f32::NEG_INFINITY, |most, &s| if s > most { s } else { most });
    scores.iter_mut().for_each(|s| *s = exp((*s - most) * scale));
    let mut lanes = [0.0f32; 8];
    let chunks = scores.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for i in 0..8 {
            lanes[i] += chunk[i];
        }
    }
    let share = 1.0 / (rest + lanes.iter().sum::<f32>());
    scores.iter_mut().for_each(|s| *s *= share);
}

/// e^x for x up to 88, within 2 units of the last place; compilers make vector instructions of it.
///
/// e^x = 2^n · e^r with n the nearest integer to x / ln 2, and |r| at most ln 2 / 2, where Taylor's series to r^7 will
/// do. ln 2 is subtracted in two parts (Cody and Waite), the first of which has so few digits that n times it is exact.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x }; // below it 2^n would need other bits; e^-87 is 1e-38
    let n = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let series = [1.0, 1.0, 0.5, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0];
    let power = series.iter().rev().fold(0.0, |sum, term| fused(sum, r, *term));
    // The bits of 2^n; those of n are the lowest of a float that has no digits behind the point.
    let bits = (n + 12_582_912.0).to_bits().wrapping_sub(12_582_912.0f32.to_bits()).wrapping_add(127) << 23;
    power * f32::from_bits(bits)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// tanh within 2e-7.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    // Of |x|, so that e never overflows; beyond 10 it is 1.
    let y = if x.abs() > 10.0 { 10.0 } else { x.abs() };
    let e = exp(-2.0 * y);
    let t = (1.0 - e) / (1.0 + e);
    if x < 0.0 {
        -t
    } else {
        t
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_and_tanh_are_exact_to_a_few_places() {
        for i in -9_000..=800 {
            let x = i as f32 / 100.0;
            let error = (f64::from(exp(x)) / f64::from(x.max(-87.0)).exp() - 1.0).abs();
            assert!(error < 3e-7, "exp({x}) is off by {error}");
            assert!((tanh(x) - x.tanh()).abs() < 3e-7, "tanh({x})");
        }
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
    }

    #[test]
    fn chunks_cover_all_outputs() {
        for rows in [1, 15, 16, 17, 320, 4096, 65_536] {
            for threads in [1, 2, 7, 64] {
                let (count, size) = chunks(rows, threads);
                assert!(count * size >= rows && (count - 1) * size < rows);
            }
        }
    }
}
