//! What is known of the base that an adapter was made for, and how that is said.

use crate::attach::Attached;

/// What is known of the base that an adapter was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseCheck {
    /// It is the model at hand: made on it, or its content hash is the one in the file.
    Same,
    /// It was not checked: the file holds no content hash (other tools write none).
    NoHash,
    /// The hash in the file is another one, and was overruled.
    Forced,
}

/// The last part of a path or hub id, in small letters.
fn last(name: &str) -> Option<String> {
    let name = name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next()?;
    (!name.is_empty() && name != ".").then(|| name.to_lowercase())
}

impl Attached {
    /// What must be said of the base, where it is not known to be the right one; `names` are those the model goes by (hub id,
    /// folder), which are compared with the one in the adapter's settings.
    pub fn base_note(&self, names: &[&str]) -> Option<String> {
        let what = match self.base {
            BaseCheck::Same => return None,
            BaseCheck::NoHash => "the file holds no hash of its base, so the base was not checked",
            BaseCheck::Forced => "it was made for a base with another hash, and is used all the same",
        };
        let revision = self.config.revision.as_ref().map_or(String::new(), |r| format!(" at revision `{r}`"));
        let Some(base) = self.config.base.as_deref().filter(|b| last(b).is_some()) else {
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
