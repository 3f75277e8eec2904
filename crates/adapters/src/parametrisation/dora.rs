//! DoRA: LoRA on the direction of each output's weights, with a trained magnitude.
//!
//! Equation: y = g * (W x + s B A x), g = m / ||W + s B A|| row by row; the norm is not differentiated
//! Shapes:   x [.., d_in] -> y [.., d_out]; A [r, d_in], B [d_out, r], m `[d_out]` trained; g `[d_out]`
//! Source:   arXiv 2402.09353 eq. 5 and section 4.3; norms by ||W||^2 + 2 s <W A^T, B> + s^2 ||B A||^2
//! Cost:     LoRA's, plus 2 r d_in d_out FLOPs a forward pass (not per token); d_out parameters more a layer

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::Tensor;
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::lora::{Lora, LoraLayer};
use crate::adapter::{Adapter, Evidence, Init, Method, Site, Wanted};
use crate::low_rank::{Gain, LowRankView};
use crate::{Flow, ParameterMap, Result};

/// How DoRA is set up: as LoRA.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Dora(pub Lora);

impl Method for Dora {
    type Layer = DoraLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<DoraLayer> {
        site.refuse_lookup("dora")?;
        let lora = self.0.factors(site, init)?;
        let magnitude = init.trainable("lora_magnitude_vector", site.d_out, |_, _, _| row_norms(&site.base, &lora))?;
        Ok(DoraLayer { lora, magnitude, base_square: OnceLock::new() })
    }

    fn wanted(&self) -> Option<Wanted> {
        self.0.wanted()
    }

    fn starts(&self, site: &Site, evidence: &Evidence<'_>) -> Result<Vec<(String, Tensor)>> {
        self.0.starts(site, evidence)
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        self.0.rank_and_alpha()
    }

    fn portable(&self) -> Option<(Self, usize, f64)> {
        self.0.portable().map(|(lora, rank, alpha)| (Self(lora), rank, alpha))
    }

    fn examples() -> Vec<(String, Self)> {
        Lora::examples().into_iter().map(|(name, lora)| (name, Self(lora))).collect()
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

/// ||W + s B A|| by row `[d_out]` in f64.
fn row_norms(base: &Arc<FrozenWeight>, lora: &LoraLayer) -> Result<Tensor> {
    let weight = lora.residual().unwrap_or(base);
    lora.view().row_norms(weight, &weight.row_squares()?)
}

impl DoraLayer {
    /// The low-rank form with g = m / ||W + s B A||, differentiable in m only.
    fn view(&self, base: &Arc<FrozenWeight>) -> Result<LowRankView> {
        let square = match self.base_square.get() {
            Some(square) => square.clone(),
            None => {
                let square = self.lora.residual().unwrap_or(base).row_squares()?;
                self.base_square.get_or_init(|| square).clone()
            }
        };
        Ok(self.lora.view().gain(Gain::OverNorm { magnitude: self.magnitude.clone(), square }))
    }
}

impl Adapter for DoraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view(base)?.forward(base, x, self.lora.dropped(x, flow)?.as_ref())
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

    fn rows(&self, rows: Range<usize>) -> Result<Option<Arc<dyn Adapter>>> {
        let magnitude = self.magnitude.detach().narrow(0, rows.start, rows.len())?.contiguous()?;
        Ok(Some(Arc::new(Self { lora: self.lora.of_rows(&rows)?, magnitude, base_square: OnceLock::new() })))
    }

    fn low_rank(&self, base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.view(base).map(Some)
    }

    fn holds(&self) -> Option<&'static str> {
        Some("the norm of W + s B A is not differentiated (arXiv 2402.09353 section 4.3)")
    }

    fn dropout(&self) -> f64 {
        self.lora.dropout()
    }
}
