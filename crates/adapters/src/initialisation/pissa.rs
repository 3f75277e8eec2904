//! PiSSA: the factors start as the principal singular vectors of the base, which leave the base.
//!
//! Equation: W = U S V^T; B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T; the frozen part becomes W - s B A
//! Shapes:   W [d_out, d_in], A [r, d_in], B [d_out, r]
//! Source:   arXiv 2404.02948 eq. 2-4; PEFT `init_lora_weights="pissa"`
//! Cost:     one SVD a layer; one more copy of the adapted weights

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{Factors, Start, from_base};
use crate::adapter::{Init, Site};
use crate::{Result, decomposition};

/// PiSSA has no settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pissa {}

impl Start for Pissa {
    const MOVES_BASE: bool = true;

    fn factors(&self, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors> {
        from_base(site, scale, init, |weight| principal(decomposition::svd(weight)?, site.rank, scale))
    }
}

/// B and A from the leading `rank` triplets of (U, S, V^T).
pub(super) fn principal(
    (u, s, vt): (Tensor, Vec<f64>, Tensor),
    rank: usize,
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let roots: Vec<f32> = s.iter().take(rank).map(|s| (s / scale).sqrt() as f32).collect();
    let roots = Tensor::from_vec(roots, rank, u.device())?;
    let b = u.narrow(1, 0, rank)?.broadcast_mul(&roots)?;
    let a = vt.narrow(0, 0, rank)?.broadcast_mul(&roots.unsqueeze(1)?)?;
    Ok((b.contiguous()?, a.contiguous()?))
}
