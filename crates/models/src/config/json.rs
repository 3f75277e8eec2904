//! Typed access to a `config.json`, with errors that name the key.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Error, Result};

/// A JSON object with the path it came from.
#[derive(Debug)]
pub(crate) struct Json<'a> {
    path: PathBuf,
    value: &'a Value,
}

impl<'a> Json<'a> {
    pub(crate) fn new(path: &Path, value: &'a Value) -> Result<Self> {
        let json = Self { path: path.to_owned(), value };
        if value.is_object() { Ok(json) } else { Err(json.error("(whole file)", "must be a JSON object")) }
    }

    pub(crate) fn raw(&self) -> &'a Value {
        self.value
    }

    pub(crate) fn error(&self, key: &str, message: impl Into<String>) -> Error {
        Error::Config { path: self.path.clone(), key: key.into(), message: message.into() }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    /// The object under `key`.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Json<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) if value.is_object() => Ok(Some(Json { path: self.path.clone(), value })),
            Some(other) => Err(self.error(key, format!("{other} is not an object"))),
        }
    }

    pub(crate) fn usize(&self, key: &str) -> Result<usize> {
        self.usize_opt(key)?.ok_or_else(|| self.error(key, "missing"))
    }

    pub(crate) fn usize_opt(&self, key: &str) -> Result<Option<usize>> {
        self.get(key)
            .map(|v| {
                v.as_u64()
                    .filter(|n| *n < 1 << 40)
                    .map(|n| n as usize)
                    .ok_or_else(|| self.error(key, format!("{v} is not a whole number")))
            })
            .transpose()
    }

    fn at_least_one(&self, key: &str, n: usize) -> Result<usize> {
        if n == 0 { Err(self.error(key, "must be at least 1")) } else { Ok(n) }
    }

    /// A width or a count: at least 1.
    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        self.at_least_one(key, self.usize(key)?)
    }

    /// As [`Self::size`], where a missing key means `default`.
    pub(crate) fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        self.at_least_one(key, self.usize_or(key, default)?)
    }

    /// The number of blocks; a list is made of that many, so that it has a bound.
    pub(crate) fn layers(&self, key: &str) -> Result<usize> {
        match self.usize(key)? {
            n if n <= 1 << 16 => Ok(n),
            n => Err(self.error(key, format!("{n} blocks are more than the 65536 that are supported"))),
        }
    }

    /// A number of heads that divides `width`.
    pub(crate) fn heads(&self, key: &str, width: usize) -> Result<usize> {
        let heads = self.size(key)?;
        if width.is_multiple_of(heads) {
            Ok(heads)
        } else {
            Err(self.error(key, format!("{width} is not divisible by {heads}")))
        }
    }

    pub(crate) fn usize_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.usize_opt(key)?.unwrap_or(default))
    }

    pub(crate) fn f64_opt(&self, key: &str) -> Result<Option<f64>> {
        self.get(key).map(|v| v.as_f64().ok_or_else(|| self.error(key, format!("{v} is not a number")))).transpose()
    }

    pub(crate) fn f64_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.f64_opt(key)?.unwrap_or(default))
    }

    pub(crate) fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.error(key, format!("{v} is not true or false"))),
        }
    }

    pub(crate) fn str_opt(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| self.error(key, format!("{v} is not a string")))).transpose()
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.get(key)
            .map(|v| {
                let list = v.as_array().ok_or_else(|| self.error(key, format!("{v} is not a list")))?;
                list.iter().map(|x| x.as_f64().ok_or_else(|| self.error(key, format!("{x} is not a number")))).collect()
            })
            .transpose()
    }

    /// Token ids: one number or a list.
    pub(crate) fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| {
            v.as_u64()
                .and_then(|n| u32::try_from(n).ok())
                .ok_or_else(|| self.error(key, format!("{v} is not a token id")))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items.iter().map(id).collect(),
            Some(one) => Ok(vec![id(one)?]),
        }
    }
}
