//! The low-rank normal form, and how it runs: one fused product, or plain tensor operations where dropout or factors per
//! rank stand between.
//!
//! Equation: y = g * (W x + s * B (c * (A x)))
//! Shapes:   x [.., d_in] -> y [.., d_out]; A [R, d_in], B [d_out, R], s scalar, c `[R]` per rank, g `[d_out]` per output
//! Source:   LoRA arXiv 2106.09685 eq. 3; the gain g as in DoRA arXiv 2402.09353 eq. 5
//! Cost:     2 R (d_in + d_out) FLOPs a token forward, twice that backward

use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::low_rank::low_rank_linear;

use crate::Result;

/// Factors g `[d_out]` per output.
#[derive(Debug, Clone)]
pub enum Gain {
    /// These values.
    Values(Tensor),
    /// A magnitude `[d_out]` over the norm of each row of W' + s B A, which has no gradient (DoRA).
    OverNorm {
        /// The magnitude.
        magnitude: Tensor,
        /// |W'|^2 by row `[d_out]`, W' the residual where there is one.
        square: Tensor,
    },
}

/// A method's change written as scale, B, A and gains, so that fused kernels and merging need to know no method.
#[derive(Debug, Clone)]
pub struct LowRankView {
    /// A [R, d_in].
    pub a: Tensor,
    /// B [d_out, R].
    pub b: Tensor,
    /// Factor s on the whole product.
    pub scale: f64,
    /// Factors c `[R]` per rank.
    pub rank_scale: Option<Tensor>,
    /// Factors g `[d_out]` per output, on base and product alike.
    pub gain: Option<Gain>,
    /// A frozen weight used in place of the base (initialisations that move a part of the base into the adapter).
    pub residual: Option<Arc<FrozenWeight>>,
}

impl LowRankView {
    /// scale * B A, from trained tensors or from what was made of them on the tape.
    pub fn new(a: &Tensor, b: &Tensor, scale: f64) -> Self {
        Self { a: a.clone(), b: b.clone(), scale, rank_scale: None, gain: None, residual: None }
    }

    /// With factors per rank.
    #[must_use]
    pub fn rank_scale(mut self, scale: &Tensor) -> Self {
        self.rank_scale = Some(scale.clone());
        self
    }

    /// With factors per output.
    #[must_use]
    pub fn gain(mut self, gain: Gain) -> Self {
        self.gain = Some(gain);
        self
    }

    /// With another frozen weight in place of the base.
    #[must_use]
    pub fn residual(mut self, weight: Option<&Arc<FrozenWeight>>) -> Self {
        self.residual = weight.cloned();
        self
    }

    /// The frozen weight that the product is added to: the residual where there is one, else `base`.
    pub fn start<'a>(&'a self, base: &'a Arc<FrozenWeight>) -> &'a Arc<FrozenWeight> {
        self.residual.as_ref().unwrap_or(base)
    }

