//! Calls into the tokenizer library. Its own assertions, which a malformed `tokenizer.json` can reach, become errors.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// The outcome of a call, its error as text.
pub(super) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizer library failed; is tokenizer.json damaged?".into()),
    }
}
