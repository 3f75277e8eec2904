//! Batches with random access: batch b of epoch e depends on data, options and seed alone, so a run that goes on after a
//! stop sees what it would have seen.
//!
//! Shapes: rows B, columns T = the longest row (up to `pad_to_multiple`); all arrays are row-major `[B, T]`, padded on the
//! right. Positions begin at 0 in each example; the first token of each example has label -100, so that nothing is
//! predicted across the border of two examples and the packed loss equals the unpacked one.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::encode::IGNORE;
use crate::error::{DataError, Result};
use crate::mix::{Draw, Mixture};
use crate::pack::{Packing, pack};
use crate::seed;
use crate::store::TokenStore;

/// Segment of padding, and class of an example without one.
pub const PADDING: u32 = u32::MAX;

/// How batches are dealt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchOptions {
    /// Rows of a batch.
    pub batch_size: usize,
    /// Whether each epoch has an order of its own; otherwise the order of the data.
    pub shuffle: bool,
    /// Seed of all orders.
    pub seed: u64,
    /// How examples share rows.
    pub packing: Packing,
    /// Most tokens of a row; needed for packing. Longer examples are an error.
    pub max_length: Option<usize>,
    /// Leave out a last batch that is not full.
    pub drop_last: bool,
    /// Token id of padding.
    pub pad_id: u32,
    /// Columns are padded to a multiple of this.
    pub pad_to_multiple: usize,
}

impl Default for BatchOptions {
    fn default() -> Self {
        Self {
            batch_size: 8,
            shuffle: true,
            seed: 0,
            packing: Packing::Off,
            max_length: None,
            drop_last: false,
            pad_id: 0,
            pad_to_multiple: 1,
        }
    }
}

/// One batch; arrays are row-major `[rows, cols]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Rows B.
    pub rows: usize,
    /// Columns T.
    pub cols: usize,
    /// Token ids.
    pub ids: Vec<u32>,
    /// Label of each token itself; [`IGNORE`] where masked, at the start of examples and in padding.
    pub labels: Vec<i32>,
    /// Position of each token in its example; 0 in padding.
    pub positions: Vec<u32>,
    /// Which example of its row a token belongs to, from 0; [`PADDING`] in padding.
    pub segments: Vec<u32>,
    /// Class of each example, row by row; [`PADDING`] where it has none. Without packing `[rows]`.
    pub classes: Vec<u32>,
    /// Labels that the loss counts.
    pub trained_tokens: usize,
    /// Part of the mixture that each example comes from, row by row. Without packing `[rows]`.
    pub sources: Vec<usize>,
    /// The examples, row by row. Without packing `[rows]`.
    pub draws: Vec<Draw>,
}

/// The rows of an epoch, each with its examples.
type Plan = Arc<Vec<Vec<Draw>>>;

/// Deals batches of a mixture.
#[derive(Debug)]
pub struct Batcher {
    mixture: Mixture,
    options: BatchOptions,
    plan: Mutex<Option<(u64, Plan)>>,
}

impl Batcher {
    /// A dealer of batches. Errors name options that cannot be meant and examples that are too long.
    pub fn new(mixture: Mixture, options: BatchOptions) -> Result<Self> {
        if options.batch_size == 0 {
            return Err(DataError::Option { key: "batch_size", message: "0 rows; at least 1 is needed".into() });
        }
        if options.packing != Packing::Off && options.max_length.is_none() {
            return Err(DataError::Option {
                key: "packing",
                message: "packing needs max_length, the length of a row".into(),
            });
        }
        if let Some(max_length) = options.max_length {
            for part in mixture.parts() {
                let subset = part.subset.as_deref();
                for at in 0..part.len() {
                    let index = subset.map_or(at, |subset| subset.get(at).copied().unwrap_or(at));
                    let length = part.store.length(index);
                    if length > max_length {
                        return Err(DataError::TooLong { index, length, max_length });
                    }
                }
            }
        }
        Ok(Self { mixture, options, plan: Mutex::new(None) })
    }

    /// A dealer of a single store's batches.
    pub fn single(store: Arc<TokenStore>, options: BatchOptions) -> Result<Self> {
        Self::new(Mixture::single(store)?, options)
    }

    /// A dealer of some examples of a store.
    pub fn subset(store: Arc<TokenStore>, indices: &[usize], options: BatchOptions) -> Result<Self> {
        Self::new(Mixture::new(vec![crate::mix::Part::new(store).subset(indices)], None)?, options)
    }

    /// The options.
    pub fn options(&self) -> &BatchOptions {
        &self.options
    }

    /// The mixture.
    pub fn mixture(&self) -> &Mixture {
        &self.mixture
    }

    /// Batches in an epoch. With packing the number may differ between epochs.
    pub fn len_per_epoch(&self, epoch: u64) -> Result<usize> {
        let rows = match self.options.packing {
            Packing::Off => self.mixture.size(),
            _ => self.plan(epoch)?.len(),
        };
        let size = self.options.batch_size;
        Ok(if self.options.drop_last { rows / size } else { rows.div_ceil(size) })
    }

    /// Batch `index` of `epoch`.
    pub fn batch(&self, epoch: u64, index: usize) -> Result<Batch> {
        let len = self.len_per_epoch(epoch)?;
        if index >= len {
            return Err(DataError::Index { what: "batch", index, len });
        }
        let plan = self.plan(epoch)?;
        let from = index * self.options.batch_size;
        let to = (from + self.options.batch_size).min(plan.len());
        self.fill(plan.get(from..to).unwrap_or_default())
    }

