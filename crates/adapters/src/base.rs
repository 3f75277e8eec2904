//! What is known of the base that an adapter was made for, and how that is said.

use crate::config::AdapterConfig;

/// What is known of the base that an adapter was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseCheck {
    /// It is the model at hand: made on it, or its content hash is the one in the file.
    Same,
    /// It was not checked: the file holds no content hash (other tools write none).
    NoHash,
    /// Its weights are those in the file, its settings were not checked: an older file holds none.
    NoSettings,
    /// The hash or the settings in the file are others, and were overruled.
    Forced,
}

/// The last part of a path or hub id, in small letters.
fn last(name: &str) -> Option<String> {
    let name = name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next()?;
    (!name.is_empty() && name != ".").then(|| name.to_lowercase())
}

impl BaseCheck {
    /// What must be said of the base of an adapter with the settings `config`, where it is not known to be the right one; `names`
    /// are those the model goes by (hub id, folder), which are compared with the one in the settings.
    pub fn note(self, config: &AdapterConfig, names: &[&str]) -> Option<String> {
        let what = match self {
            BaseCheck::Same => return None,
            BaseCheck::NoHash => "the file holds no hash of its base, so the base was not checked",
            BaseCheck::NoSettings => {
                "the file holds a hash of its base's weights, which are the same, but none of its settings (config.json), \
                 which were not checked"
            }
            BaseCheck::Forced => "it was made for a base with another hash or other settings, and is used all the same",
        };
        let revision = config.revision.as_ref().map_or(String::new(), |r| format!(" at revision `{r}`"));
        let Some(base) = config.base.as_deref().filter(|b| last(b).is_some()) else {
            return Some(format!("{what}; it does not name its base"));
        };
        let Some(given) = names.iter().find(|n| last(n).is_some()) else {
            return Some(format!("{what}; it names `{base}`{revision}"));
        };
        let same = names.iter().any(|n| last(n) == last(base));
        Some(match same {
            true => format!("{what}; it names `{base}`{revision}, as this model is named"),
            false => format!("{what}; it names `{base}`{revision}, but this model is `{given}`"),
        })
    }
}
