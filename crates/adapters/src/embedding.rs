//! A frozen table of token vectors with places for an adapter, trained rows, or a trained table; it can be the output head
//! of a tied model too.

use std::ops::Range;
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

    /// A table of that shape called `path` whose values are not loaded; [`Self::set_table`] puts them in.
    ///
    /// # Errors
    /// If the shape is none of a matrix.
    pub fn blank(path: impl Into<String>, tokens: usize, width: usize, dtype: DType) -> Result<Self> {
        let base = FrozenWeight::blank(tokens, width, dtype)?;
        let weight = base.as_dense().cloned().ok_or_else(|| Error::unsupported("a blank table", "it is not dense"))?;
        Ok(Self {
            path: path.into(),
            weight: Dense::new(weight),
            base: Arc::new(base),
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
        self.effective_rows(0..self.base.d_out(), Some(self.weight.frozen().clone()))
    }

    /// Rows `run` of [`Self::effective`]; `own` are the frozen table's, which may be left out where a trained table replaces it.
    pub(crate) fn effective_rows(&self, run: Range<usize>, own: Option<Tensor>) -> Result<Tensor> {
        let rows = match (self.weight.trained(), own) {
            (Some(trained), _) => trained.detach().narrow(0, run.start, run.len())?,
            (None, Some(own)) => own,
            (None, None) => self.weight.frozen().narrow(0, run.start, run.len())?,
        };
        let rows = self.with_adapter(rows.to_dtype(DType::F32)?, run.start)?;
        Ok(self.with_rows(rows, run.start)?.to_dtype(self.weight.frozen().dtype())?)
    }

    /// `rows` in f32, of the tokens from `start` on, with the adapter's change.
    pub(crate) fn with_adapter(&self, rows: Tensor, start: usize) -> Result<Tensor> {
        let Some(adapter) = &self.adapter else { return Ok(rows) };
        let end = start + rows.dim(0)?;
        let ids = Tensor::arange(start as u32, end as u32, rows.device())?;
        let Some(change) = adapter.lookup(&self.base, &ids)? else { return Err(self.no_lookup()) };
        Ok((rows + change.detach().to_dtype(DType::F32)?)?)
    }

    /// `rows` in f32, of the tokens from `start` on, with the trained ones in place of their own.
    pub(crate) fn with_rows(&self, rows: Tensor, start: usize) -> Result<Tensor> {
        let Some(trained) = &self.rows else { return Ok(rows) };
        let count = rows.dim(0)?;
        let place = |id: &u32| (*id as usize).checked_sub(start).filter(|at| *at < count).map(|at| at as u32);
        let (from, to): (Vec<u32>, Vec<u32>) =
            (0u32..).zip(&trained.indices).filter_map(|(i, id)| Some((i, place(id)?))).unzip();
        if to.is_empty() {
            return Ok(rows);
        }
        let (from, to) = (Tensor::new(from, rows.device())?, Tensor::new(to, rows.device())?);
        let values = trained.values.detach().to_dtype(DType::F32)?.index_select(&from, 0)?;
        let shift = (values - rows.index_select(&to, 0)?)?;
        Ok(rows.contiguous()?.index_add(&to, &shift, 0)?)
    }

    /// Puts a table that is not loaded, or its shape alone, in place of the frozen one.
    ///
    /// # Errors
    /// If the shape differs, or it is quantised.
    pub fn set_weight(&mut self, table: FrozenWeight) -> Result<()> {
        let dense = table.as_dense().filter(|t| t.dims() == self.weight.frozen().dims()).cloned();
        let Some(dense) = dense else {
            return Err(Error::unsupported(&self.path, format!("its table became {:?}", table.dims())));
        };
        self.base = Arc::new(table);
        self.weight = Dense::new(dense);
        Ok(())
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
