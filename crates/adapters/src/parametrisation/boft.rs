//! BOFT: an orthogonal map of the input as a product of sparse ones, and a factor for every output.
//!
//! Equation: y = g * (W (M^T x)), M = B_m .. B_1, B_i = P_i D_i P_i^T; D_i of blocks (I - Q) (I + Q)^-1, Q = (R - R^T) / 2; P_i
//!           brings runs of half a block that lie 2^(i-1) halves apart together, so that m factors reach across blocks
//! Shapes:   x [.., d_in] -> y [.., d_out]; R [m, n, k, k] with n k = d_in, g [d_out, 1] trained
//! Source:   arXiv 2311.06243 eq. 3 and section 4; R starts at 0 and g at 1. Without its CUDA extension PEFT takes m = 1 whatever
//!           the settings say; files with more factors are read here
//! Cost:     2 m k d_in FLOPs a token forward, 2 m n k^3 a pass; m n k^2 + d_out parameters a layer

use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Site, checked_dropout};
use crate::formats::peft_config::PeftNames;
use crate::rotation::{by_block, cayley, unit};
use crate::{Error, Flow, ParameterMap, Result, random};

/// How BOFT is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Boft {
    /// Inputs of a block; 0 where `blocks` says how many there are.
    pub block_size: usize,
    /// Number of blocks; 0 where `block_size` says how large they are.
    pub blocks: usize,
    /// Number m of factors.
    pub factors: usize,
    /// Part of the blocks of one factor that is left out while training.
    pub dropout: f64,
}

impl Default for Boft {
    fn default() -> Self {
        Self { block_size: 4, blocks: 0, factors: 1, dropout: 0.0 }
    }
}

impl Boft {
    /// Number and size of the blocks at `site`.
    fn blocks_of(&self, site: &Site) -> Result<(usize, usize)> {
        let width = site.d_in;
        let given = match (self.block_size, self.blocks) {
            (0, count) if count > 0 => count,
            (size, 0) if size > 0 => size,
            (size, count) => {
                let message = format!("it is {size} and `blocks` is {count}: set one of the two, and the other to 0");
                return Err(Error::config("block_size", message));
            }
        };
        let key = if self.blocks > 0 { "blocks" } else { "block_size" };
        let refuse = |what: String| Err(Error::config(key, format!("{}: {what}", site.path)));
        if !width.is_multiple_of(given) {
            return refuse(format!("{given} does not divide the {width} inputs"));
        }
        let (count, size) = if self.blocks > 0 { (given, width / given) } else { (width / given, given) };
        if size < 2 {
            return refuse(format!("blocks of one input each turn nothing ({width} inputs)"));
        }
        if self.factors == 0 || self.factors > 32 {
            return Err(Error::config("factors", format!("{}: expected 1 to 32", self.factors)));
        }
        let groups = 1 << (self.factors - 1);
        if self.factors > 1 && !(size.is_multiple_of(2) && count.is_multiple_of(groups)) {
            return refuse(format!(
                "{} factors want blocks of an even size and a multiple of {groups} of them, found {count} of {size}",
                self.factors
            ));
        }
        Ok((count, size))
    }
}

/// Where the input at each place of factor `i` (from 0) comes from: halves of blocks in groups of 2^(i+1), the even ones first.
fn order(width: usize, size: usize, i: usize) -> Vec<u32> {
    let (half, group) = (size / 2, size << i);
    let halves = group / half;
    let sequence = (0..halves).step_by(2).chain((1..halves).step_by(2));
    let places: Vec<usize> = sequence.flat_map(|h| h * half..(h + 1) * half).collect();
    (0..width).map(|at| (at / group * group + places[at % group]) as u32).collect()
}

impl Method for Boft {
    type Layer = BoftLayer;

    const PEFT: Option<PeftNames> = Some(PeftNames {
        kind: "BOFT",
        keys: &[
            ("block_size", "boft_block_size"),
            ("blocks", "boft_block_num"),
            ("factors", "boft_n_butterfly_factor"),
            ("dropout", "boft_dropout"),
        ],
        fixed: &[],
    });
    const TENSORS: &'static [&'static str] = &["boft_R", "boft_s"];

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<BoftLayer> {
        site.refuse_lookup("boft")?;
        let (count, size) = self.blocks_of(site)?;
        let mut orders = Vec::new();
        for i in 1..self.factors {
            let order = order(site.d_in, size, i);
            let mut back = vec![0u32; site.d_in];
            (0u32..).zip(&order).for_each(|(at, from)| back[*from as usize] = at);
            let places = |list: Vec<u32>| Tensor::from_vec(list, site.d_in, &site.device);
            orders.push((places(order)?, places(back)?));
        }
        Ok(BoftLayer {
            path: site.path.clone(),
            r: init.zeros("boft_R", (self.factors, count, size, size))?,
            gain: init.constant("boft_s", (site.d_out, 1), 1.0)?,
            orders,
            dropout: checked_dropout(self.dropout)?,
        })
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { block_size: 2, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("two factors".to_owned(), Self { factors: 2, ..small.clone() }),
            ("blocks by number, dropout".to_owned(), Self { block_size: 0, blocks: 4, dropout: 0.3, ..small }),
        ]
    }
}

