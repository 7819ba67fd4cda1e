//! The C ABI: what `__init__.py` calls through ctypes.
//!
//! Every function returns 0, or -1 after leaving a message for `rustbpe_last_error`. Panics are caught here. Handles
//! are boxes whose ownership passes to the caller until it calls the matching `_free` (or a function that says it
//! consumes the handle). A handle of type `Tokenizer` may be used from several threads at a time, the others may not.

use std::cell::RefCell;
use std::os::raw::c_int;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::slice;
use std::time::{Duration, Instant};

use crate::count::{Counter, Limits};
use crate::documents::{Documents, Offsets};
use crate::encode::{EncodedBlock, Id, Tokenizer, Vocabulary};
use crate::split::Pattern;
use crate::train::train;

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Hears (done, total) now and then, on the calling thread; another result than 0 stops the work.
pub type Progress = Option<extern "C" fn(u64, u64) -> c_int>;

/// Documents as in an Arrow array; see `documents`.
#[repr(C)]
pub struct RawDocuments {
    data: *const u8,
    data_len: usize,
    /// `num_documents + 1` integers of `offset_width` bytes (4 or 8).
    offsets: *const u8,
    offset_width: usize,
    num_documents: usize,
    /// Bitmap, or null: no document is null.
    validity: *const u8,
    /// Bits before the one of the first document.
    validity_first: usize,
}

/// Runs `body`, and turns an error or a panic into -1 and a message.
pub(crate) fn guarded(body: impl FnOnce() -> Result<(), String>) -> c_int {
    let message = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return 0,
        Ok(Err(message)) => message,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            format!("internal error: {}", text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panic"))
        }
    };
    LAST_ERROR.with(|last| *last.borrow_mut() = message);
    -1
}

/// Calls `progress` at most ten times a second: the caller may have to wait for a lock to answer.
fn now_and_then(progress: Progress, total: u64) -> impl FnMut(u64) -> bool {
    let mut last = Instant::now();
    move |done| match progress {
        Some(call) if last.elapsed() >= Duration::from_millis(100) => {
            last = Instant::now();
            call(done, total) == 0
        }
        _ => true,
    }
}

/// # Safety
/// `pointer` is null, or valid for reading `len` elements for as long as 'a; `len` 0 allows any pointer.
pub(crate) unsafe fn view<'a, T>(pointer: *const T, len: usize) -> Result<&'a [T], String> {
    if len == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() || pointer as usize % std::mem::align_of::<T>() != 0 {
        return Err("a buffer is null or not aligned".into());
    }
    // SAFETY: not null, aligned, and valid for `len` elements as the caller promises.
    Ok(unsafe { slice::from_raw_parts(pointer, len) })
}

/// # Safety
/// As `view`, for writing, and nobody else touches the memory during 'a. The memory is initialized.
pub(crate) unsafe fn view_mut<'a, T>(pointer: *mut T, len: usize) -> Result<&'a mut [T], String> {
    if len == 0 {
        return Ok(&mut []);
    }
    if pointer.is_null() || pointer as usize % std::mem::align_of::<T>() != 0 {
        return Err("a buffer is null or not aligned".into());
    }
    // SAFETY: not null, aligned, valid for `len` elements and unshared as the caller promises.
    Ok(unsafe { slice::from_raw_parts_mut(pointer, len) })
}

/// # Safety
/// `handle` is null or a live handle of type T.
pub(crate) unsafe fn borrow<'a, T>(handle: *const T) -> Result<&'a T, String> {
    // SAFETY: the caller promises a live handle, and handles come from Box, so they are aligned and initialized.
    unsafe { handle.as_ref() }.ok_or_else(|| "the handle is null".into())
}

/// # Safety
/// `pointer` is valid for writing one T.
pub(crate) unsafe fn put<T>(pointer: *mut T, value: T) {
    // SAFETY: as the caller promises; `write` does not read what was there.
    unsafe { pointer.write(value) }
}

