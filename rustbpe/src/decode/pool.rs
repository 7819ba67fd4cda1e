//! Threads that stay between calls, and share the chunks of a job's phases.
//!
//! A job is a list of phases, each of them a number of chunks; a phase begins when all chunks of the one before are
//! done. A thread first takes the chunks that are its own, so that the same thread (and its core's cache) meets the
//! same weights in every job, and then those that another has not begun. So nobody waits for a thread that the system
//! has put aside, except for the one chunk it may hold. Who waits spins for some microseconds and then sleeps: other
//! programs get the core.

use std::hint::spin_loop;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// Rounds of spinning before a thread sleeps: a round is 10 to 50 ns. Within a job the next phase is near; between two
/// jobs lies the choice of a token.
const SPINS_IN_JOB: u32 = 1000;
const SPINS_BETWEEN_JOBS: u32 = 4000;

/// What a pool works at. `run` is called once for each chunk of each phase, on any of the threads.
pub trait Job: Send + Sync + 'static {
    /// # Safety
    /// Called by the pool only: all chunks of earlier phases are done, and no two threads have the same number.
    unsafe fn run(&self, phase: usize, chunk: usize, thread: usize);
}

/// An atomic number on a cache line of its own: two threads that count do not slow each other down.
#[repr(align(128))]
struct Padded(AtomicU64);

/// The chunks of one phase. Every word carries the number of the job in its upper half, so that a thread which comes
/// too late takes nothing of the next job's.
struct Turn {
    /// For each thread the chunks that are its own and not begun: job << 32 | first << 16 | end.
    own: Vec<Padded>,
    /// job << 32 | chunks that are not done.
    left: Padded,
}

struct Shared<J> {
    job: J,
    turns: Vec<Turn>,
    /// The number of the current job in the upper half, its phases in the lower; `u64::MAX`: the threads end.
    current: Padded,
    /// A chunk has panicked.
    failed: AtomicBool,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    bell: Condvar,
}

/// Threads and the job that they repeat. The calling thread is number 0.
pub struct Pool<J: Job> {
    shared: Arc<Shared<J>>,
    threads: usize,
    count: u32,
}

impl<J: Job> Pool<J> {
    /// `threads - 1` new threads for a job of `phases` phases.
    pub fn new(job: J, phases: usize, threads: usize) -> Result<Self, String> {
        let padded = || Padded(AtomicU64::new(0));
        let turn = |_| Turn { own: (0..threads).map(|_| padded()).collect(), left: padded() };
        let shared = Arc::new(Shared {
            job,
            turns: (0..phases).map(turn).collect(),
            current: padded(),
            failed: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            bell: Condvar::new(),
        });
        let pool = Pool { shared, threads, count: 0 };
        for number in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let name = format!("decode-{number}");
            // Not joined at the end: they hold nothing but `shared`, and in a forked process they do not exist.
            thread::Builder::new().name(name).spawn(move || shared.serve(number)).map_err(|e| e.to_string())?;
        }
        Ok(pool)
    }

    /// The job, between two runs: nobody else looks at it then.
    pub fn job(&self) -> &J {
        &self.shared.job
    }

    /// The number of threads, the calling one included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Does the job once, with these numbers of chunks; returns when all of them are done. An error: one has panicked.
    pub fn run(&mut self, chunks: &[usize]) -> Result<(), String> {
        assert!(chunks.len() <= self.shared.turns.len() && chunks.iter().all(|&n| n < 1 << 16));
        self.count = self.count.wrapping_add(1) & (u32::MAX >> 1);
        let job = (self.count as u64) << 32;
        for (turn, &n) in self.shared.turns.iter().zip(chunks) {
            turn.left.0.store(job | n as u64, Ordering::Relaxed);
            for (i, own) in turn.own.iter().enumerate() {
                let (first, end) = (n * i / self.threads, n * (i + 1) / self.threads);
                // Release: whoever takes a chunk sees what was written before the job began.
                own.0.store(job | (first << 16 | end) as u64, Ordering::Release);
            }
        }
        self.shared.current.0.store(job | chunks.len() as u64, Ordering::SeqCst);
        self.shared.wake();
        let all_done = self.shared.work(job, chunks.len(), 0);
        debug_assert!(all_done);
        if self.shared.failed.swap(false, Ordering::SeqCst) {
            return Err("internal error: a thread of the decoder has panicked".into());
        }
        Ok(())
    }
}

impl<J: Job> Drop for Pool<J> {
    fn drop(&mut self) {
        self.shared.current.0.store(u64::MAX, Ordering::SeqCst);
        self.shared.wake();
    }
}

