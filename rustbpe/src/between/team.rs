//! Rows of a kernel shared among the threads that torch computes with.
//!
//! torch's workers spin for a while after each of its operations. A pool of our own would fight with them for the cores,
//! so the caller passes OpenMP's own entry, and the same workers go on. Without it (another OpenMP than GNU's) a call
//! starts threads of its own.

use std::ops::Range;
use std::os::raw::{c_uint, c_void};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// `GOMP_parallel`: calls a function with its argument on so many threads, and returns when all have.
pub type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// Elements that a thread takes at a time: enough to be worth the trip, small enough to share with one that is late.
const BLOCK: usize = 1 << 14;

/// Work on the rows of some tensors.
pub trait Kernel: Sync {
    /// # Safety
    /// The rows exist, and no two calls have the same.
    unsafe fn run(&self, rows: Range<usize>);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn run_avx2<K: Kernel>(kernel: &K, rows: Range<usize>) {
    // SAFETY: as for `run`.
    unsafe { kernel.run(rows) }
}

#[cfg(all(target_arch = "x86_64", avx512))]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[allow(clippy::incompatible_msrv)]
unsafe fn run_avx512<K: Kernel>(kernel: &K, rows: Range<usize>) {
    // SAFETY: as for `run`.
    unsafe { kernel.run(rows) }
}

/// Runs the kernel with the widest instructions that this processor has: it is compiled for each of them.
///
/// # Safety
/// As for `run`.
unsafe fn run_best<K: Kernel>(kernel: &K, rows: Range<usize>) {
    #[cfg(all(target_arch = "x86_64", avx512))]
    if is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
    {
        // SAFETY: the processor has the instructions; else as for `run`.
        return unsafe { run_avx512(kernel, rows) };
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: as above.
        return unsafe { run_avx2(kernel, rows) };
    }
    // SAFETY: as for `run`.
    unsafe { kernel.run(rows) }
}

struct Work<'a, K: Kernel> {
    kernel: &'a K,
    rows: usize,
    block: usize,
    next: AtomicUsize,
    failed: AtomicBool,
}

impl<K: Kernel> Work<'_, K> {
    /// Works at blocks of rows until none is left.
    fn take(&self) {
        loop {
            let first = self.block * self.next.fetch_add(1, Ordering::Relaxed);
            if first >= self.rows {
                return;
            }
            let rows = first..(first + self.block).min(self.rows);
            // SAFETY: the caller of `run` promises that the rows exist, and the counter gives each block once.
            let run = AssertUnwindSafe(|| unsafe { run_best(self.kernel, rows) });
            if catch_unwind(run).is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
        }
    }

    extern "C" fn enter(work: *mut c_void) {
        // SAFETY: `run` below passes itself, and waits until all threads have returned.
        unsafe { &*(work as *const Self) }.take();
    }
}

/// Who computes.
#[derive(Clone, Copy)]
pub struct Team {
    pub parallel: Option<Parallel>,
    pub threads: usize,
}

impl Team {
    /// Runs the kernel on all rows, of `width` elements each.
    ///
    /// # Safety
    /// The kernel's tensors have so many rows.
    pub unsafe fn run<K: Kernel>(&self, kernel: &K, rows: usize, width: usize) -> Result<(), String> {
        let block = (BLOCK / width.max(1)).max(1);
        let work = Work { kernel, rows, block, next: AtomicUsize::new(0), failed: AtomicBool::new(false) };
        let threads = self.threads.min((rows + block - 1) / block);
        match self.parallel {
            _ if threads < 2 => work.take(),
            Some(parallel) => {
                let argument = &work as *const Work<K> as *mut c_void;
                // SAFETY: it is GOMP_parallel, as the caller of the C ABI promises.
                unsafe { parallel(Work::<K>::enter, argument, threads as c_uint, 0) }
            }
            None => thread::scope(|scope| {
                for _ in 1..threads {
                    scope.spawn(|| work.take());
                }
                work.take();
            }),
        }
        match work.failed.into_inner() {
            false => Ok(()),
            true => Err("internal error: a kernel has panicked".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::between::softmax::Softmax;

    struct Count(Vec<AtomicUsize>);

    impl Kernel for Count {
        unsafe fn run(&self, rows: Range<usize>) {
            assert!(!rows.contains(&1000), "a panic");
            for row in rows {
                self.0[row].fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    #[test]
    fn every_row_is_worked_on_once() {
        for threads in 1..4 {
            let count = Count((0..999).map(|_| AtomicUsize::new(0)).collect());
            let team = Team { parallel: None, threads };
            // SAFETY: there are 999 rows.
            unsafe { team.run(&count, 999, 300) }.unwrap();
            assert!(count.0.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            // SAFETY: never reached: row 1000 panics.
            assert!(unsafe { team.run(&count, 1001, 1 << 20) }.unwrap_err().contains("panicked"));
        }
    }

    #[test]
    fn all_instructions_give_the_same_bits() {
        let x: Vec<f32> = (0..1001).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let run = |how: &dyn Fn(&Softmax<f32>)| {
            let mut scores = x.clone();
            let (scores_at, mask) = (scores.as_mut_ptr(), std::ptr::null());
            how(&Softmax { scores: scores_at, queries: 1, keys: x.len(), scale: 0.7, mask, masked: 0, share: 1 });
            scores.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        // SAFETY (of all): one row of 1001 elements; the processor has the instructions.
        let plain = run(&|kernel| unsafe { kernel.run(0..1) });
        assert_eq!(run(&|kernel| unsafe { run_best(kernel, 0..1) }), plain);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            assert_eq!(run(&|kernel| unsafe { run_avx2(kernel, 0..1) }), plain);
        }
    }
}
