//! An allocator that counts the bytes in use, and the most of them at once.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// The system's allocator, counted. A program that wants a run's memory told from a rehearsal makes it its global allocator;
/// elsewhere [`in_use`] gives nothing.
#[derive(Debug)]
pub struct Counting;

static IN_USE: AtomicI64 = AtomicI64::new(0);
static PEAK: AtomicI64 = AtomicI64::new(0);

/// Bytes that a thread counts by itself before others see them; larger pieces are seen at once.
const UNSEEN: i64 = 1 << 12;

thread_local! {
    static PENDING: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    if bytes.abs() >= UNSEEN {
        return see(bytes);
    }
    // A thread that is ending has no cell any more: what it allocates then is small.
    let _ = PENDING.try_with(|pending| {
        let sum = pending.get() + bytes;
        let seen = sum.abs() >= UNSEEN;
        pending.set(if seen { 0 } else { sum });
        if seen {
            see(sum);
        }
    });
}

fn see(bytes: i64) {
    let now = IN_USE.fetch_add(bytes, Relaxed) + bytes;
    if bytes > 0 {
        PEAK.fetch_max(now, Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        let at = unsafe { System.alloc(layout) };
        if !at.is_null() {
            count(layout.size() as i64);
        }
        at
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        let at = unsafe { System.alloc_zeroed(layout) };
        if !at.is_null() {
            count(layout.size() as i64);
        }
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) };
        count(-(layout.size() as i64));
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's.
        let new = unsafe { System.realloc(at, layout, size) };
        if !new.is_null() {
            count(size as i64 - layout.size() as i64);
        }
        new
    }
}

/// Bytes in use now; None where this is not the program's allocator.
pub fn in_use() -> Option<u64> {
    let now = IN_USE.load(Relaxed);
    (now > 0).then_some(now as u64)
}

/// What `f` gives, with the change of the bytes in use over it, and the most of them at once above the bytes before it. Other
/// threads that allocate meanwhile are counted too.
pub(super) fn counted<T>(f: impl FnOnce() -> T) -> (T, Use) {
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = f();
    let (after, peak) = (IN_USE.load(Relaxed), PEAK.load(Relaxed));
    (result, Use { kept: (after - before) as f64, peak: (peak.max(after) - before) as f64 })
}

/// Bytes that something took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Use {
    /// Still in use afterwards; below 0 where more was freed than taken.
    pub(super) kept: f64,
    /// The most at once.
    pub(super) peak: f64,
}

impl Use {
    /// At `n`, on the line through `a` at `at.0` and `b` at `at.1`.
    pub(super) fn extended(a: Self, b: Self, at: (f64, f64), n: f64) -> Self {
        let line = |a: f64, b: f64| a + (b - a) * (n - at.0) / (at.1 - at.0);
        Self { kept: line(a.kept, b.kept), peak: line(a.peak, b.peak) }
    }
}
