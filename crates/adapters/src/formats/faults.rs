//! Faults that tests inject into the writes, renames and removals of this thread: full disks, errors of the system, kills.
//!
//! The one table of them. Whatever writes files asks it: the atomic writer beside this file, what appends to files through
//! [`Limited`], and writers of crates that do not know this one where a trial connects them with [`allowed`] and [`instant`].

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};

thread_local! {
    static WRITE_LIMIT: Cell<Option<(u64, i32)>> = const { Cell::new(None) };
    static KILL: Cell<Option<u32>> = const { Cell::new(None) };
    static MOVE_LIMIT: Cell<Option<(u32, i32)>> = const { Cell::new(None) };
}

/// Puts a cell of this thread back to nothing, also when the test's closure panics.
struct Reset<T: 'static>(&'static std::thread::LocalKey<Cell<Option<T>>>);

impl<T: 'static> Drop for Reset<T> {
    fn drop(&mut self) {
        self.0.set(None);
    }
}

/// The system's error number of a full disk.
const NO_SPACE: i32 = 28;

/// Runs `f` with every atomic write of this thread failing as a full disk after `bytes` more bytes: fault injection for
/// tests of what survives.
#[doc(hidden)]
pub fn with_write_limit<T>(bytes: u64, f: impl FnOnce() -> T) -> T {
    with_write_fault(bytes, NO_SPACE, f)
}

/// As [`with_write_limit`], with the system's error number `errno` for the writes that fail.
#[doc(hidden)]
pub fn with_write_fault<T>(bytes: u64, errno: i32, f: impl FnOnce() -> T) -> T {
    WRITE_LIMIT.set(Some((bytes, errno)));
    let _reset = Reset(&WRITE_LIMIT);
    f()
}

/// Runs `f` with the `n`-th rename or removal (from 0) of this thread and all after it failing with the system's error
/// number `errno`.
#[doc(hidden)]
pub fn with_move_fault<T>(n: u32, errno: i32, f: impl FnOnce() -> T) -> T {
    MOVE_LIMIT.set(Some((n, errno)));
    let _reset = Reset(&MOVE_LIMIT);
    f()
}

/// Runs `f`; gives with its result the bytes it wrote and the renames and removals it made: the places for faults.
#[doc(hidden)]
pub fn measured<T>(f: impl FnOnce() -> T) -> (T, u64, u32) {
    WRITE_LIMIT.set(Some((u64::MAX, NO_SPACE)));
    MOVE_LIMIT.set(Some((u32::MAX, NO_SPACE)));
    let _reset = (Reset(&WRITE_LIMIT), Reset(&MOVE_LIMIT));
    let result = f();
    let bytes = WRITE_LIMIT.get().map_or(0, |(left, _)| u64::MAX - left);
    let moves = MOVE_LIMIT.get().map_or(0, |(left, _)| u32::MAX - left);
    (result, bytes, moves)
}

/// Runs `f` and ends it by a panic before the `n`-th rename or removal (from 0) of this thread: a kill at that instant, for
/// no clean-up of this file runs then.
#[doc(hidden)]
pub fn with_kill_before<T>(n: u32, f: impl FnOnce() -> T) -> T {
    KILL.set(Some(n));
    let _reset = Reset(&KILL);
    f()
}

/// An instant at which a test may kill, or have the operation fail: before each rename and removal.
///
/// # Errors
/// The injected one.
pub fn instant() -> io::Result<()> {
    if let Some(left) = KILL.get() {
        assert!(left > 0, "killed by with_kill_before");
        KILL.set(Some(left - 1));
    }
    match MOVE_LIMIT.get() {
        Some((0, errno)) => return Err(io::Error::from_raw_os_error(errno)),
        Some((left, errno)) => MOVE_LIMIT.set(Some((left - 1, errno))),
        None => {}
    }
    Ok(())
}

/// How many of `bytes` may be written now, at least 1 if `bytes` is; they count as written.
///
/// # Errors
/// The injected one, where nothing may be written any more.
pub fn allowed(bytes: usize) -> io::Result<usize> {
    let Some((left, errno)) = WRITE_LIMIT.get() else { return Ok(bytes) };
    if left == 0 && bytes > 0 {
        return Err(io::Error::from_raw_os_error(errno));
    }
    let now = bytes.min(usize::try_from(left).unwrap_or(usize::MAX));
    WRITE_LIMIT.set(Some((left - now as u64, errno)));
    Ok(now)
}

/// A file whose writes fail where a test wants them to.
#[derive(Debug)]
pub struct Limited(File);

impl Limited {
    /// The file, written through the table.
    pub fn new(file: File) -> Self {
        Self(file)
    }

    /// The file itself.
    pub fn get(&self) -> &File {
        &self.0
    }

    /// The file itself, to move in it.
    pub fn get_mut(&mut self) -> &mut File {
        &mut self.0
    }
}

impl Write for Limited {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let now = allowed(buf.len())?;
        self.0.write(&buf[..now])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