/// The blocks and factors at one site.
#[derive(Debug)]
pub struct BoftLayer {
    path: String,
    /// [m, n, k, k].
    r: Tensor,
    /// [d_out, 1].
    gain: Tensor,
    /// Places for P^T and for P, of every factor but the first, whose are in order.
    orders: Vec<(Tensor, Tensor)>,
    dropout: f64,
}

impl BoftLayer {
    /// The blocks [n, k, k] of every factor.
    fn blocks(&self, r: &Tensor) -> Result<Vec<Tensor>> {
        let (m, n, _, _) = r.dims4()?;
        let r = r.flatten(0, 1)?;
        let q = ((&r - r.transpose(1, 2)?)? * 0.5)?;
        let all = cayley(&q, &self.path)?;
        (0..m).map(|i| Ok(all.narrow(0, i * n, n)?)).collect()
    }

    /// x P_i D_i P_i^T for the blocks D_i of factor `i`.
    fn factor(&self, x: &Tensor, i: usize, blocks: &Tensor) -> Result<Tensor> {
        match i.checked_sub(1).and_then(|i| self.orders.get(i)) {
            None => by_block(x, blocks),
            Some((order, back)) => {
                let turned = by_block(&x.contiguous()?.index_select(back, x.rank() - 1)?, blocks)?;
                Ok(turned.index_select(order, x.rank() - 1)?)
            }
        }
    }

    /// Puts unit matrices in the place of some blocks of one factor, by the stream of this pass.
    fn drop(&self, blocks: &mut [Tensor], flow: &Flow) -> Result<()> {
        let mut rng = random::stream(flow.random_key, &self.path);
        let chosen = rng.random_range(0..blocks.len());
        let (n, k, _) = blocks[chosen].dims3()?;
        let mut mask = vec![0f32; n];
        mask[..(self.dropout * n as f64) as usize].fill(1.0);
        mask.shuffle(&mut rng);
        let mask = Tensor::from_vec(mask, (n, 1, 1), self.r.device())?.to_dtype(self.r.dtype())?;
        let rest = unit(k, &self.r)?.broadcast_sub(&blocks[chosen])?;
        blocks[chosen] = (&blocks[chosen] + rest.broadcast_mul(&mask)?)?;
        Ok(())
    }
}

impl Adapter for BoftLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let mut blocks = self.blocks(&self.r)?;
        if flow.train && self.dropout > 0.0 {
            self.drop(&mut blocks, flow)?;
        }
        let mut turned = x.to_dtype(self.r.dtype())?;
        for (i, blocks) in blocks.iter().enumerate().rev() {
            turned = self.factor(&turned, i, blocks)?;
        }
        let y = base.forward(&turned.to_dtype(x.dtype())?)?.to_dtype(self.gain.dtype())?;
        Ok(y.broadcast_mul(&self.gain.squeeze(D::Minus1)?)?.to_dtype(x.dtype())?)
    }

    /// g * (W M^T) - W.
    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        let weight = base.dequantize(DType::F32)?;
        let mut turned = weight.clone();
        for (i, blocks) in self.blocks(&self.r.detach().to_dtype(DType::F32)?)?.iter().enumerate() {
            turned = self.factor(&turned, i, &blocks.transpose(1, 2)?.contiguous()?)?;
        }
        let gain = self.gain.detach().to_dtype(DType::F32)?;
        Ok(Some((turned.broadcast_mul(&gain)? - weight)?))
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("boft_R", &self.r, true);
        map.push("boft_s", &self.gain, true);
        map
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

#[cfg(test)]
mod tests {
    use super::order;

    #[test]
    fn halves_of_blocks_meet_those_that_lie_apart() {
        assert_eq!(order(8, 4, 0), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(order(8, 4, 1), [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(order(12, 2, 1), [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]);
        assert_eq!(order(8, 2, 2), [0, 2, 4, 6, 1, 3, 5, 7]);
    }
}
