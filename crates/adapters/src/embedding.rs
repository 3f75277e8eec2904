//! A frozen table of token vectors with places for an adapter, trained rows, or a trained table; it can be the output head
//! of a tied model too.

use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::rows::take_rows;

use crate::adapter::Adapter;
use crate::module::Dense;
use crate::tied::TiedHead;
use crate::{Error, Flow, Result};

/// Rows of an embedding that are trained in place of the frozen ones.
#[derive(Debug, Clone)]
pub struct TokenRows {
    /// Token ids, in the order of the rows.
    pub indices: Vec<u32>,
    /// Rows [n, width].
    pub values: Tensor,
}

/// A frozen table of token vectors with a place for an adapter, trained rows, or a trained table.
#[derive(Debug, Clone)]
pub struct Embedding {
    path: String,
    weight: Dense,
    base: Arc<FrozenWeight>,
    adapter: Option<Arc<dyn Adapter>>,
    rows: Option<TokenRows>,
    pub(crate) head: TiedHead,
}

impl Embedding {
    /// The table `weight` [vocabulary, width] called `path`.
    pub fn new(path: impl Into<String>, weight: Tensor) -> Result<Self> {
        let base = Arc::new(FrozenWeight::dense(weight.clone())?);
        Ok(Self {
            path: path.into(),
            weight: Dense::new(weight),
            base,
            adapter: None,
            rows: None,
            head: TiedHead::default(),
        })
    }