/// # Safety
/// `handle` is null or a live handle of type T, which ends here.
pub(crate) unsafe fn free<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: it came from Box::into_raw and the caller gives it back once.
        let owned = unsafe { Box::from_raw(handle) };
        guarded(|| {
            drop(owned);
            Ok(())
        });
    }
}

impl RawDocuments {
    /// # Safety
    /// The buffers are valid for their lengths during 'a.
    unsafe fn view<'a>(&self) -> Result<Documents<'a>, String> {
        let count = self.num_documents.checked_add(1).ok_or("too many documents")?;
        // SAFETY: the caller promises valid buffers; `view` checks null and alignment.
        let data = unsafe { view(self.data, self.data_len)? };
        let offsets = match self.offset_width {
            // SAFETY: as above.
            4 => Offsets::Narrow(unsafe { view(self.offsets as *const i32, count)? }),
            // SAFETY: as above.
            8 => Offsets::Wide(unsafe { view(self.offsets as *const i64, count)? }),
            other => return Err(format!("offsets of {other} bytes are not supported")),
        };
        let validity = if self.validity.is_null() {
            None
        } else {
            let bits = self.validity_first.checked_add(self.num_documents).ok_or("too many documents")?;
            // SAFETY: as above; a bitmap holds one bit for each document after `validity_first` others.
            Some((unsafe { view(self.validity, bits / 8 + (bits % 8 != 0) as usize)? }, self.validity_first))
        };
        Documents::new(data, offsets, validity)
    }
}

/// # Safety
/// `pattern` is valid for `len` bytes.
unsafe fn parse_pattern(pattern: *const u8, len: usize) -> Result<Pattern, String> {
    // SAFETY: as the caller promises.
    let bytes = unsafe { view(pattern, len)? };
    Pattern::parse(std::str::from_utf8(bytes).map_err(|_| "the split pattern is not valid UTF-8")?)
}

/// Copies the message of this thread's last error into `buffer` (cut at `capacity`) and returns its full length.
///
/// # Safety
/// `buffer` is valid for writing `capacity` bytes.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_last_error(buffer: *mut u8, capacity: usize) -> usize {
    LAST_ERROR.with(|last| {
        let last = last.borrow();
        // SAFETY: as the caller promises.
        if let Ok(buffer) = unsafe { view_mut(buffer, capacity.min(last.len())) } {
            buffer.copy_from_slice(&last.as_bytes()[..buffer.len()]);
        }
        last.len()
    })
}

/// Starts counting for training. `threads` 0: one for each processor; limits of u64::MAX: none.
///
/// # Safety
/// `pattern` is valid for `pattern_len` bytes, `out` for writing a pointer.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counter_new(
    pattern: *const u8,
    pattern_len: usize,
    doc_chars: u64,
    total_chars: u64,
    threads: usize,
    out: *mut *mut Counter,
) -> c_int {
    guarded(|| {
        // SAFETY: as the caller promises.
        let pattern = unsafe { parse_pattern(pattern, pattern_len)? };
        let counter = Counter::new(pattern, Limits { doc_chars, total_chars }, threads);
        // SAFETY: as the caller promises.
        unsafe { put(out, Box::into_raw(Box::new(counter))) };
        Ok(())
    })
}

/// Counts a batch of documents. `more` becomes 0 when the character limit is reached.
///
/// # Safety
/// `counter` is a live handle that no other thread uses; the buffers of `documents` are valid and do not change during
/// the call; `more` is valid for writing.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counter_feed(
    counter: *mut Counter,
    documents: *const RawDocuments,
    progress: Progress,
    more: *mut c_int,
) -> c_int {
    guarded(|| {
        // SAFETY: the caller promises live handles and valid buffers, and that this thread alone uses `counter`.
        let (counter, documents) =
            unsafe { (counter.as_mut().ok_or("the handle is null")?, borrow(documents)?.view()?) };
        let total = documents.num_bytes(0..documents.len()) as u64;
        let goes_on = counter.feed(&documents, &mut now_and_then(progress, total))?;
        // SAFETY: as the caller promises.
        unsafe { put(more, goes_on as c_int) };
        Ok(())
    })
}

