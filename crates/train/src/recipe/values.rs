//! Values of recipe keys that take more than one form.

use serde::{Deserialize, Serialize};

/// One text or several.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct OneOrMany(pub Vec<String>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Texts {
    One(String),
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(match Texts::deserialize(deserializer)? {
            Texts::One(text) => vec![text],
            Texts::Many(texts) => texts,
        }))
    }
}

/// One source of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSource {
    /// File or folder.
    pub path: String,
    /// Share in the mixture relative to the others; rows are in proportion to their number where no source has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

/// Sources of data.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DataList(pub Vec<DataSource>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Source {
    Path(String),
    Table(DataSource),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Sources {
    One(Source),
    Many(Vec<Source>),
}

impl<'de> Deserialize<'de> for DataList {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let source = |s| match s {
            Source::Path(path) => DataSource { path, weight: None },
            Source::Table(table) => table,
        };
        Ok(Self(match Sources::deserialize(deserializer)? {
            Sources::One(one) => vec![source(one)],
            Sources::Many(many) => many.into_iter().map(source).collect(),
        }))
    }
}
