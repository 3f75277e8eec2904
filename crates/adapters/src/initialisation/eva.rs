//! EVA: A starts as the principal directions of the inputs that the data gives, B as zero.
//!
//! Equation: E[x x^T] = V S V^T; A = V[:, 1 .. r]^T, B = 0
//! Shapes:   A [r, d_in], B [d_out, r]
//! Source:   arXiv 2410.07170 eq. 2, without its redistribution of ranks
//! Cost:     one pass over `rows` rows and one eigendecomposition a layer

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::{Factors, Start, from_data, shapes};
use crate::adapter::{Evidence, EvidenceKind, Init, Site, Wanted};
use crate::{Error, Result, decomposition};

/// How EVA starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eva {
    /// Rows of the training data that the inputs are taken from.
    pub rows: usize,
}

impl Default for Eva {
    fn default() -> Self {
        Self { rows: 64 }
    }
}

impl Start for Eva {
    fn wanted(&self) -> Option<Wanted> {
        Some(Wanted { kind: EvidenceKind::InputMoment, rows: self.rows })
    }

    fn start_from(&self, site: &Site, _scale: f64, evidence: &Evidence<'_>) -> Result<(Tensor, Tensor)> {
        let ((r, width), shape_b) = shapes(site);
        if r > width {
            return Err(Error::config("r", format!("{}: rank {r} is above the input width {width}", site.path)));
        }
        let (_, _, vt) = decomposition::svd(evidence.values)?;
        Ok((vt.narrow(0, 0, r)?.contiguous()?, Tensor::zeros(shape_b, DType::F32, evidence.values.device())?))
    }

    fn factors(&self, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors> {
        from_data("eva", Self::MOVES_BASE, site, scale, init)
    }
}
