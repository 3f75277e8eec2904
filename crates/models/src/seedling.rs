//! The embedded default model: a small Llama with its own tokenizer, carried inside the binary.

use std::path::{Path, PathBuf};

use espalier_adapters::formats::{atomic, hash};

use crate::{Error, Result};

/// Its name, where a model is asked for.
pub const NAME: &str = "seedling";

// A static, not a const: a const would be in the binary once for each place that names it.
static FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../assets/seedling/config.json")),
    ("model.safetensors", include_bytes!("../assets/seedling/model.safetensors")),
    ("tokenizer.json", include_bytes!("../assets/seedling/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../assets/seedling/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("../assets/seedling/chat_template.jinja")),
    ("README.md", include_bytes!("../assets/seedling/README.md")),
];

/// The user's folder for files that can be made again: `ESPALIER_CACHE`, else the system's cache folder.
pub fn cache_folder() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("ESPALIER_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("espalier")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/espalier")))
        .unwrap_or_else(|| std::env::temp_dir().join("espalier"))
}

/// The folder of the model, written out where it is not there yet.
///
/// # Errors
/// If the cache folder cannot be written.
pub fn folder() -> Result<PathBuf> {
    let content = hash::of_parts(FILES.iter().map(|(_, bytes)| *bytes));
    let short: String = content.chars().skip("sha256:".len()).take(12).collect();
    let folder = cache_folder().join(format!("{NAME}-{short}"));
    let whole = FILES.iter().all(|(name, bytes)| {
        std::fs::metadata(folder.join(name)).is_ok_and(|m| m.is_file() && m.len() == bytes.len() as u64)
    });
    if !whole {
        write(&folder)?;
    }
    Ok(folder)
}

/// Writes the model into `folder`, in place of what is there.
///
/// # Errors
/// If the folder cannot be written.
pub fn write(folder: &Path) -> Result<()> {
    atomic::replace_folder(folder, |temp| -> Result<()> {
        for (name, bytes) in FILES {
            atomic::write(&temp.join(name), |out| out.write_all(bytes)).map_err(Error::from)?;
        }
        Ok(())
    })
}
