//! LoKr: the Kronecker product of a small matrix and a larger, low-rank one.
//!
//! Equation: y = W x + s (W1 (x) W2) x, s = alpha / r; with x and y as matrices X [n1, n2] and Y [m1, m2] that is Y = W1 X W2^T,
//!           so the product itself is never formed
//! Shapes:   x [.., n1 n2] -> y [.., m1 m2]; W1 [m1, n1], or [m1, r] [r, n1] with `decompose_both`; W2 [m2, n2], or [m2, r] [r, n2]
//!           where r is below half its larger side. d_in = n1 n2 and d_out = m1 m2 are split at `decompose_factor`, or nearest
//!           the square root
//! Source:   LyCORIS arXiv 2309.14859 section 3; W1 (or its left factor) starts at 0, the others Kaiming-uniform (PEFT)
//! Cost:     2 (n1 n2 r + n1 m1 r + m1 r m2) FLOPs a token forward; m1 n1 + r (m2 + n2) parameters a layer

use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Site};
use crate::formats::peft_config::PeftNames;
use crate::low_rank::{flatten, unflatten};
use crate::output_dropout::OutputDropout;
use crate::{Error, Flow, ParameterMap, Result, random};

/// How LoKr is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lokr {
    /// Rank r of the decomposed factors.
    pub r: usize,
    /// Scaling numerator.
    pub alpha: f64,
    /// Probability of dropping an output of the change while training.
    pub rank_dropout: f64,
    /// Whether outputs that stay are made larger by what was dropped.
    pub rank_dropout_scale: bool,
    /// Probability of dropping a layer's change while training.
    pub module_dropout: f64,
    /// Whether the smaller factor is decomposed as well, where its larger side is above 2 r.
    pub decompose_both: bool,
    /// Size of the smaller factor where it divides the width, else an upper bound of it; -1: near the square root.
    pub decompose_factor: i64,
}

impl Default for Lokr {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 8.0,
            rank_dropout: 0.0,
            rank_dropout_scale: false,
            module_dropout: 0.0,
            decompose_both: false,
            decompose_factor: -1,
        }
    }
}

/// `width` as a product of two, the smaller first: the smaller is `factor` where that divides, else the first divisor up to
/// `factor` (-1: of all) that is not below its counterpart, or the last one.
fn split(width: usize, factor: i64) -> (usize, usize) {
    let bound = usize::try_from(factor).unwrap_or(width);
    if factor > 0 && width.is_multiple_of(bound) {
        return (bound, width / bound);
    }
    let (mut small, mut large) = (1, width);
    for next in (2..=bound.min(width)).filter(|n| width.is_multiple_of(*n)) {
        if small >= large {
            break;
        }
        (small, large) = (next, width / next);
    }
    (small.min(large), small.max(large))
}

/// One side of the product: whole, or a product [m, r] [r, n] itself.
#[derive(Debug)]
enum Side {
    Whole(Tensor),
    Product(Tensor, Tensor),
}

impl Side {
    fn value(&self, of: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Tensor> {
        Ok(match self {
            Self::Whole(w) => of(w)?,
            Self::Product(a, b) => of(a)?.matmul(&of(b)?)?,
        })
    }

    /// Products of the rows of `x` [rows, n] with it: [rows, m].
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Whole(w) => x.matmul(&w.t()?)?,
            Self::Product(a, b) => x.matmul(&b.t()?)?.matmul(&a.t()?)?,
        })
    }

    fn parameters(&self, name: &str, map: &mut ParameterMap) {
        match self {
            Self::Whole(w) => map.push(name, w, true),
            Self::Product(a, b) => {
                map.push(format!("{name}_a"), a, true);
                map.push(format!("{name}_b"), b, true);
            }
        }
    }
}

impl Method for Lokr {
    type Layer = LokrLayer;

