//! OFT: an orthogonal map of the input, in blocks along the diagonal.
//!
//! Equation: y = W R^T x, R of blocks (I - Q) (I + Q)^-1 with Q = -Q^T; or, as PEFT has it by default, of the first terms of
//!           (I + Q) (I - Q)^-1 = I + 2 Q + 2 Q^2 + .. with the last one halved. `coft`: |Q| <= eps / sqrt(n) by scaling Q down,
//!           with the gradient of the scaled Q (PEFT scales the stored values instead)
//! Shapes:   x [.., d_in] -> y [.., d_out]; n blocks of k inputs, n k = d_in; k (k - 1) / 2 trained values a block, in one block
//!           for all with `block_share`
//! Source:   OFT arXiv 2306.07280 eq. 4 and section 3.3; terms in place of the inverse: arXiv 2506.19847 section 4.2, PEFT 0.18.
//!           Q starts at 0
//! Cost:     2 k d_in FLOPs a token forward, 2 n k^3 a term and pass; n k (k - 1) / 2 parameters a layer

use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Adapter, Init, Method, Site};
use crate::formats::peft_config::{self, PeftNames};
use crate::rotation::{by_block, cayley, skew, unit};
use crate::{Error, Flow, ParameterMap, Result};

/// How OFT is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Oft {
    /// Inputs of a block, or the divisor of a layer's width nearest to it; 0 where `blocks` says how many there are.
    pub block_size: usize,
    /// Number of blocks, or the divisor nearest to it; 0 where `block_size` says how large they are.
    pub blocks: usize,
    /// Whether Q is kept small.
    pub coft: bool,
    /// How small.
    pub eps: f64,
    /// Whether all blocks of a layer are one.
    pub block_share: bool,
    /// Whether the first terms of a series stand for the inverse.
    pub use_cayley_neumann: bool,
    /// How many terms.
    pub num_cayley_neumann_terms: usize,
}

impl Default for Oft {
    fn default() -> Self {
        Self {
            block_size: 32,
            blocks: 0,
            coft: false,
            eps: 6e-5,
            block_share: false,
            use_cayley_neumann: true,
            num_cayley_neumann_terms: 5,
        }
    }
}

/// The divisor of `width` that is nearest to `wanted`, the lower of two.
fn divisor(width: usize, wanted: usize) -> usize {
    let divides = |n: &usize| width.is_multiple_of(*n);
    let lower = (1..=wanted.min(width)).rev().find(divides).unwrap_or(1);
    let higher = (wanted.min(width)..=width).find(divides).unwrap_or(width);
    if wanted.saturating_sub(lower) <= higher.abs_diff(wanted) { lower } else { higher }
}

impl Oft {
    /// Number and size of the blocks of `width` inputs.
    fn blocks_of(&self, width: usize) -> Result<(usize, usize)> {
        match (self.block_size, self.blocks) {
            (0, 0) => Err(Error::config("block_size", "neither it nor `blocks` is set; set one of the two")),
            (size, 0) => Ok(divisor(width, size)).map(|size| (width / size, size)),
            (0, count) => Ok(divisor(width, count)).map(|count| (count, width / count)),
            (size, count) => {
                let message = format!("{size}, and `blocks` is {count}: one follows from the other; set one of them to 0");
                Err(Error::config("block_size", message))
            }
        }
    }
}

impl Method for Oft {
    type Layer = OftLayer;

