//! Memory of its own for weights and activations: aligned to cache lines, and large ones in large pages.
//!
//! A processor finds the place of 4 KB of memory at a time, and its prefetchers stop at that border too: a large model
//! is read faster from pages of 2 MB.

use std::alloc::{alloc, dealloc, handle_alloc_error, Layout};
use std::ops::{Deref, DerefMut};
#[cfg(target_os = "linux")]
use std::os::raw::{c_int, c_void};

const LINE: usize = 64;
const LARGE_PAGE: usize = 2 << 20;

/// A type whose values may consist of zero bytes.
pub trait Plain: Copy + Send + Sync {}
impl Plain for f32 {}
impl Plain for u8 {}

/// A slice of zeros to begin with.
pub struct Buffer<T: Plain> {
    data: *mut T,
    len: usize,
    layout: Layout,
}

// SAFETY: it owns its memory, as a Vec does.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    pub fn new(len: usize) -> Self {
        let bytes = len.max(1) * std::mem::size_of::<T>();
        let align = if bytes >= LARGE_PAGE { LARGE_PAGE } else { LINE };
        let layout = Layout::from_size_align(bytes, align).expect("a size that fits into memory");
        // SAFETY: the layout is not empty.
        let data = unsafe { alloc(layout) };
        if data.is_null() {
            handle_alloc_error(layout);
        }
        if align == LARGE_PAGE {
            ask_for_large_pages(data, bytes); // before the memory is first written, which is when it gets its pages
        }
        // SAFETY: `bytes` were allocated.
        unsafe { data.write_bytes(0, bytes) };
        let data = data as *mut T;
        Buffer { data, len, layout }
    }
}

#[cfg(target_os = "linux")]
fn ask_for_large_pages(data: *mut u8, bytes: usize) {
    extern "C" {
        fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    }
    const MADV_HUGEPAGE: c_int = 14;
    // SAFETY: a hint on memory that was just allocated; systems that do not know it return an error, which is no harm.
    unsafe { madvise(data as *mut c_void, bytes, MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages(_: *mut u8, _: usize) {}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialized values, and `data` is aligned to more than T needs.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.data as *mut u8, self.layout) }
    }
}
