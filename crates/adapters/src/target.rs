//! Placement: which modules are adapted, at which rank.
//!
//! The rules are PEFT's: a string is a regular expression on the whole module path (or `all-linear`), a list names path
//! endings; `exclude_modules`, `layers_to_transform` and `layers_pattern` narrow it; `rank_pattern` and `alpha_pattern` give
//! single modules other ranks. Beyond PEFT, every pattern must match something, and its count is reported.

use std::collections::BTreeMap;

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::adapter::Reach;
use crate::{Error, Result};

/// A list of path endings, or one regular expression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Pattern {
    /// A regular expression on the whole path, or one of [`KEYWORDS`].
    Expression(String),
    /// Path endings.
    Endings(Vec<String>),
}

/// Says of a module path whether it is meant.
type PathFilter = Box<dyn Fn(&str) -> bool>;

/// Every linear map except the output head.
pub const ALL_LINEAR: &str = "all-linear";
/// Every norm.
pub const ALL_NORMS: &str = "all-norms";
/// The table of the input's tokens.
pub const INPUT_EMBEDDING: &str = "input-embedding";

/// Words that stand for modules of any model.
pub const KEYWORDS: [&str; 3] = [ALL_LINEAR, ALL_NORMS, INPUT_EMBEDDING];

impl Pattern {
    /// Whether it is a word for modules of any model.
    pub fn is_keyword(&self) -> bool {
        matches!(self, Self::Expression(text) if KEYWORDS.contains(&text.as_str()))
    }
}

impl Default for Pattern {
    fn default() -> Self {
        Self::Expression(ALL_LINEAR.into())
    }
}

/// One index or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    /// One layer.
    One(usize),
    /// Several layers.
    Many(Vec<usize>),
}

/// One name or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// One name.
    One(String),
    /// Several names.
    Many(Vec<String>),
}

impl Names {
    fn as_slice(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        }
    }
}

/// Where adapters sit.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TargetSpec {
    /// Modules to adapt.
    pub target_modules: Pattern,
    /// Modules to leave alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Pattern>,
    /// Only these layer indices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Layers>,
    /// Name of the module list that the indices count (`layers`, `h`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_pattern: Option<Names>,
    /// Ranks of single modules: path ending or regular expression -> r.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Scaling numerators of single modules: path ending or regular expression -> alpha.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
}

/// What a module is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A linear map.
    Linear,
    /// A table of vectors; the first one is of the input's tokens.
    Embedding,
    /// A normalisation.
    Norm,
}

/// A module that may be adapted.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Module path.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Whether it is part of the output head.
    pub head: bool,
}

impl Candidate {
    /// Whether a method of this reach can act on it.
    pub fn is_within(&self, reach: Reach<'_>) -> bool {
        match reach {
            Reach::Maps => self.kind != Kind::Norm,
            Reach::Whole => true,
            Reach::Rows { .. } => self.kind == Kind::Embedding,
            Reach::Sequence => false,
        }
    }
}

/// A module that is adapted, with its rank and alpha.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    /// Module path.
    pub path: String,
    /// Rank.
    pub rank: usize,
    /// Scaling numerator.
    pub alpha: f64,
}

/// Outcome of placement: the sites, and how often each pattern matched.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    /// Adapted modules in model order.
    pub sites: Vec<Placed>,
    /// Pattern -> number of modules.
    pub counts: Vec<(String, usize)>,
}

fn regex(key: &'static str, text: &str) -> Result<Regex> {
    Regex::new(text).map_err(|e| Error::config(key, format!("`{text}` is not a regular expression: {e}")))
}

pub(crate) fn full(key: &'static str, text: &str) -> Result<Regex> {
    regex(key, &format!("^(?:{text})$"))
}

fn ends_with(path: &str, ending: &str) -> bool {
    path == ending || path.strip_suffix(ending).is_some_and(|rest| rest.ends_with('.'))
}

/// Names among `paths` that look like `pattern`, for error messages.
pub fn near_misses(pattern: &str, paths: impl Iterator<Item = String>) -> Vec<String> {
    let tail = |p: &str| p.rsplit('.').next().unwrap_or(p).to_owned();
    let wanted = tail(pattern);
    let mut names: Vec<(f64, String)> =
        paths.map(|p| tail(&p)).map(|name| (strsim::jaro_winkler(&wanted, &name), name)).collect();
    names.sort_by(|x, y| y.0.total_cmp(&x.0).then_with(|| x.1.cmp(&y.1)));
    names.dedup_by(|x, y| x.1 == y.1);
    names.into_iter().filter(|(score, _)| *score > 0.6).take(5).map(|(_, name)| name).collect()
}

impl TargetSpec {
    /// Where a method sits unless it is told otherwise.
    pub fn of(reach: Reach<'_>) -> Self {
        let word = match reach {
            Reach::Maps | Reach::Sequence => ALL_LINEAR,
            Reach::Whole => ALL_NORMS,
            Reach::Rows { .. } => INPUT_EMBEDDING,
        };
        Self { target_modules: Pattern::Expression(word.into()), ..Self::default() }
    }

