//! A frozen product and a trained low-rank product beside it, in one pass.
//!
//! Equation: y = W x + s B (A x)
//! Shapes:   x [.., d_in] -> y [.., d_out] in x's dtype; W [d_out, d_in] frozen; A [R, d_in], B [d_out, R] in f32
//! Source:   arXiv 2106.09685 eq. 3; backward as arXiv 2510.00206 section 3: only A x [.., R] is kept
//! Cost:     2 d_in d_out + 2 R (d_in + d_out) FLOPs a row forward; 2 d_in d_out + 4 R (d_in + d_out) backward

mod cpu;
pub mod reference;

use crate::frozen::FrozenWeight;
use crate::fused;
use candle_core::{DType, Result, Tensor, bail};
use std::sync::Arc;

/// W x + scale * B (A x) for x [.., d_in], A [R, d_in], B [d_out, R]; gradients for x, A and B.
pub fn low_rank_linear(weight: &Arc<FrozenWeight>, x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (d_out, d_in) = (weight.d_out(), weight.d_in());
    let rank = a.dims().first().copied().unwrap_or(0);
    if x.dims().last() != Some(&d_in) || a.dims() != [rank, d_in] || b.dims() != [d_out, rank] {
        bail!(
            "low_rank_linear: x {:?}, A {:?}, B {:?} do not fit a weight [{d_out}, {d_in}]",
            x.dims(),
            a.dims(),
            b.dims()
        )
    }
    let factors = [a, b].iter().all(|t| t.dtype() == DType::F32 && t.device().is_cpu());
    if !(fused(x) && factors && rank > 0) {
        return reference::low_rank_linear(weight, x, a, b, scale);
    }
    let rows = x.elem_count() / d_in.max(1);
    let op = cpu::LowRankLinear::new(weight.clone(), scale as f32);
    let y = x.reshape((rows, d_in))?.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op)?;
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = d_out;
    }
    y.reshape(dims)
}