    const PEFT: Option<PeftNames> =
        Some(PeftNames { kind: "LOKR", keys: &[], fixed: &[("use_effective_conv2d", "false")] });
    const TENSORS: &'static [&'static str] =
        &["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"];

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<LokrLayer> {
        site.refuse_lookup("lokr")?;
        let r = site.checked_rank()?;
        if self.decompose_factor != -1 && self.decompose_factor < 1 {
            let message = format!("{} is neither a size nor -1", self.decompose_factor);
            return Err(Error::config("decompose_factor", message));
        }
        let ((m1, m2), (n1, n2)) = (split(site.d_out, self.decompose_factor), split(site.d_in, self.decompose_factor));
        let mut drawn = |name: &str, shape: (usize, usize), zero: bool| {
            let bound = if zero { 0.0 } else { 1.0 / (shape.1 as f64).sqrt() };
            init.trainable(name, shape, |rng, shape, device| random::uniform(rng, bound, shape, device))
        };
        let mut side = |name: &str, (m, n): (usize, usize), decomposed: bool, zero: bool| -> Result<Side> {
            Ok(match decomposed {
                false => Side::Whole(drawn(name, (m, n), zero)?),
                true => {
                    let left = drawn(&format!("{name}_a"), (m, r), zero)?;
                    Side::Product(left, drawn(&format!("{name}_b"), (r, n), false)?)
                }
            })
        };
        Ok(LokrLayer {
            path: site.path.clone(),
            small: side("lokr_w1", (m1, n1), self.decompose_both && 2 * r < m1.max(n1), true)?,
            large: side("lokr_w2", (m2, n2), 2 * r < m2.max(n2), false)?,
            sides: (m1, n1, n2),
            scale: site.alpha / r as f64,
            dropout: OutputDropout::new(self.rank_dropout, self.module_dropout, self.rank_dropout_scale)?,
        })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, self.alpha)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 1, alpha: 2.0, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("low rank".to_owned(), small.clone()),
            ("both low rank".to_owned(), Self { decompose_both: true, decompose_factor: 5, ..small.clone() }),
            (
                "dropout".to_owned(),
                Self { rank_dropout: 0.3, rank_dropout_scale: true, module_dropout: 0.1, ..small },
            ),
        ]
    }
}

/// The two factors at one site.
#[derive(Debug)]
pub struct LokrLayer {
    path: String,
    small: Side,
    large: Side,
    /// m1, n1, n2.
    sides: (usize, usize, usize),
    scale: f64,
    dropout: OutputDropout,
}

impl Adapter for LokrLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let (m1, n1, n2) = self.sides;
        let w1 = (self.small.value(|t| Ok(t.clone()))? * self.scale)?;
        let (rows, shape) = flatten(&x.to_dtype(w1.dtype())?)?;
        let count = rows.dim(0)?;
        let turned = |t: &Tensor| t.transpose(1, 2)?.contiguous();
        // [count n1, m2], then its transposes [count m2, n1] -> [count m2, m1].
        let inner = self.large.apply(&rows.reshape((count * n1, n2))?)?;
        let m2 = inner.dim(1)?;
        let inner = turned(&inner.reshape((count, n1, m2))?)?.reshape((count * m2, n1))?;
        let change = inner.matmul(&w1.t()?)?.reshape((count, m2, m1))?;
        let change = unflatten(&turned(&change)?.reshape((count, m1 * m2))?, &shape)?;
        self.dropout.add(base, x, &change, flow, &self.path)
    }

    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        let off = |t: &Tensor| t.detach().to_dtype(DType::F32);
        let w1 = (self.small.value(off)? * self.scale)?.unsqueeze(1)?.unsqueeze(3)?;
        let w2 = self.large.value(off)?.unsqueeze(0)?.unsqueeze(2)?;
        Ok(Some(w1.broadcast_mul(&w2)?.reshape(base.dims())?))
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        self.small.parameters("lokr_w1", &mut map);
        self.large.parameters("lokr_w2", &mut map);
        map
    }

    fn dropout(&self) -> f64 {
        self.dropout.probability()
    }
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn widths_split_as_in_peft() {
        let found = [(256, -1), (128, -1), (127, -1), (128, 4), (100, 8), (12, 5), (1, -1), (4304, -1)];
        let split: Vec<_> = found.iter().map(|(width, factor)| split(*width, *factor)).collect();
        assert_eq!(split, [(16, 16), (8, 16), (1, 127), (4, 32), (5, 20), (3, 4), (1, 1), (16, 269)]);
    }
}
