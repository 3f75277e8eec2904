//! HRA: a chain of Householder reflections of the input.
//!
//! Equation: y = W R x, R = H1 .. Hr with H = I - 2 u u^T / |u|^2. In compact form R = I - U T U^T with unit columns U and
//!           T = (I / 2 + the part of U^T U above the diagonal)^-1. With `apply_gs` the columns are made orthogonal first, which
//!           is T = 2 (U^T U)^-1
//! Shapes:   x [.., d_in] -> y [.., d_out]; U [d_in, r] trained; T [r, r]
//! Source:   arXiv 2405.17484 eq. 2 and section 3.2; compact form: Joffrain et al., ACM TOMS 32 (2006). Columns start in equal
//!           pairs, so that R = I; for odd r, or with `apply_gs`, there is no such start
//! Cost:     4 r d_in FLOPs a token forward, 2 r^2 d_in a pass; r d_in parameters a layer

use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Site};
use crate::formats::peft_config::PeftNames;
use crate::low_rank::{flatten, unflatten};
use crate::rotation::{inverse, unit};
use crate::{Error, Flow, ParameterMap, Result, random};

/// How HRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hra {
    /// Number r of reflections; even, where the start is to be the base.
    pub r: usize,
    /// Whether the vectors are made orthogonal (by Gram and Schmidt's process).
    pub apply_gs: bool,
}

impl Default for Hra {
    fn default() -> Self {
        Self { r: 8, apply_gs: false }
    }
}

impl Method for Hra {
    type Layer = HraLayer;

    const PEFT: Option<PeftNames> = Some(PeftNames { kind: "HRA", keys: &[("apply_gs", "apply_GS")], fixed: &[] });
    const TENSORS: &'static [&'static str] = &["hra_u"];

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<HraLayer> {
        site.refuse_lookup("hra")?;
        let r = site.checked_rank()?;
        if self.apply_gs && r > site.d_in {
            let message = format!("{}: rank {r}, but there are no more than {} orthogonal inputs", site.path, site.d_in);
            return Err(Error::config("r", message));
        }
        let paired = r.is_multiple_of(2) && !self.apply_gs;
        let drawn = if paired { r / 2 } else { r };
        let bound = 1.0 / (drawn as f64).sqrt();
        let u = init.trainable("hra_u", (site.d_in, r), |rng, _, device| {
            let half = random::uniform(rng, bound, (site.d_in, drawn), device)?;
            Ok(if paired { Tensor::stack(&[&half, &half], 2)?.flatten(1, 2)? } else { half })
        })?;
        Ok(HraLayer { path: site.path.clone(), u, orthogonal: self.apply_gs })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, 0.0)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 4, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("odd".to_owned(), Self { r: 3, ..small.clone() }),
            ("orthogonal".to_owned(), Self { apply_gs: true, ..small }),
        ]
    }

    fn starts_at_base(&self) -> bool {
        self.r.is_multiple_of(2) && !self.apply_gs
    }
}

/// The vectors at one site.
#[derive(Debug)]
pub struct HraLayer {
    path: String,
    u: Tensor,
    orthogonal: bool,
}

impl HraLayer {
    /// Unit columns U and T of `u`.
    fn compact(&self, u: &Tensor) -> Result<(Tensor, Tensor)> {
        let u = u.broadcast_div(&u.sqr()?.sum_keepdim(0)?.sqrt()?)?;
        let gram = u.t()?.matmul(&u)?;
        let r = gram.dim(0)?;
        let turn = match self.orthogonal {
            true => (inverse(&gram.unsqueeze(0)?, &format!("{}.hra_u", self.path))? * 2.0)?,
            false => {
                let above = Tensor::triu2(r, DType::F32, u.device())?.to_dtype(u.dtype())?;
                // The diagonal of the Gram matrix is 1, and half of it is wanted.
                let mask = (above - (unit(r, &u)? * 0.5)?)?;
                inverse(&(gram * mask)?.unsqueeze(0)?, &format!("{}.hra_u", self.path))?
            }
        };
        Ok((u, turn.squeeze(0)?))
    }
}

impl Adapter for HraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, _flow: &Flow) -> Result<Tensor> {
        let (u, turn) = self.compact(&self.u)?;
        let (rows, shape) = flatten(&x.to_dtype(u.dtype())?)?;
        let change = rows.matmul(&u)?.matmul(&turn.t()?)?.matmul(&u.t()?)?;
        let turned = unflatten(&(rows - change)?, &shape)?;
        Ok(base.forward(&turned.to_dtype(x.dtype())?)?)
    }

    /// W R - W = -W U T U^T.
    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        let (u, turn) = self.compact(&self.u.detach().to_dtype(DType::F32)?)?;
        let weight = base.dequantize(DType::F32)?;
        Ok(Some(weight.matmul(&u)?.matmul(&turn)?.matmul(&u.t()?)?.neg()?))
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("hra_u", &self.u, true);
        map
    }
}