    /// The batch of an epoch with the most places, padding included; the first of several. None where there is no batch.
    pub fn widest(&self, epoch: u64) -> Result<Option<usize>> {
        let plan = self.plan(epoch)?;
        let length = |draw: &Draw| self.mixture.parts().get(draw.part).map_or(0, |part| part.store.length(draw.index));
        let places = |rows: &[Vec<Draw>]| {
            rows.len() * rows.iter().map(|row| row.iter().map(length).sum::<usize>()).max().unwrap_or(0)
        };
        let batches = plan.chunks(self.options.batch_size).take(self.len_per_epoch(epoch)?);
        Ok(batches.map(places).enumerate().rev().max_by_key(|(_, places)| *places).map(|(index, _)| index))
    }

    /// The rows of an epoch; the last epoch asked for is remembered.
    fn plan(&self, epoch: u64) -> Result<Plan> {
        let mut kept = self.plan.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((of, plan)) = kept.as_ref()
            && *of == epoch
        {
            return Ok(plan.clone());
        }
        let plan = Arc::new(self.make_plan(epoch)?);
        *kept = Some((epoch, plan.clone()));
        Ok(plan)
    }

    fn make_plan(&self, epoch: u64) -> Result<Vec<Vec<Draw>>> {
        let BatchOptions { shuffle, seed, packing, .. } = self.options;
        let draws = self.mixture.epoch(epoch, seed, shuffle);
        let Some(max_length) = self.options.max_length.filter(|_| packing != Packing::Off) else {
            return Ok(draws.into_iter().map(|draw| vec![draw]).collect());
        };
        let length = |draw: &Draw| self.mixture.parts().get(draw.part).map_or(0, |part| part.store.length(draw.index));
        let lengths: Vec<usize> = draws.iter().map(length).collect();
        let mut rows = pack(&lengths, max_length, packing)?;
        if packing == Packing::BestFit {
            // Within a row and among rows, the order of the draws; then, where wanted, an order of its own.
            rows.iter_mut().for_each(|row| row.sort_unstable());
            rows.sort_unstable();
            if shuffle {
                seed::shuffle(&mut rows, &mut seed::stream(seed, "data-rows", &[epoch]));
            }
        }
        Ok(rows.into_iter().map(|row| row.into_iter().filter_map(|at| draws.get(at).copied()).collect()).collect())
    }

    fn fill(&self, plan: &[Vec<Draw>]) -> Result<Batch> {
        let mut lines = Vec::with_capacity(plan.len());
        for row in plan {
            let mut examples = Vec::with_capacity(row.len());
            for draw in row {
                let len = self.mixture.parts().len();
                let part = self.mixture.parts().get(draw.part).ok_or(DataError::Index {
                    what: "part",
                    index: draw.part,
                    len,
                })?;
                examples.push((*draw, part.store.get(draw.index)?));
            }
            lines.push(examples);
        }
        let longest =
            lines.iter().map(|row| row.iter().map(|(_, example)| example.len()).sum::<usize>()).max().unwrap_or(0);
        let cols = longest.next_multiple_of(self.options.pad_to_multiple.max(1));
        let mut batch = Batch { rows: lines.len(), cols, ..Batch::default() };
        for (number, row) in lines.into_iter().enumerate() {
            for (segment, (draw, example)) in row.into_iter().enumerate() {
                batch.ids.extend(example.ids());
                batch
                    .labels
                    .extend(example.labels().enumerate().map(|(at, label)| if at == 0 { IGNORE } else { label }));
                batch.positions.extend(0..example.len() as u32);
                batch.segments.extend(std::iter::repeat_n(segment as u32, example.len()));
                batch.classes.push(example.class.unwrap_or(PADDING));
                batch.trained_tokens += example.trained_tokens;
                batch.sources.push(draw.part);
                batch.draws.push(draw);
            }
            let full = (number + 1) * cols;
            batch.ids.resize(full, self.options.pad_id);
            batch.labels.resize(full, IGNORE);
            batch.positions.resize(full, 0);
            batch.segments.resize(full, PADDING);
        }
        Ok(batch)
    }
}

/// Size of a validation split.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitSize {
    /// A part of the examples, above 0 and below 1.
    Fraction(f64),
    /// A number of examples.
    Count(usize),
}

/// Indices of `len` examples for training and for validation, both ascending, drawn by `seed`. Neither is empty.
pub fn split(len: usize, size: SplitSize, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    let fault = |message: String| DataError::Option { key: "validation", message };
    let held = match size {
        SplitSize::Fraction(f) if f > 0.0 && f < 1.0 => ((len as f64 * f).round() as usize).max(1),
        SplitSize::Fraction(f) => return Err(fault(format!("{f} is no fraction between 0 and 1"))),
        SplitSize::Count(n) => n,
    };
    if held == 0 || held >= len {
        return Err(fault(format!("{held} of {len} examples leave nothing on one side")));
    }
    let mut order: Vec<usize> = (0..len).collect();
    seed::shuffle(&mut order, &mut seed::stream(seed, "data-split", &[]));
    let mut train = order.split_off(held);
    train.sort_unstable();
    order.sort_unstable();
    Ok((train, order))
}