    /// The values of the gain, where there is one.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn gains(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        Ok(match &self.gain {
            None => None,
            Some(Gain::Values(values)) => Some(values.clone()),
            Some(Gain::OverNorm { magnitude, square }) => {
                let norm = self.row_norms(self.start(base), square)?;
                Some(magnitude.div(&norm.to_dtype(magnitude.dtype())?)?)
            }
        })
    }

    /// |W + s B A| by row `[d_out]` in f64, off the tape, from |W|^2: by |w_i|^2 + 2 s <(W A^T)_i, b_i> + s^2 <b_i (A A^T), b_i>.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn row_norms(&self, weight: &Arc<FrozenWeight>, square: &Tensor) -> Result<Tensor> {
        let a = self.a.detach();
        let b = self.b.detach().to_dtype(DType::F64)?;
        let wa = weight.forward(&a)?.t()?.to_dtype(DType::F64)?;
        let cross = (wa * &b)?.sum(D::Minus1)?;
        let a = a.to_dtype(DType::F64)?;
        let gram = a.matmul(&a.t()?)?;
        let own = (b.matmul(&gram)? * &b)?.sum(D::Minus1)?;
        let change = ((cross * (2.0 * self.scale))? + (own * (self.scale * self.scale))?)?;
        Ok((square.to_dtype(DType::F64)? + change)?.maximum(0.0)?.sqrt()?)
    }

    /// The product's part s * B (c * (A x)), in the dtype of `a`; `x` [.., d_in] -> [.., d_out].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(self.a.dtype())?;
        let (rows, shape) = flatten(&x)?;
        let mut inner = rows.matmul(&self.a.t()?)?;
        if let Some(c) = &self.rank_scale {
            inner = inner.broadcast_mul(c)?;
        }
        if self.scale != 1.0 {
            inner = (inner * self.scale)?;
        }
        let out = inner.matmul(&self.b.t()?)?;
        unflatten(&out, &shape)
    }

    /// The product's part for one-hot inputs, s * B (c * A[:, id]) for each of `ids` `[n]`: [n, d_out] in the dtype of `a`.
    ///
    /// # Errors
    /// If an id is outside A.
    pub fn lookup(&self, ids: &Tensor) -> Result<Tensor> {
        let inner = self.a.t()?.contiguous()?.index_select(ids, 0)?;
        let inner = match &self.rank_scale {
            Some(c) => inner.broadcast_mul(c)?,
            None => inner,
        };
        Ok((inner.matmul(&self.b.t()?)? * self.scale)?)
    }

    /// Adapted output for `x` [.., d_in]; `dropped` is the input of the product where dropout made it another. One fused
    /// product where the form allows it.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, dropped: Option<&Tensor>) -> Result<Tensor> {
        let base = self.start(base);
        let sum = match (dropped, &self.rank_scale) {
            (None, None) => low_rank_linear(base, x, &self.a, &self.b, self.scale)?,
            (dropped, _) => {
                let y = base.forward(x)?;
                (y.to_dtype(self.a.dtype())? + self.product(dropped.unwrap_or(x))?)?
            }
        };
        let sum = match self.gains(base)? {
            Some(gain) => sum.to_dtype(gain.dtype())?.broadcast_mul(&gain)?,
            None => sum,
        };
        Ok(sum.to_dtype(x.dtype())?)
    }

    /// s * B diag(c) A [d_out, d_in] in `dtype`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn dense_product(&self, dtype: DType) -> Result<Tensor> {
        let a = self.a.detach().to_dtype(dtype)?;
        let b = self.b.detach().to_dtype(dtype)?;
        let b = match &self.rank_scale {
            Some(c) => b.broadcast_mul(&c.detach().to_dtype(dtype)?)?,
            None => b,
        };
        Ok((b.matmul(&a)? * self.scale)?)
    }

    /// ΔW [d_out, d_in] in f32 relative to `base`: g * (W' + product) - W, with W' the residual where there is one.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Tensor> {
        let product = self.dense_product(DType::F32)?;
        if self.gain.is_none() && self.residual.is_none() {
            return Ok(product);
        }
        let original = base.dequantize(DType::F32)?;
        let start = match &self.residual {
            Some(residual) => residual.dequantize(DType::F32)?,
            None => original.clone(),
        };
        let mut adapted = (start + product)?;
        if let Some(gain) = self.gains(base)? {
            adapted = adapted.broadcast_mul(&gain.detach().to_dtype(DType::F32)?.unsqueeze(1)?)?;
        }
        Ok((adapted - original)?)
    }
}

/// `x` [.., n] as [rows, n], and its leading shape.
///
/// # Errors
/// If the device refuses.
pub fn flatten(x: &Tensor) -> Result<(Tensor, Vec<usize>)> {
    let dims = x.dims();
    let last = dims.last().copied().unwrap_or(1);
    let rows = dims[..dims.len().saturating_sub(1)].iter().product::<usize>();
    Ok((x.reshape((rows, last))?, dims[..dims.len().saturating_sub(1)].to_vec()))
}

/// The reverse of [`flatten`] with another last dimension.
pub(crate) fn unflatten(x: &Tensor, leading: &[usize]) -> Result<Tensor> {
    let mut dims = leading.to_vec();
    dims.push(x.dim(1)?);
    Ok(x.reshape(dims)?)
}
