//! Full fine-tuning of a module: its dense weight is trained in place of the frozen one.
//!
//! Equation: y = W' x, W' starts as W
//! Shapes:   x [.., d_in] -> y [.., d_out]; W' [d_out, d_in] trained
//! Source:   the baseline every low-rank method is measured against
//! Cost:     2 d_in d_out FLOPs a token forward, 4 d_in d_out backward; d_in d_out parameters a layer

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Site};
use crate::{Error, Flow, ParameterMap, Result, weight_space};

/// Full fine-tuning has no settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Full {}

impl Method for Full {
    type Layer = FullLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<FullLayer> {
        if site.lookup {
            return Err(Error::unsupported(
                format!("full on {}", site.path),
                "a table is trained whole by naming it in modules_to_save",
            ));
        }
        let (base, dtype) = (&site.base, init.dtype);
        Ok(FullLayer { weight: init.copy_with("weight", base.dims(), || Ok(base.dequantize(dtype)?))? })
    }
}

/// The dense weight of one module.
#[derive(Debug)]
pub struct FullLayer {
    weight: Tensor,
}

impl FullLayer {
    /// A layer around a given variable (modules saved whole beside an adapter).
    pub(crate) fn new(weight: Tensor) -> Self {
        Self { weight }
    }
}

impl Adapter for FullLayer {
    fn forward(&self, _base: &Arc<FrozenWeight>, x: &Tensor, _flow: &Flow) -> Result<Tensor> {
        weight_space::product(x, &self.weight)
    }

    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        let base = base.dequantize(DType::F32)?;
        Ok(Some((self.weight.detach().to_dtype(DType::F32)? - base)?))
    }

    fn rows(&self, rows: Range<usize>) -> Result<Option<Arc<dyn Adapter>>> {
        let weight = self.weight.detach().narrow(0, rows.start, rows.len())?.contiguous()?;
        Ok(Some(Arc::new(Self { weight })))
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("weight", &self.weight, true);
        map
    }
}
