//! What goes into a model: token ids, their positions, and which tokens may see each other.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_kernels::attention::Segments;

use crate::{Error, Result};

/// Segment id of padding: sees nothing and is seen by nothing.
pub const PADDING: u32 = u32::MAX;

/// A batch of token rows [batch, length].
#[derive(Debug, Clone)]
pub struct TokenBatch {
    /// Rows.
    pub batch: usize,
    /// Tokens in a row, padding included.
    pub length: usize,
    /// Token ids, row by row.
    pub ids: Vec<u32>,
    /// Position of each token.
    pub positions: Vec<u32>,
    /// Segment of each token: tokens see only their own segment; [`PADDING`] marks padding. None: one segment a row.
    pub segments: Option<Vec<u32>>,
    /// Segment-type id of each token (BERT); zeros if None.
    pub token_types: Option<Vec<u32>>,
}

impl TokenBatch {
    /// Rows of equal length without padding, positions from 0.
    ///
    /// # Errors
    /// If the lengths do not fit.
    pub fn new(ids: Vec<u32>, batch: usize, length: usize) -> Result<Self> {
        Self::starting_at(ids, batch, length, 0)
    }

    /// As [`Self::new`], positions from `start`.
    ///
    /// # Errors
    /// If the lengths do not fit.
    pub fn starting_at(ids: Vec<u32>, batch: usize, length: usize, start: usize) -> Result<Self> {
        let positions = (0..batch).flat_map(|_| (start..start + length).map(|p| p as u32)).collect();
        let made = Self { batch, length, ids, positions, segments: None, token_types: None };
        made.check()?;
        Ok(made)
    }

    /// Rows of any length, right-padded with `pad`.
    ///
    /// # Errors
    /// If there is no row.
    pub fn padded(rows: &[Vec<u32>], pad: u32) -> Result<Self> {
        let length = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut made = Self {
            batch: rows.len(),
            length,
            ids: Vec::with_capacity(rows.len() * length),
            positions: Vec::with_capacity(rows.len() * length),
            segments: None,
            token_types: None,
        };
        let mut segments = Vec::with_capacity(rows.len() * length);
        for row in rows {
            let rest = length - row.len();
            made.ids.extend(row.iter().copied().chain(std::iter::repeat_n(pad, rest)));
            made.positions.extend((0..row.len() as u32).chain(std::iter::repeat_n(0, rest)));
            segments.extend(std::iter::repeat_n(0, row.len()).chain(std::iter::repeat_n(PADDING, rest)));
        }
        made.segments = segments.contains(&PADDING).then_some(segments);
        made.check()?;
        Ok(made)
    }

    /// Whether all lists have batch * length entries.
    ///
    /// # Errors
    /// If not.
    pub fn check(&self) -> Result<()> {
        let n = self.batch * self.length;
        let same = |len: usize, name: &str| {
            if len == n {
                Ok(())
            } else {
                Err(Error::Input(format!("{name}: {len} values for {} rows of {}", self.batch, self.length)))
            }
        };
        same(self.ids.len(), "ids")?;
        same(self.positions.len(), "positions")?;
        self.segments.as_ref().map_or(Ok(()), |s| same(s.len(), "segments"))?;
        self.token_types.as_ref().map_or(Ok(()), |s| same(s.len(), "token types"))
    }

    /// Ids as a tensor [batch, length].
    ///
    /// # Errors
    /// If the device refuses.
    pub fn ids_on(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.ids, (self.batch, self.length), device)?)
    }

    /// Which tokens see each other, where the keys are the tokens themselves.
    pub(crate) fn own_segments(&self) -> Option<Arc<Segments>> {
        let ids = self.segments.clone()?;
        Some(Arc::new(Segments::new(ids.clone(), ids, self.batch)))
    }
}