    /// Vectors of `ids` [..] (u32) -> [.., width].
    ///
    /// # Errors
    /// If an id is outside the table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let shape = ids.dims().to_vec();
        let flat = ids.flatten_all()?;
        let weight = self.weight.get();
        // Trained tables need the tape.
        let mut out = if weight.track_op() { weight.index_select(&flat, 0)? } else { take_rows(weight, &flat)? };
        if let Some(adapter) = &self.adapter {
            let Some(change) = adapter.lookup(&self.base, &flat)? else {
                return Err(self.no_lookup());
            };
            out = (out.to_dtype(change.dtype())? + change)?.to_dtype(out.dtype())?;
        }
        if let Some(rows) = &self.rows {
            out = replace_rows(&out, &flat, rows)?;
        }
        let mut dims = shape;
        dims.push(out.dim(D::Minus1)?);
        Ok(out.reshape(dims)?)
    }

    pub(crate) fn no_lookup(&self) -> Error {
        Error::unsupported(&self.path, "an embedding takes only a low-rank product as its adapter")
    }

    /// Scores of `hidden` [n, width] against every token -> [n, vocabulary]: the output head of tied models, which is this table
    /// unless [`TiedHead`] says otherwise. Trained rows act here too; a trained table and an adapter where the head shares them.
    ///
    /// # Errors
    /// If shapes do not fit, or the adapter is no low-rank product.
    pub fn scores(&self, hidden: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.head.scores(self, hidden, flow)
    }

    /// The frozen head, where [`Self::scores`] is a product with nothing but it.
    pub fn frozen_scores(&self) -> Option<&Arc<FrozenWeight>> {
        let acts = self.rows.is_some() || self.head.trained().is_some() || self.shared() && self.table_or_adapter();
        (!acts).then_some(self.head.kept().unwrap_or(&self.base))
    }

    fn shared(&self) -> bool {
        self.head.is_shared()
    }

    fn table_or_adapter(&self) -> bool {
        self.adapter.is_some() || self.weight.trained().is_some()
    }

    /// Module path in the base model's naming.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The table as the linear map from one-hot tokens would be its transpose; this is the table [vocabulary, width].
    pub fn weight(&self) -> &Dense {
        &self.weight
    }

    /// The table, to train it.
    pub fn weight_mut(&mut self) -> &mut Dense {
        &mut self.weight
    }

    /// The table as a frozen map [vocabulary, width] (the output head of tied models).
    pub fn base(&self) -> &Arc<FrozenWeight> {
        &self.base
    }

    /// Puts an adapter in the slot, or empties it.
    pub fn set_adapter(&mut self, adapter: Option<Arc<dyn Adapter>>) {
        self.adapter = adapter;
    }

    /// The adapter that acts now.
    pub fn adapter(&self) -> Option<&Arc<dyn Adapter>> {
        self.adapter.as_ref()
    }

    /// Uses trained rows in place of the frozen ones, or none.
    pub fn set_rows(&mut self, rows: Option<TokenRows>) {
        self.rows = rows;
    }

    /// The trained rows that act now.
    pub(crate) fn rows(&self) -> Option<&TokenRows> {
        self.rows.as_ref()
    }

    /// What the output head of a tied model is, as far as it is not this table alone.
    pub fn head(&self) -> &TiedHead {
        &self.head
    }

    /// The same, to change it.
    pub fn head_mut(&mut self) -> &mut TiedHead {
        &mut self.head
    }

    /// Whether anything acts on the table, or on the output head beside it.
    pub fn is_changed(&self) -> bool {
        self.table_or_adapter() || self.rows.is_some() || self.head.trained().is_some()
    }

    /// Whether everything that acts on the table acts on the output head of a tied model as well, and nothing else does.
    pub fn change_reaches_head(&self) -> bool {
        self.head.trained().is_none() && (self.shared() || !self.table_or_adapter())
    }

    /// The table with everything that acts on it written in, in the table's dtype.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn effective(&self) -> Result<Tensor> {
        let table = self.weight.get().detach().to_dtype(DType::F32)?;
        let table = self.with_adapter(table)?;
        Ok(self.with_rows(table)?.to_dtype(self.weight.frozen().dtype())?)
    }

    /// `table` in f32 with the adapter's change.
    pub(crate) fn with_adapter(&self, table: Tensor) -> Result<Tensor> {
        let Some(adapter) = &self.adapter else { return Ok(table) };
        let Some(delta) = adapter.delta(&self.base)? else { return Err(self.no_lookup()) };
        Ok((table + delta.t()?)?)
    }

    /// `table` in f32 with the trained rows in place of its own.
    pub(crate) fn with_rows(&self, table: Tensor) -> Result<Tensor> {
        let Some(rows) = &self.rows else { return Ok(table) };
        let index = Tensor::new(rows.indices.as_slice(), table.device())?;
        let values = rows.values.detach().to_dtype(DType::F32)?;
        let shift = (values - table.index_select(&index, 0)?)?;
        Ok(table.contiguous()?.index_add(&index, &shift, 0)?)
    }

    /// Replaces the frozen table (merging).
    ///
    /// # Errors
    /// If the shape differs.
    pub fn set_table(&mut self, table: Tensor) -> Result<()> {
        if table.dims() != self.weight.frozen().dims() {
            return Err(Error::Shape {
                tensor: format!("{}.weight", self.path),
                expected: self.weight.frozen().dims().to_vec(),
                found: table.dims().to_vec(),
            });
        }
        self.base = Arc::new(FrozenWeight::dense(table.clone())?);
        self.weight = Dense::new(table);
        Ok(())
    }
}

/// `out` [n, width] with the rows of trained tokens in place of the frozen ones.
fn replace_rows(out: &Tensor, flat: &Tensor, rows: &TokenRows) -> Result<Tensor> {
    let ids = flat.to_vec1::<u32>()?;
    let place = |id: &u32| rows.indices.iter().position(|i| i == id);
    if !ids.iter().any(|id| place(id).is_some()) {
        return Ok(out.clone());
    }
    let picks: Vec<u32> = ids.iter().map(|id| place(id).unwrap_or(0) as u32).collect();
    let mask: Vec<u8> = ids.iter().map(|id| u8::from(place(id).is_some())).collect();
    let device = out.device();
    let values = rows.values.index_select(&Tensor::from_vec(picks, flat.dims(), device)?, 0)?;
    let mask = Tensor::from_vec(mask, (ids.len(), 1), device)?.broadcast_as(out.shape())?.contiguous()?;
    let frozen = out.to_dtype(values.dtype())?;
    Ok(mask.where_cond(&values, &frozen)?.to_dtype(out.dtype())?)
}
