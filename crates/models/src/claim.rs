//! Which folders a written model may replace: a new or empty one, and one that holds nothing but a model written here. Never the
//! base it was made from.

use std::path::Path;

use espalier_adapters::formats::safetensors::TensorFile;

use crate::export::COMPANIONS;
use crate::{Error, Result};

/// Metadata key of the weight files that mark a folder as written here.
pub(crate) const MARK: &str = "espalier.export";

fn refused(path: &Path, message: String) -> Error {
    Error::Occupied { path: path.to_owned(), message }
}

/// Whether `out` may be written, or replaced whole, by a model made from `base`.
///
/// # Errors
/// If `out` is `base` or holds it, or holds something that was not written here; names the first such file.
pub fn claim(out: &Path, base: Option<&Path>) -> Result<()> {
    if !out.exists() {
        return Ok(());
    }
    if let (Some(base), Ok(out)) = (base.and_then(|b| b.canonicalize().ok()), out.canonicalize())
        && base.starts_with(&out)
    {
        return Err(refused(&out, "this is the base model itself; writing there would destroy it".into()));
    }
    if !out.is_dir() {
        return Err(refused(out, "a file of that name is there".into()));
    }
    let entries = std::fs::read_dir(out).map_err(|e| Error::io(out, e))?;
    let mut weights = 0;
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(|e| Error::io(out, e))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    for name in &names {
        let path = out.join(name);
        let known = ["config.json", "model.safetensors.index.json", "README.md"];
        if name.ends_with(".safetensors") {
            let ours = TensorFile::open(&path).is_ok_and(|file| file.metadata().contains_key(MARK));
            if !ours {
                return Err(refused(out, format!("the folder is not empty, and `{name}` was not written here")));
            }
            weights += 1;
        } else if !path.is_file() || !(known.contains(&name.as_str()) || COMPANIONS.contains(&name.as_str())) {
            return Err(refused(
                out,
                format!("the folder is not empty, and `{name}` is no part of a model written here"),
            ));
        }
    }
    if weights == 0 && !names.is_empty() {
        return Err(refused(out, "the folder is not empty, and holds no model written here".into()));
    }
    Ok(())
}