/// Writes how much was counted: documents, bytes of text, and bytes of memory held.
///
/// # Safety
/// `counter` is a live handle that no other thread uses, `out` is valid for writing three u64.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counter_totals(counter: *const Counter, out: *mut u64) -> c_int {
    guarded(|| {
        // SAFETY: as the caller promises.
        let (counter, out) = unsafe { (borrow(counter)?, view_mut(out, 3)?) };
        let totals = counter.totals();
        out.copy_from_slice(&[totals.documents, totals.bytes, counter.memory() as u64]);
        Ok(())
    })
}

/// # Safety
/// `counter` is null or a live handle, which ends here.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counter_free(counter: *mut Counter) {
    // SAFETY: as the caller promises.
    unsafe { free(counter) }
}

/// Learns the merges. Consumes the counter, also when it fails.
///
/// # Safety
/// `counter` is a live handle, which ends here; `pattern` is valid for `pattern_len` bytes, `out` for writing a pointer.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_train(
    counter: *mut Counter,
    pattern: *const u8,
    pattern_len: usize,
    vocab_size: u64,
    progress: Progress,
    out: *mut *mut Tokenizer,
) -> c_int {
    guarded(|| {
        if counter.is_null() {
            return Err("the handle is null".into());
        }
        // SAFETY: not null, and the caller gives the handle up.
        let counter = unsafe { Box::from_raw(counter) };
        // SAFETY: as the caller promises.
        let pattern = unsafe { parse_pattern(pattern, pattern_len)? };
        let wanted = vocab_size.saturating_sub(256);
        let vocab_size = vocab_size.min(u32::MAX as u64) as usize;
        let merges = train(counter.finish(), vocab_size, &mut now_and_then(progress, wanted))?;
        let tokenizer = Tokenizer::new(pattern, Vocabulary::from_merges(&merges)?);
        // SAFETY: as the caller promises.
        unsafe { put(out, Box::into_raw(Box::new(tokenizer))) };
        Ok(())
    })
}

/// A tokenizer with given tokens: token i is `bytes[offsets[i]..offsets[i + 1]]` and has the id `ids[i]`.
///
/// # Safety
/// `pattern`, `bytes`, `offsets` (`num_tokens + 1`) and `ids` are valid for their lengths, `out` for writing a pointer.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_from_ranks(
    pattern: *const u8,
    pattern_len: usize,
    bytes: *const u8,
    bytes_len: usize,
    offsets: *const i64,
    ids: *const u32,
    num_tokens: usize,
    out: *mut *mut Tokenizer,
) -> c_int {
    guarded(|| {
        let num_offsets = num_tokens.checked_add(1).ok_or("too many tokens")?;
        // SAFETY: as the caller promises.
        let (pattern, bytes, offsets, ids) = unsafe {
            (
                parse_pattern(pattern, pattern_len)?,
                view(bytes, bytes_len)?,
                view(offsets, num_offsets)?,
                view(ids, num_tokens)?,
            )
        };
        let token =
            |i: usize| bytes.get(offsets[i] as usize..offsets[i + 1] as usize).map(|token| (token.into(), ids[i]));
        let tokens =
            (0..num_tokens).map(token).collect::<Option<Vec<_>>>().ok_or("the offsets are not within the bytes")?;
        let tokenizer = Tokenizer::new(pattern, Vocabulary::new(tokens)?);
        // SAFETY: as the caller promises.
        unsafe { put(out, Box::into_raw(Box::new(tokenizer))) };
        Ok(())
    })
}

/// # Safety
/// `tokenizer` is null or a live handle, which ends here.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_tokenizer_free(tokenizer: *mut Tokenizer) {
    // SAFETY: as the caller promises.
    unsafe { free(tokenizer) }
}

