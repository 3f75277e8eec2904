//! Mixtures: several stores in given proportions, the same order for the same seed.
//!
//! An epoch takes n_k examples of store k, n_k by largest remainders of size * w_k / sum w. Each store is one endless
//! sequence of passes, each pass in an order of its own seed; epoch e takes the stretch e * n_k .. (e + 1) * n_k of it. So
//! every example of a store has been seen equally often, give or take one, whatever the weights.

use std::sync::Arc;

use crate::error::{DataError, Result};
use crate::seed;
use crate::store::TokenStore;

/// One store of a mixture.
#[derive(Debug, Clone)]
pub struct Part {
    /// The examples.
    pub store: Arc<TokenStore>,
    /// The examples used, by index and in this order; none: all.
    pub subset: Option<Arc<[usize]>>,
    /// Its share, relative to the other parts.
    pub weight: f64,
}

impl Part {
    /// All of a store, with weight 1.
    pub fn new(store: Arc<TokenStore>) -> Self {
        Self { store, subset: None, weight: 1.0 }
    }

    /// The same part with only these examples.
    #[must_use]
    pub fn subset(mut self, indices: impl Into<Arc<[usize]>>) -> Self {
        self.subset = Some(indices.into());
        self
    }

    /// The same part with this weight.
    #[must_use]
    pub fn weight(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }

    /// Examples in the part.
    pub fn len(&self) -> usize {
        self.subset.as_ref().map_or(self.store.len(), |subset| subset.len())
    }

    /// Whether the part has no example.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn index(&self, at: usize) -> usize {
        self.subset.as_ref().map_or(at, |subset| subset.get(at).copied().unwrap_or(usize::MAX))
    }
}

/// One example of a mixture: which part, and which example of its store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Draw {
    /// Part, from 0.
    pub part: usize,
    /// Example in the part's store.
    pub index: usize,
}

/// Stores in given proportions.
#[derive(Debug, Clone)]
pub struct Mixture {
    parts: Vec<Part>,
    counts: Vec<usize>,
}

impl Mixture {
    /// A mixture of parts. An epoch has `size` examples; none: as many as pass once over the largest part of positive weight.
    pub fn new(parts: Vec<Part>, size: Option<usize>) -> Result<Self> {
        let option = |key: &'static str, message: String| DataError::Option { key, message };
        if parts.is_empty() {
            return Err(option("mixture", "no store given".into()));
        }
        for (at, part) in parts.iter().enumerate() {
            if !part.weight.is_finite() || part.weight < 0.0 {
                return Err(option("weight", format!("{} of part {at} is not a number from 0 up", part.weight)));
            }
            if part.is_empty() {
                return Err(option("mixture", format!("part {at} has no example")));
            }
            if let Some(&index) = part.subset.iter().flat_map(|s| s.iter()).find(|index| **index >= part.store.len()) {
                return Err(DataError::Index { what: "example", index, len: part.store.len() });
            }
        }
        let sum: f64 = parts.iter().map(|part| part.weight).sum();
        let largest = parts.iter().filter(|part| part.weight > 0.0).max_by_key(|part| part.len());
        let Some(largest) = largest.filter(|_| sum.is_finite()) else {
            return Err(option("weight", "at least one weight must be above 0, and their sum finite".into()));
        };
        let size = size.unwrap_or_else(|| {
            if parts.len() == 1 {
                largest.len()
            } else {
                (largest.len() as f64 * sum / largest.weight).round() as usize
            }
        });
        if size == 0 || size > u32::MAX as usize {
            return Err(option("size", format!("an epoch of {size} examples; accepted are 1 to {}", u32::MAX)));
        }
        let counts = largest_remainder(&parts.iter().map(|part| part.weight / sum).collect::<Vec<_>>(), size);
        Ok(Self { parts, counts })
    }

    /// A single store, all of it each epoch.
    pub fn single(store: Arc<TokenStore>) -> Result<Self> {
        Self::new(vec![Part::new(store)], None)
    }

    /// The parts.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Examples of each part in an epoch.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Examples in an epoch.
    pub fn size(&self) -> usize {
        self.counts.iter().sum()
    }

    /// The examples of an epoch in order. Without `shuffle`, each part keeps its order and the parts are interleaved evenly.
    pub fn epoch(&self, epoch: u64, seed: u64, shuffle: bool) -> Vec<Draw> {
        let mut keyed: Vec<(f64, Draw)> = Vec::with_capacity(self.size());
        for (part, (source, &count)) in self.parts.iter().zip(&self.counts).enumerate() {
            let length = source.len();
            let from = u128::from(epoch) * count as u128;
            let mut pass = None;
            let mut order: Vec<usize> = Vec::new();
            for step in 0..count {
                let position = from + step as u128;
                let (now, at) = ((position / length as u128) as u64, (position % length as u128) as usize);
                if shuffle && pass != Some(now) {
                    order = (0..length).collect();
                    seed::shuffle(&mut order, &mut seed::stream(seed, "data-pass", &[part as u64, now]));
                    pass = Some(now);
                }
                let at = if shuffle { order.get(at).copied().unwrap_or(at) } else { at };
                let key = (step as f64 + 0.5) / count as f64;
                keyed.push((key, Draw { part, index: source.index(at) }));
            }
        }
        if self.parts.len() > 1 {
            if shuffle {
                seed::shuffle(&mut keyed, &mut seed::stream(seed, "data-mixture", &[epoch]));
            } else {
                keyed.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.part.cmp(&b.1.part)));
            }
        }
        keyed.into_iter().map(|(_, draw)| draw).collect()
    }
}

/// Whole numbers that add up to `size` and differ from `size * share` by less than 1 each.
fn largest_remainder(shares: &[f64], size: usize) -> Vec<usize> {
    let exact: Vec<f64> = shares.iter().map(|share| share * size as f64).collect();
    let mut counts: Vec<usize> = exact.iter().map(|x| (x.floor() as usize).min(size)).collect();
    let mut order: Vec<usize> =
        (0..shares.len()).filter(|at| shares.get(*at).is_some_and(|share| *share > 0.0)).collect();
    let remainder = |at: usize| exact.get(at).map_or(0.0, |x| x - x.floor());
    order.sort_by(|a, b| remainder(*b).total_cmp(&remainder(*a)).then(a.cmp(b)));
    let mut left = size.saturating_sub(counts.iter().sum());
    for at in order.into_iter().cycle() {
        if left == 0 {
            break;
        }
        if let Some(count) = counts.get_mut(at) {
            *count += 1;
        }
        left -= 1;
    }
    counts
}