    const PEFT: Option<PeftNames> = Some(PeftNames {
        kind: "OFT",
        keys: &[("block_size", "oft_block_size"), ("blocks", "r")],
        // PEFT's layers of linear maps have it, and do not use it.
        fixed: &[("module_dropout", "0.0")],
    });
    const TENSORS: &'static [&'static str] = &["oft_R.weight"];

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<OftLayer> {
        site.refuse_lookup("oft")?;
        let (count, size) = self.blocks_of(site.d_in)?;
        if size < 2 {
            let message = format!("{}: blocks of one input each turn nothing ({} inputs)", site.path, site.d_in);
            return Err(Error::config("block_size", message));
        }
        if self.use_cayley_neumann && self.num_cayley_neumann_terms < 2 {
            let message = format!("{}: at least 2, as the first one is the unit matrix", self.num_cayley_neumann_terms);
            return Err(Error::config("num_cayley_neumann_terms", message));
        }
        if self.coft && !(self.eps > 0.0 && self.eps.is_finite()) {
            return Err(Error::config("eps", format!("{}: expected a number above 0", self.eps)));
        }
        let stored = if self.block_share { 1 } else { count };
        let values = init.zeros("oft_R.weight", (stored, size * (size - 1) / 2))?;
        Ok(OftLayer { path: site.path.clone(), method: self.clone(), size, values })
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { block_size: 2, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("blocks by number".to_owned(), Self { block_size: 0, blocks: 2, ..small.clone() }),
            ("exact".to_owned(), Self { block_size: 5, use_cayley_neumann: false, ..small.clone() }),
            ("one for all".to_owned(), Self { block_share: true, num_cayley_neumann_terms: 2, ..small.clone() }),
            ("kept small".to_owned(), Self { coft: true, eps: 0.3, num_cayley_neumann_terms: 3, ..small }),
        ]
    }

    fn to_peft(&self) -> Option<Map<String, Value>> {
        let mut keys = Self::PEFT.and_then(|names| peft_config::settings_to_keys(self, &names))?;
        // The first version with these terms.
        keys.insert("peft_version".into(), "0.18.0".into());
        Some(keys)
    }

    fn from_peft(keys: &mut Map<String, Value>) -> Result<Option<Self>> {
        let Some(names) = Self::PEFT else { return Ok(None) };
        if keys.get("peft_type").and_then(Value::as_str) != Some(names.kind) {
            return Ok(None);
        }
        if !keys.contains_key("oft_block_size") {
            let reason = "missing: the file is of an older PEFT, whose OFT had other tensors; train the adapter anew";
            return Err(Error::config("oft_block_size", reason));
        }
        let version = keys.get("peft_version").and_then(Value::as_str).unwrap_or("0.0").to_owned();
        let found: Option<Self> = peft_config::settings_from_keys(keys, &names)?;
        let mut numbers = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        let old = (numbers.next(), numbers.next()) < (Some(0), Some(18));
        if old && found.as_ref().is_some_and(|found| found.use_cayley_neumann) {
            let reason = "true in a file of PEFT before 0.18, which had other terms; train the adapter anew";
            return Err(Error::config("use_cayley_neumann", reason));
        }
        Ok(found)
    }
}

/// The skew-symmetric values at one site.
#[derive(Debug)]
pub struct OftLayer {
    path: String,
    method: Oft,
    size: usize,
    /// [blocks, k (k - 1) / 2].
    values: Tensor,
}

impl OftLayer {
    /// The blocks [n, k, k] of `values`.
    fn blocks(&self, values: &Tensor) -> Result<Tensor> {
        let mut q = skew(values, self.size)?;
        if self.method.coft {
            let limit = self.method.eps / (q.dim(0)? as f64).sqrt();
            let square = (q.sqr()?.sum_keepdim((1, 2))? / (limit * limit))?;
            q = q.broadcast_div(&square.maximum(1.0)?.sqrt()?)?;
        }
        if !self.method.use_cayley_neumann {
            return cayley(&q, &self.path);
        }
        let terms = self.method.num_cayley_neumann_terms;
        let mut sum = (&q * 2.0)?;
        if terms > 2 {
            let mut power = q.matmul(&q)?;
            sum = (sum + (&power * 2.0)?)?;
            for _ in 3..terms.saturating_sub(1) {
                power = power.matmul(&q)?;
                sum = (sum + (&power * 2.0)?)?;
            }
            sum = (sum + power.matmul(&q)?)?;
        }
        Ok(sum.broadcast_add(&unit(self.size, &q)?)?)
    }
}

impl Adapter for OftLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, _flow: &Flow) -> Result<Tensor> {
        let turned = by_block(x, &self.blocks(&self.values)?)?;
        Ok(base.forward(&turned.to_dtype(x.dtype())?)?)
    }

    /// W R^T - W.
    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        let blocks = self.blocks(&self.values.detach().to_dtype(DType::F32)?)?;
        let weight = base.dequantize(DType::F32)?;
        Ok(Some((by_block(&weight, &blocks.transpose(1, 2)?.contiguous()?)? - weight)?))
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("oft_R.weight", &self.values, true);
        map
    }
}

#[cfg(test)]
mod tests {
    use super::divisor;

    #[test]
    fn sizes_that_do_not_divide_become_those_of_peft() {
        let found = [(32, 5), (64, 5), (96, 7), (10, 32), (7, 3), (12, 5), (6, 4)];
        assert_eq!(found.map(|(width, wanted)| divisor(width, wanted)), [4, 4, 6, 10, 1, 4, 3]);
    }
}
