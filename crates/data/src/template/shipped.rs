//! The chat templates that come with this program, by one list: each is a file in `shipped/`, and a name in recipes.
//!
//! They follow the formats that the models' makers document. What an assistant says stands in a generation block together
//! with the mark that ends its turn.

use std::collections::BTreeMap;
use std::path::Path;

use super::ChatTemplate;
use crate::error::{DataError, Result};

macro_rules! shipped {
    ($($name:literal)*) => {
        /// Names and texts of the shipped templates, by name.
        pub const SHIPPED: &[(&str, &str)] = &[$(($name, include_str!(concat!("shipped/", $name, ".jinja")))),*];
    };
}

shipped! {
    "alpaca"
    "chatml"
    "command_r"
    "deepseek"
    "gemma"
    "granite"
    "llama2"
    "llama3"
    "mistral"
    "phi3"
    "phi4"
    "qwen"
    "vicuna"
    "zephyr"
}

/// Largest file of a template, in bytes.
pub(super) const LARGEST: u64 = 1 << 20;

/// The text of a shipped template.
pub fn shipped(name: &str) -> Option<&'static str> {
    SHIPPED.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

impl ChatTemplate {
    /// A shipped template by its name, or one from a file.
    pub fn named(name: &str, specials: BTreeMap<String, String>) -> Result<Self> {
        if let Some(text) = shipped(name) {
            return Self::new(text, specials);
        }
        let path = Path::new(name);
        if !path.is_file() {
            let known: Vec<&str> = SHIPPED.iter().map(|(known, _)| *known).collect();
            return Err(DataError::Template(format!(
                "{name:?} is neither a file nor one of the shipped templates {}",
                known.join(", ")
            )));
        }
        Self::new(&read(path)?, specials).map(|template| template.read_from(path)).map_err(|error| error.in_file(path))
    }
}

/// The text of a template's file.
pub(super) fn read(path: &Path) -> Result<String> {
    let length = std::fs::metadata(path).map_err(DataError::io(path))?.len();
    if length > LARGEST {
        return Err(DataError::Template(format!("{}: {length} bytes, more than {LARGEST}", path.display())));
    }
    std::fs::read_to_string(path).map_err(DataError::io(path))
}