impl<J: Job> Shared<J> {
    /// What a thread of the pool does until its end.
    fn serve(&self, thread: usize) {
        let mut seen = 0;
        loop {
            self.wait(SPINS_BETWEEN_JOBS, || self.current.0.load(Ordering::SeqCst) != seen);
            seen = self.current.0.load(Ordering::SeqCst);
            if seen == u64::MAX {
                return;
            }
            self.work(seen & !u64::from(u32::MAX), seen as u32 as usize, thread);
        }
    }

    /// Takes part in a job; false if it was over before.
    fn work(&self, job: u64, phases: usize, thread: usize) -> bool {
        self.turns[..phases].iter().enumerate().all(|(phase, turn)| {
            let threads = turn.own.len();
            for i in 0..threads {
                while let Some(chunk) = turn.take((thread + i) % threads, job) {
                    // SAFETY: the phase before is done, and this thread alone has its number.
                    let run = AssertUnwindSafe(|| unsafe { self.job.run(phase, chunk, thread) });
                    if catch_unwind(run).is_err() {
                        self.failed.store(true, Ordering::SeqCst); // and counted as done: the others must not wait
                    }
                    // Release: whoever sees the phase done sees what its chunks wrote.
                    if turn.left.0.fetch_sub(1, Ordering::SeqCst) == job + 1 {
                        self.wake();
                    }
                }
            }
            self.wait(SPINS_IN_JOB, || {
                let left = turn.left.0.load(Ordering::SeqCst);
                left == job || left >> 32 != job >> 32
            });
            turn.left.0.load(Ordering::SeqCst) == job
        })
    }

    /// Waits until `ready`, which something before a `wake` makes true.
    fn wait(&self, spins: u32, ready: impl Fn() -> bool) {
        for _ in 0..spins {
            if ready() {
                return;
            }
            spin_loop();
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        // First counted, then looked: either this thread sees what happened, or `wake` sees the sleeper (both SeqCst).
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !ready() {
            guard = self.bell.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner)); // who has looked by now is waiting
            self.bell.notify_all();
        }
    }
}

impl Turn {
    /// One of the chunks that belong to `owner`, if the job is still `job` and one is left.
    fn take(&self, owner: usize, job: u64) -> Option<usize> {
        let word = &self.own[owner].0;
        let mut seen = word.load(Ordering::Acquire);
        loop {
            let (first, end) = (seen >> 16 & 0xffff, seen & 0xffff);
            if seen >> 32 != job >> 32 || first >= end {
                return None;
            }
            match word.compare_exchange_weak(seen, seen + (1 << 16), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(first as usize),
                Err(now) => seen = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts the calls of each chunk, and notices one that begins before the phase before it has ended.
    struct Counting {
        calls: Vec<Vec<AtomicUsize>>,
        too_early: AtomicBool,
    }

    impl Job for Counting {
        unsafe fn run(&self, phase: usize, chunk: usize, thread: usize) {
            assert!(thread < 4);
            self.calls[phase][chunk].fetch_add(1, Ordering::SeqCst);
            let done = |p: usize| self.calls[p].iter().map(|c| c.load(Ordering::SeqCst)).sum::<usize>();
            let round = self.calls[phase][chunk].load(Ordering::SeqCst);
            if phase > 0 && done(phase - 1) < round * self.calls[phase - 1].len() {
                self.too_early.store(true, Ordering::SeqCst);
            }
        }
    }

    #[test]
    fn every_chunk_is_done_once_after_the_phase_before() {
        let sizes = [3, 0, 1, 17, 2, 40];
        for threads in 1..=4 {
            let calls = sizes.iter().map(|&n| (0..n).map(|_| AtomicUsize::new(0)).collect()).collect();
            let job = Counting { calls, too_early: AtomicBool::new(false) };
            let mut pool = Pool::new(job, sizes.len(), threads).unwrap();
            for round in 1..=300 {
                pool.run(&sizes).unwrap();
                let all = pool.job().calls.iter().flatten();
                assert!(all.into_iter().all(|c| c.load(Ordering::SeqCst) == round), "{threads} threads, {round}");
                if round % 100 == 0 {
                    thread::sleep(std::time::Duration::from_millis(5)); // long enough for the threads to sleep
                }
            }
            assert!(!pool.job().too_early.load(Ordering::SeqCst));
        }
    }

    struct Panicking(AtomicBool);

    impl Job for Panicking {
        unsafe fn run(&self, _: usize, chunk: usize, _: usize) {
            assert!(chunk != 3 || !self.0.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn a_panic_is_an_error_and_the_pool_goes_on() {
        let mut pool = Pool::new(Panicking(AtomicBool::new(true)), 2, 3).unwrap();
        assert!(pool.run(&[8, 8]).unwrap_err().contains("panicked"));
        pool.job().0.store(false, Ordering::SeqCst);
        pool.run(&[8, 8]).unwrap();
    }
}
