//! The output head of a model whose head is its token table: what of the table's changes acts on the scores, and a head of its own
//! where training or merging made one.
//!
//! As in PEFT, the head follows trained rows always, and a trained table or an adapter where the two are kept tied
//! (`ensure_weight_tying`); else it stays as it was. A merge that changes the table alone leaves the old table here as the head.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;

use crate::embedding::Embedding;
use crate::{Flow, Result};

/// What the output head is, beside the token table.
#[derive(Debug, Clone)]
pub struct TiedHead {
    shared: bool,
    trained: Option<Tensor>,
    kept: Option<Arc<FrozenWeight>>,
}

impl Default for TiedHead {
    fn default() -> Self {
        Self { shared: true, trained: None, kept: None }
    }
}

impl TiedHead {
    /// Whether a trained table and an adapter of the table act on the scores as well.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Says whether a trained table and an adapter of the table act on the scores as well.
    pub fn set_shared(&mut self, shared: bool) {
        self.shared = shared;
    }

    /// A head [vocabulary, width] trained beside the table, where there is one.
    pub fn trained(&self) -> Option<&Tensor> {
        self.trained.as_ref()
    }

    /// Uses a head [vocabulary, width] trained beside the table, or none.
    pub fn set_trained(&mut self, head: Option<Tensor>) {
        self.trained = head;
    }

    /// The frozen head [vocabulary, width] that a merge left, where it is no longer the table.
    pub fn kept(&self) -> Option<&Arc<FrozenWeight>> {
        self.kept.as_ref()
    }

    /// Makes `head` [vocabulary, width] the frozen head in place of the table, or the table again.
    pub fn keep(&mut self, head: Option<Arc<FrozenWeight>>) {
        self.kept = head;
    }

    /// Scores of `hidden` [n, width] -> [n, vocabulary] with this head over `table`.
    pub(crate) fn scores(&self, table: &Embedding, hidden: &Tensor, flow: &Flow) -> Result<Tensor> {
        if let Some(own) = &self.trained {
            return Ok(hidden.to_dtype(own.dtype())?.matmul(&own.t()?)?);
        }
        let trained = table.weight().trained().filter(|_| self.shared);
        let adapter = table.adapter().filter(|_| self.shared);
        let mut out = match trained {
            Some(weight) => hidden.to_dtype(weight.dtype())?.matmul(&weight.t()?)?,
            None => self.kept.as_ref().unwrap_or(table.base()).forward(hidden)?,
        };
        if adapter.is_some() {
            let change = self.adapter_change(table, hidden, flow)?;
            out = (out.to_dtype(change.dtype())? + change)?;
        }
        let Some(rows) = table.rows() else { return Ok(out) };
        let index = Tensor::new(rows.indices.as_slice(), out.device())?;
        let change = if trained.is_none() && adapter.is_none() && self.kept.is_none() {
            let frozen = table.weight().frozen().index_select(&index, 0)?.to_dtype(rows.values.dtype())?;
            let shift = (&rows.values - frozen)?;
            hidden.to_dtype(shift.dtype())?.matmul(&shift.t()?)?
        } else {
            let wanted = hidden.to_dtype(rows.values.dtype())?.matmul(&rows.values.t()?)?;
            (&wanted - out.contiguous()?.index_select(&index, 1)?.to_dtype(wanted.dtype())?)?
        };
        Ok(out.to_dtype(change.dtype())?.contiguous()?.index_add(&index, &change, 1)?)
    }

    /// What the table's adapter adds to the scores: the lookup's s B A turned around, s (h B) A.
    fn adapter_change(&self, table: &Embedding, hidden: &Tensor, flow: &Flow) -> Result<Tensor> {
        let Some(adapter) = table.adapter() else { return Err(table.no_lookup()) };
        let Some(view) = adapter.low_rank(table.base())? else {
            let Some(delta) = adapter.delta(table.base())? else { return Err(table.no_lookup()) };
            return Ok(hidden.to_dtype(delta.dtype())?.matmul(&delta)?);
        };
        if view.gain.is_some() || view.residual.is_some() {
            return Err(table.no_lookup());
        }
        let hidden = hidden.to_dtype(view.b.dtype())?;
        let hidden = flow.dropout(&hidden, adapter.dropout(), &format!("{} (head)", table.path()))?;
        let inner = hidden.matmul(&view.b)?;
        let inner = match &view.rank_scale {
            Some(scale) => inner.broadcast_mul(scale)?,
            None => inner,
        };
        Ok((inner * view.scale)?.matmul(&view.a)?)
    }

    /// The head [vocabulary, width] with everything that acts on it written in, in the table's dtype.
    pub(crate) fn effective(&self, table: &Embedding) -> Result<Tensor> {
        let own = match self.is_replaced(table) {
            true => None,
            false => Some(self.kept.as_ref().unwrap_or(table.base()).dequantize(DType::F32)?),
        };
        self.effective_rows(table, 0..table.base().d_out(), own)
    }

    /// Whether a trained head or table stands in the frozen head's place.
    pub(crate) fn is_replaced(&self, table: &Embedding) -> bool {
        self.trained.is_some() || self.shared && table.weight().trained().is_some()
    }

    /// Rows `run` of [`Self::effective`]; `own` are the frozen head's, where it is not replaced.
    pub(crate) fn effective_rows(&self, table: &Embedding, run: Range<usize>, own: Option<Tensor>) -> Result<Tensor> {
        let dtype = table.weight().frozen().dtype();
        let cut = |t: &Tensor| t.detach().narrow(0, run.start, run.len());
        if let Some(trained) = &self.trained {
            return Ok(cut(trained)?.to_dtype(dtype)?);
        }
        let mut head = match (table.weight().trained().filter(|_| self.shared), own) {
            (Some(trained), _) => cut(trained)?,
            (None, Some(own)) => own,
            (None, None) => self.kept.as_ref().unwrap_or(table.base()).rows(run.clone())?,
        }
        .to_dtype(DType::F32)?;
        if self.shared {
            head = table.with_adapter(head, run.start)?;
        }
        Ok(table.with_rows(head, run.start)?.to_dtype(dtype)?)
    }
}
