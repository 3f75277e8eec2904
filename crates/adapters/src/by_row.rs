//! Several adapters in one batch: each sequence goes through one of them.
//!
//! Equation: y_j = f_v (x_j) for the adapter v that sequence j goes through
//! Shapes:   x [sequences, .., d_in] -> y [sequences, .., d_out]
//! Cost:     the parts' costs for their own sequences. Decoding reads each weight once for all of them (`espalier_kernels::decode`)

use std::sync::Arc;

use candle_core::Tensor;
use espalier_kernels::frozen::FrozenWeight;

use crate::adapter::Adapter;
use crate::{Error, Flow, ParameterMap, Result};

/// Adapters of one map, of which each sequence of a batch goes through one; None: the base alone.
#[derive(Debug)]
pub struct ByRow {
    parts: Vec<Option<Arc<dyn Adapter>>>,
}

impl ByRow {
    /// A choice among `parts`.
    pub fn new(parts: Vec<Option<Arc<dyn Adapter>>>) -> Self {
        Self { parts }
    }

    fn chosen<'a>(&self, flow: &'a Flow) -> Result<&'a [usize]> {
        let count = self.parts.len();
        let Some(rows) = &flow.rows else {
            return Err(Error::config(
                "rows",
                format!("{count} adapters are in the slots, and no sequence says which is its"),
            ));
        };
        match rows.iter().find(|row| **row >= count) {
            Some(row) => Err(Error::config("rows", format!("adapter {row} of {count} in the slots"))),
            None => Ok(rows),
        }
    }

    /// The one part that all sequences go through, if they do.
    ///
    /// # Errors
    /// If the pass does not say which adapters its sequences go through, or names one that is not there.
    pub fn common(&self, flow: &Flow) -> Result<Option<&Option<Arc<dyn Adapter>>>> {
        let rows = self.chosen(flow)?;
        let first = rows.first().copied().unwrap_or(0);
        Ok(rows.iter().all(|row| *row == first).then(|| self.parts.get(first)).flatten())
    }
}

impl Adapter for ByRow {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let part = |part: &Option<Arc<dyn Adapter>>, x: &Tensor| match part {
            Some(adapter) => adapter.forward(base, x, flow),
            None => Ok(base.forward(x)?),
        };
        if let Some(one) = self.common(flow)? {
            return part(one, x);
        }
        let rows = self.chosen(flow)?;
        if x.dims().first() != Some(&rows.len()) {
            return Err(Error::config(
                "rows",
                format!("{} sequences of {:?} with adapters named", rows.len(), x.dims()),
            ));
        }
        let (mut order, mut results) = (Vec::with_capacity(rows.len()), Vec::new());
        for (v, adapter) in self.parts.iter().enumerate() {
            let own: Vec<u32> = (0u32..).zip(rows).filter(|(_, row)| **row == v).map(|(j, _)| j).collect();
            if !own.is_empty() {
                let own_rows = x.index_select(&Tensor::new(own.as_slice(), x.device())?, 0)?;
                results.push(part(adapter, &own_rows)?);
                order.extend(own);
            }
        }
        let mut places = vec![0u32; order.len()];
        (0u32..).zip(&order).for_each(|(at, j)| places[*j as usize] = at);
        Ok(Tensor::cat(&results, 0)?.index_select(&Tensor::new(places, x.device())?, 0)?)
    }

    fn delta(&self, _: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn lookup(&self, _: &Arc<FrozenWeight>, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn by_row(&self) -> Option<&ByRow> {
        Some(self)
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        for (i, part) in self.parts.iter().enumerate() {
            part.iter().for_each(|part| map.extend_under(&i.to_string(), part.parameters()));
        }
        map
    }
}
