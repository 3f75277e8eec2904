//! Content hashes of model weights.

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::safetensors::TensorFile;
use crate::Result;

/// SHA-256 over the sorted names, dtypes, shapes and values of all tensors of `files`, however they are split into files.
///
/// # Errors
/// If a file is malformed.
pub fn of_files(files: &[TensorFile]) -> Result<String> {
    let mut entries = Vec::new();
    for file in files {
        for (name, dtype, shape) in file.entries() {
            entries.push((name, format!("{dtype:?}{shape:?}"), file));
        }
    }
    entries.sort_by(|x, y| x.0.cmp(&y.0));
    let parts = entries
        .par_iter()
        .map(|(name, kind, file)| {
            let mut hash = Sha256::new();
            hash.update(name.as_bytes());
            hash.update(kind.as_bytes());
            file.read(name, |piece| hash.update(piece))?;
            Ok(hash.finalize().to_vec())
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(of_parts(parts.iter().map(Vec::as_slice)))
}

/// SHA-256 over a sequence of byte strings, as `sha256:<hex>`.
pub fn of_parts<'a>(parts: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}