/// Writes the number of tokens, the highest id and one, and the bytes of all tokens together.
///
/// # Safety
/// `tokenizer` is a live handle, `out` is valid for writing three u64.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_sizes(tokenizer: *const Tokenizer, out: *mut u64) -> c_int {
    guarded(|| {
        // SAFETY: as the caller promises.
        let (tokenizer, out) = unsafe { (borrow(tokenizer)?, view_mut(out, 3)?) };
        let vocabulary = &tokenizer.vocabulary;
        let bytes: usize = vocabulary.tokens.iter().map(|token| token.0.len()).sum();
        out.copy_from_slice(&[vocabulary.tokens.len() as u64, vocabulary.num_ids() as u64, bytes as u64]);
        Ok(())
    })
}

/// Writes the tokens in the order of their ids, in the layout of `rustbpe_from_ranks`; `rustbpe_sizes` tells the sizes.
///
/// # Safety
/// `tokenizer` is a live handle; the buffers are valid for writing as many elements as `rustbpe_sizes` says
/// (`offsets` one more than tokens).
#[no_mangle]
pub unsafe extern "C" fn rustbpe_ranks(
    tokenizer: *const Tokenizer,
    bytes: *mut u8,
    offsets: *mut i64,
    ids: *mut u32,
) -> c_int {
    guarded(|| {
        // SAFETY: as the caller promises.
        let tokens = &unsafe { borrow(tokenizer)? }.vocabulary.tokens;
        let total = tokens.iter().map(|token| token.0.len()).sum();
        // SAFETY: as the caller promises.
        let (bytes, offsets, ids) =
            unsafe { (view_mut(bytes, total)?, view_mut(offsets, tokens.len() + 1)?, view_mut(ids, tokens.len())?) };
        let mut end = 0;
        offsets[0] = 0;
        for (i, (token, id)) in tokens.iter().enumerate() {
            bytes[end..end + token.len()].copy_from_slice(token);
            end += token.len();
            offsets[i + 1] = end as i64;
            ids[i] = *id;
        }
        Ok(())
    })
}

/// Ids that wait to be copied into the caller's buffers.
pub enum Encoded {
    Narrow(Vec<EncodedBlock<u16>>),
    Wide(Vec<EncodedBlock<u32>>),
}

/// Encodes documents (0 threads: one for each processor). Writes the number of ids and their width in bytes: 2 if every
/// id of the vocabulary fits, else 4.
///
/// # Safety
/// `tokenizer` is a live handle; the buffers of `documents` are valid and do not change during the call; `total`,
/// `width` and `out` are valid for writing.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encode(
    tokenizer: *const Tokenizer,
    documents: *const RawDocuments,
    threads: usize,
    total: *mut u64,
    width: *mut u64,
    out: *mut *mut Encoded,
) -> c_int {
    fn count<T>(blocks: &[EncodedBlock<T>]) -> u64 {
        blocks.iter().map(|block| block.ids.len() as u64).sum()
    }
    guarded(|| {
        // SAFETY: as the caller promises.
        let (tokenizer, documents) = unsafe { (borrow(tokenizer)?, borrow(documents)?.view()?) };
        let encoder = tokenizer.encoder();
        let (num_ids, id_width, encoded) = if tokenizer.vocabulary.num_ids() <= 1 << 16 {
            let blocks = encoder.encode(&documents, threads)?;
            (count(&blocks), 2, Encoded::Narrow(blocks))
        } else {
            let blocks = encoder.encode(&documents, threads)?;
            (count(&blocks), 4, Encoded::Wide(blocks))
        };
        // SAFETY: as the caller promises.
        unsafe {
            put(total, num_ids);
            put(width, id_width);
            put(out, Box::into_raw(Box::new(encoded)));
        }
        Ok(())
    })
}

