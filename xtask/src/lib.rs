//! Habits of the repository: invariants that no compiler checks, and documentation made from the code.

pub mod docs;
pub mod tidy;

use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
