//! Where tests connect their table of injected faults: this crate writes files, and knows no other crate that does.

use std::cell::Cell;
use std::io;

/// Asked before something is written, renamed or removed.
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    /// How many of so many bytes may be written now.
    pub allowed: fn(usize) -> io::Result<usize>,
    /// Before a rename.
    pub instant: fn() -> io::Result<()>,
}

thread_local! {
    static FAULTS: Cell<Option<Faults>> = const { Cell::new(None) };
}

/// Runs `f` with the writes of this thread asking `faults`.
pub fn with<T>(faults: Faults, f: impl FnOnce() -> T) -> T {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            FAULTS.set(None);
        }
    }
    FAULTS.set(Some(faults));
    let _reset = Reset;
    f()
}

pub(crate) fn allowed(bytes: usize) -> io::Result<usize> {
    FAULTS.get().map_or(Ok(bytes), |faults| (faults.allowed)(bytes))
}

pub(crate) fn instant() -> io::Result<()> {
    FAULTS.get().map_or(Ok(()), |faults| (faults.instant)())
}