    /// Chooses the sites among `candidates`; `rank` and `alpha` hold where no pattern does.
    ///
    /// # Errors
    /// If a pattern matches nothing or is not a regular expression.
    pub fn place(&self, candidates: &[Candidate], rank: usize, alpha: f64) -> Result<Placement> {
        let mut counts: Vec<(String, usize)> = Vec::new();
        let mut sites = Vec::new();
        let layers = self.layer_filter()?;
        let ranks = self.rank_pattern.iter().map(|(k, v)| Ok((pattern_key("rank_pattern", k)?, k, *v)));
        let ranks = ranks.collect::<Result<Vec<_>>>()?;
        let alphas = self.alpha_pattern.iter().map(|(k, v)| Ok((pattern_key("alpha_pattern", k)?, k, *v)));
        let alphas = alphas.collect::<Result<Vec<_>>>()?;
        let mut used_ranks = vec![0usize; ranks.len()];
        let mut used_alphas = vec![0usize; alphas.len()];
        let mut matched = match &self.target_modules {
            Pattern::Expression(text) => vec![(text.clone(), 0)],
            Pattern::Endings(names) => names.iter().map(|n| (n.clone(), 0)).collect(),
        };
        // A pattern whose every module is excluded on purpose has matched; one that names nothing has not.
        let mut seen = vec![false; matched.len()];
        let expression = match &self.target_modules {
            Pattern::Expression(text) if !self.target_modules.is_keyword() => Some(full("target_modules", text)?),
            _ => None,
        };
        let input = candidates.iter().find(|c| c.kind == Kind::Embedding).map(|c| c.path.as_str());
        let named = |word: &str, candidate: &Candidate| match word {
            ALL_NORMS => candidate.kind == Kind::Norm,
            INPUT_EMBEDDING => input == Some(candidate.path.as_str()),
            _ => candidate.kind == Kind::Linear && !candidate.head,
        };
        for candidate in candidates {
            let hits: Vec<usize> = match &self.target_modules {
                Pattern::Expression(word) => {
                    let hit =
                        expression.as_ref().map_or_else(|| named(word, candidate), |re| re.is_match(&candidate.path));
                    hit.then_some(0).into_iter().collect()
                }
                Pattern::Endings(names) => {
                    (0..names.len()).filter(|i| ends_with(&candidate.path, &names[*i])).collect()
                }
            };
            if hits.is_empty() {
                continue;
            }
            hits.iter().for_each(|i| seen[*i] = true);
            // As in PEFT, a module listed by its whole path is meant whatever its layer.
            let exact = matches!(&self.target_modules, Pattern::Endings(names) if names.contains(&candidate.path));
            if self.excluded(&candidate.path)? || !(exact || layers(&candidate.path)) {
                continue;
            }
            hits.into_iter().for_each(|i| matched[i].1 += 1);
            let mut placed = Placed { path: candidate.path.clone(), rank, alpha };
            if let Some(i) = ranks.iter().position(|(re, ..)| re.is_match(&candidate.path)) {
                placed.rank = ranks[i].2;
                used_ranks[i] += 1;
            }
            if let Some(i) = alphas.iter().position(|(re, ..)| re.is_match(&candidate.path)) {
                placed.alpha = alphas[i].2;
                used_alphas[i] += 1;
            }
            sites.push(placed);
        }
        let paths = || candidates.iter().map(|c| c.path.clone());
        let unmatched = |key, pattern: &str| Error::NoTarget {
            key,
            pattern: pattern.to_owned(),
            near_misses: near_misses(pattern, paths()),
        };
        if let Some(i) = seen.iter().position(|seen| !seen) {
            return Err(unmatched("target_modules", &matched[i].0));
        }
        if sites.is_empty() {
            return Err(Error::config(
                "target_modules",
                "exclude_modules and layers_to_transform leave no module of those that the patterns match",
            ));
        }
        if let Some(i) = used_ranks.iter().position(|n| *n == 0) {
            return Err(unmatched("rank_pattern", ranks[i].1));
        }
        if let Some(i) = used_alphas.iter().position(|n| *n == 0) {
            return Err(unmatched("alpha_pattern", alphas[i].1));
        }
        counts.append(&mut matched);
        counts.extend(ranks.iter().zip(&used_ranks).map(|((_, k, v), n)| (format!("rank_pattern {k} = {v}"), *n)));
        counts.extend(alphas.iter().zip(&used_alphas).map(|((_, k, v), n)| (format!("alpha_pattern {k} = {v}"), *n)));
        Ok(Placement { sites, counts })
    }

    fn excluded(&self, path: &str) -> Result<bool> {
        Ok(match &self.exclude_modules {
            None => false,
            Some(Pattern::Expression(text)) => full("exclude_modules", text)?.is_match(path),
            Some(Pattern::Endings(names)) => names.iter().any(|n| ends_with(path, n)),
        })
    }

    /// Whether a path lies in one of the layers asked for.
    fn layer_filter(&self) -> Result<PathFilter> {
        let Some(layers) = &self.layers_to_transform else { return Ok(Box::new(|_| true)) };
        let wanted = match layers {
            Layers::One(layer) => vec![*layer],
            Layers::Many(layers) => layers.clone(),
        };
        if wanted.is_empty() {
            return Ok(Box::new(|_| true));
        }
        let patterns = match &self.layers_pattern {
            Some(names) if !names.as_slice().is_empty() => names
                .as_slice()
                .iter()
                .map(|name| regex("layers_pattern", &format!(r"^(?:.*?\.)?(?:{name})\.(\d+)\.")))
                .collect::<Result<Vec<_>>>()?,
            _ => vec![regex("layers_pattern", r"^.*?\.[^.]*\.(\d+)\.")?],
        };
        Ok(Box::new(move |path| {
            patterns
                .iter()
                .find_map(|re| re.captures(path))
                .and_then(|c| c.get(1)?.as_str().parse::<usize>().ok())
                .is_some_and(|layer| wanted.contains(&layer))
        }))
    }
}

/// PEFT's rule for pattern keys: the key, a regular expression, ends the path at a dot.
pub(crate) fn pattern_key(name: &'static str, key: &str) -> Result<Regex> {
    regex(name, &format!(r"^(?:.*\.)?(?:{key})$"))
}
