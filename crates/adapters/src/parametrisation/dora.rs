//! DoRA: LoRA on the direction of each output's weights, with a trained magnitude.
//!
//! Equation: y = g * (W x + s B A x), g = m / ||W + s B A|| row by row; the norm is not differentiated
//! Shapes:   x [.., d_in] -> y [.., d_out]; A [r, d_in], B [d_out, r], m `[d_out]` trained; g `[d_out]`
//! Source:   arXiv 2402.09353 eq. 5 and section 4.3; norms by ||W||^2 + 2 s <W A^T, B> + s^2 ||B A||^2
//! Cost:     LoRA's, plus 2 r d_in d_out FLOPs a forward pass (not per token); d_out parameters more a layer

use std::sync::{Arc, OnceLock};

use candle_core::{D, DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::lora::{Lora, LoraLayer};
use crate::adapter::{Adapter, Init, Method, Site};
use crate::low_rank::LowRankView;
use crate::{Error, Flow, ParameterMap, Result};

/// How DoRA is set up: as LoRA.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Dora(pub Lora);

impl Method for Dora {
    type Layer = DoraLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<DoraLayer> {
        if site.lookup {
            return Err(Error::unsupported(
                format!("dora on {}", site.path),
                "the magnitude acts on outputs of a product, not on looked-up rows; use lora for embeddings",
            ));
        }
        let lora = self.0.factors(site, init)?;
        let start = row_norms(&site.base, &lora)?.to_dtype(init.dtype)?;
        let magnitude = init.copy_of("lora_magnitude_vector", &start)?;
        Ok(DoraLayer { lora, magnitude, base_square: OnceLock::new() })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        self.0.rank_and_alpha()
    }

    fn portable(&self) -> Option<(Self, usize, f64)> {
        self.0.portable().map(|(lora, rank, alpha)| (Self(lora), rank, alpha))
    }

    fn to_peft(&self) -> Option<Map<String, Value>> {
        let mut keys = self.0.peft_keys();
        keys.insert("use_dora".into(), true.into());
        Some(keys)
    }

    fn from_peft(keys: &mut Map<String, Value>) -> Result<Option<Self>> {
        Ok(Lora::from_peft_keys(keys, true)?.map(Self))
    }
}

/// A, B and the magnitude at one site.
#[derive(Debug)]
pub struct DoraLayer {
    lora: LoraLayer,
    magnitude: Tensor,
    /// ||W||^2 by row, computed once: W never changes.
    base_square: OnceLock<Tensor>,
}

/// ||W||^2 by row `[d_out]` in f64 precision where the weight is small enough to matter, f32 otherwise.
fn squared_rows(weight: &Arc<FrozenWeight>) -> Result<Tensor> {
    Ok(weight.dequantize(DType::F64)?.sqr()?.sum(D::Minus1)?)
}

/// ||W + s B A|| by row `[d_out]` in f64.
fn row_norms(base: &Arc<FrozenWeight>, lora: &LoraLayer) -> Result<Tensor> {
    norms(lora, base, &squared_rows(lora.residual().unwrap_or(base))?)
}

/// The low-rank identity: ||w_i||^2 + 2 s <(W A^T)_i, b_i> + s^2 <b_i (A A^T), b_i>.
fn norms(lora: &LoraLayer, base: &Arc<FrozenWeight>, base_square: &Tensor) -> Result<Tensor> {
    let weight = lora.residual().unwrap_or(base);
    let a = lora.a.detach();
    let b = lora.b.detach().to_dtype(DType::F64)?;
    let wa = weight.forward(&a)?.t()?.to_dtype(DType::F64)?;
    let cross = (wa * &b)?.sum(D::Minus1)?;
    let a = a.to_dtype(DType::F64)?;
    let gram = a.matmul(&a.t()?)?;
    let own = (b.matmul(&gram)? * &b)?.sum(D::Minus1)?;
    let square = (base_square + ((cross * (2.0 * lora.scale))? + (own * (lora.scale * lora.scale))?)?)?;
    Ok(square.maximum(0.0)?.sqrt()?)
}

impl DoraLayer {
    /// g = m / ||W + s B A||, differentiable in m only.
    fn gain(&self, base: &Arc<FrozenWeight>) -> Result<Tensor> {
        let square = match self.base_square.get() {
            Some(square) => square,
            None => {
                let square = squared_rows(self.lora.residual().unwrap_or(base))?;
                self.base_square.get_or_init(|| square)
            }
        };
        let norm = norms(&self.lora, base, square)?.to_dtype(self.magnitude.dtype())?;
        Ok(self.magnitude.div(&norm)?)
    }
}

impl Adapter for DoraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.lora.view().gain(self.gain(base)?).forward(base, x, self.lora.dropped(x, flow)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = self.lora.parameters();
        map.push("lora_magnitude_vector", &self.magnitude, true);
        map
    }

    fn portable(&self) -> Result<Option<ParameterMap>> {
        let Some(mut map) = self.lora.portable()? else { return Ok(None) };
        map.push("lora_magnitude_vector", &self.magnitude, true);
        Ok(Some(map))
    }

    fn low_rank(&self, base: &Arc<FrozenWeight>) -> Result<Option<LowRankView<'_>>> {
        Ok(Some(self.lora.view().gain(self.gain(base)?)))
    }

    fn dropout(&self) -> f64 {
        self.lora.dropout()
    }
}