/// Copies the ids, and for each document where its ids start (one more than documents). Consumes the handle.
///
/// # Safety
/// `encoded` is a live handle, which ends here; `ids` is valid for writing as many ids of the width that
/// `rustbpe_encode` told, `offsets` for one more than documents.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoded_take(
    encoded: *mut Encoded,
    ids: *mut u8,
    num_ids: usize,
    offsets: *mut i64,
    num_offsets: usize,
) -> c_int {
    fn copy<T: Id + Sync>(blocks: &[EncodedBlock<T>], mut ids: &mut [T], offsets: &mut [i64]) -> Result<(), String> {
        let ends = blocks.iter().flat_map(|block| &block.lengths).scan(0, |end, &length| {
            *end += length as i64;
            Some(*end)
        });
        let mut slots = offsets.iter_mut();
        slots.next().map(|first| *first = 0).ok_or("there is no room for the offsets")?;
        slots.zip(ends).for_each(|(slot, end)| *slot = end);
        for block in blocks {
            if block.ids.len() > ids.len() {
                return Err("there is no room for the ids".into());
            }
            let (here, rest) = ids.split_at_mut(block.ids.len());
            here.copy_from_slice(&block.ids);
            ids = rest;
        }
        Ok(())
    }
    guarded(|| {
        if encoded.is_null() {
            return Err("the handle is null".into());
        }
        // SAFETY: not null, and the caller gives the handle up.
        let encoded = unsafe { Box::from_raw(encoded) };
        // SAFETY: as the caller promises; NumPy's fresh memory is only written.
        let offsets = unsafe { view_mut(offsets, num_offsets)? };
        match *encoded {
            // SAFETY: as above.
            Encoded::Narrow(blocks) => copy(&blocks, unsafe { view_mut(ids as *mut u16, num_ids)? }, offsets),
            // SAFETY: as above.
            Encoded::Wide(blocks) => copy(&blocks, unsafe { view_mut(ids as *mut u32, num_ids)? }, offsets),
        }
    })
}

/// Writes the bytes of the ids into `out`. With too small a `capacity` nothing is written. `needed` is always set.
///
/// # Safety
/// `tokenizer` is a live handle; `ids` is valid for `num_ids`, `out` for writing `capacity` bytes, `needed` for writing.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_decode(
    tokenizer: *const Tokenizer,
    ids: *const u32,
    num_ids: usize,
    out: *mut u8,
    capacity: usize,
    needed: *mut u64,
) -> c_int {
    guarded(|| {
        // SAFETY: as the caller promises.
        let (tokenizer, ids) = unsafe { (borrow(tokenizer)?, view(ids, num_ids)?) };
        let mut bytes = Vec::new();
        tokenizer.vocabulary.decode(ids, &mut bytes)?;
        if bytes.len() <= capacity {
            // SAFETY: as the caller promises.
            unsafe { view_mut(out, bytes.len())? }.copy_from_slice(&bytes);
        }
        // SAFETY: as the caller promises.
        unsafe { put(needed, bytes.len() as u64) };
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        let mut buffer = vec![0; 200];
        // SAFETY: the buffer has the capacity that is told.
        let length = unsafe { rustbpe_last_error(buffer.as_mut_ptr(), buffer.len()) };
        String::from_utf8_lossy(&buffer[..length.min(200)]).into_owned()
    }

    #[test]
    fn panics_and_errors_become_messages() {
        assert_eq!(guarded(|| Ok(())), 0);
        assert_eq!(guarded(|| Err("told".into())), -1);
        assert_eq!(last_error(), "told");
        assert_eq!(guarded(|| panic!("number {}", 7)), -1);
        assert_eq!(last_error(), "internal error: number 7");
    }

    #[test]
    fn null_handles_and_buffers_are_refused() {
        let mut sizes = [0u64; 3];
        // SAFETY: null is allowed everywhere here; the other pointers are to live memory.
        unsafe {
            assert_eq!(rustbpe_sizes(std::ptr::null(), sizes.as_mut_ptr()), -1);
            assert!(last_error().contains("null"));
            let (ids, bytes) = (std::ptr::null(), std::ptr::null());
            assert_eq!(rustbpe_from_ranks(bytes, 0, bytes, 0, std::ptr::null(), ids, 1, std::ptr::null_mut()), -1);
            rustbpe_tokenizer_free(std::ptr::null_mut());
            rustbpe_counter_free(std::ptr::null_mut());
        }
    }
}
