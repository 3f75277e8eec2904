//! Keys and values of the tokens seen so far, so that each new token costs one step.

use std::sync::Arc;

use candle_core::Tensor;
use espalier_kernels::attention::Segments;

use crate::input::{PADDING, TokenBatch};
use crate::{Error, Result};

/// Keys and values of one block, [batch, capacity, kv heads, head width], the first `length` in use.
#[derive(Debug, Default)]
pub struct LayerCache {
    keys: Option<Tensor>,
    values: Option<Tensor>,
    length: usize,
}

impl LayerCache {
    /// Appends `k` and `v` [batch, t, kv heads, head width]; returns all keys and values so far.
    ///
    /// # Errors
    /// If the batch differs from the earlier one.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let added = k.dim(1)?;
        let total = self.length + added;
        for (slot, new) in [(&mut self.keys, k), (&mut self.values, v)] {
            let (b, _, heads, width) = new.dims4()?;
            let capacity = slot.as_ref().map_or(Ok(0), |s| s.dim(1))?;
            if total > capacity {
                let grown =
                    Tensor::zeros((b, total.next_power_of_two().max(64), heads, width), new.dtype(), new.device())?;
                if let Some(old) = slot.as_ref() {
                    grown.slice_set(&old.narrow(1, 0, self.length)?.contiguous()?, 1, 0)?;
                }
                *slot = Some(grown);
            }
            if let Some(buffer) = slot.as_ref() {
                buffer.slice_set(&new.contiguous()?, 1, self.length)?;
            }
        }
        self.length = total;
        match (&self.keys, &self.values) {
            (Some(keys), Some(values)) => Ok((keys.narrow(1, 0, total)?, values.narrow(1, 0, total)?)),
            _ => Err(Error::Input("an empty cache".into())),
        }
    }

    /// All keys and values so far; None of an empty cache.
    pub(crate) fn filled(&self) -> Result<Option<(Tensor, Tensor)>> {
        let (Some(keys), Some(values)) = (&self.keys, &self.values) else { return Ok(None) };
        Ok(Some((keys.narrow(1, 0, self.length)?, values.narrow(1, 0, self.length)?)))
    }

    /// Keeps only the rows of `rows` (u32 indices into the batch).
    fn select(&mut self, rows: &Tensor) -> Result<()> {
        for slot in [&mut self.keys, &mut self.values] {
            *slot = slot.as_ref().map(|t| t.index_select(rows, 0)).transpose()?;
        }
        Ok(())
    }
}

/// The caches of all blocks, and which tokens the sequences hold.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    /// Segment of each cached token by row; None while no row has padding.
    segments: Vec<Vec<u32>>,
    padded: bool,
    length: usize,
    /// Virtual tokens before each sequence, which later positions count.
    pub(crate) virtual_tokens: usize,
}

impl KvCache {
    /// An empty cache for `layers` blocks.
    pub fn new(layers: usize) -> Self {
        Self {
            layers: (0..layers).map(|_| LayerCache::default()).collect(),
            segments: Vec::new(),
            padded: false,
            length: 0,
            virtual_tokens: 0,
        }
    }

    /// Tokens in each row, padding included.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// How many tokens at the start of each row are padding, if all others are one sequence.
    pub(crate) fn padding(&self) -> Option<Vec<u32>> {
        let of_row = |segments: &Vec<u32>| {
            let start = segments.iter().take_while(|s| **s == PADDING).count();
            let rest = &segments[start..];
            rest.first().is_some_and(|first| rest.iter().all(|s| s == first && *s != PADDING)).then_some(start as u32)
        };
        self.segments.iter().map(of_row).collect()
    }

    /// Notes the tokens of `input` and says which cached tokens each of them may see.
    pub(crate) fn advance(&mut self, input: &TokenBatch) -> Result<Option<Arc<Segments>>> {
        if self.segments.is_empty() {
            self.segments = vec![Vec::new(); input.batch];
        }
        if self.segments.len() != input.batch {
            return Err(Error::Input(format!("{} rows for a cache of {}", input.batch, self.segments.len())));
        }
        for (row, segments) in self.segments.iter_mut().enumerate() {
            let range = row * input.length..(row + 1) * input.length;
            match &input.segments {
                Some(ids) => segments.extend_from_slice(&ids[range]),
                None => segments.extend(range.map(|_| 0)),
            }
        }
        self.padded |= input.segments.as_ref().is_some_and(|ids| ids.contains(&PADDING));
        self.length += input.length;
        let mixed = input.segments.as_ref().is_some_and(|ids| ids.iter().any(|s| *s != 0));
        if !self.padded && !mixed {
            return Ok(None);
        }
        let query = input.segments.clone().unwrap_or_else(|| vec![0; input.batch * input.length]);
        Ok(Some(Arc::new(Segments::new(query, self.segments.concat(), input.batch))))
    }

    /// Keeps only the given rows, in their order (finished sequences leave the batch).
    ///
    /// # Errors
    /// If a row is out of range.
    pub fn keep_rows(&mut self, rows: &[u32]) -> Result<()> {
        if let Some(bad) = rows.iter().find(|r| **r as usize >= self.segments.len()) {
            return Err(Error::Input(format!("row {bad} of a cache of {}", self.segments.len())));
        }
        self.segments = rows.iter().map(|r| self.segments[*r as usize].clone()).collect();
        if let Some(device) = self.layers.iter().find_map(|l| l.keys.as_ref()).map(Tensor::device) {
            let index = Tensor::new(rows, device)?;
            self.layers.iter_mut().try_for_each(|layer| layer.select(&index))?;
        }
        Ok(())
    }
}
