//! Dense weights on CUDA devices: their products, and laying them together.

use super::FrozenWeight;
use super::bordered::{BORDER, Bordered, Whole};
use crate::cuda::product::{Operand, Out, multiply};
use crate::cuda::{Gpu, View, address_of, launch_with, matrix, rows};
use candle_core::{CudaStorage, DType, Device, Layout, Result, Shape, Tensor, bail};
use half::bf16;
use std::sync::{Arc, Mutex};

/// See [`FrozenWeight::lay_together`].
pub(super) fn lay_together(weights: &[&FrozenWeight]) -> Result<Option<Vec<FrozenWeight>>> {
    let dense: Option<Vec<&Tensor>> = weights.iter().map(|w| w.as_dense()).collect();
    let Some(dense) = dense.filter(|all| {
        all.iter().all(|w| w.device().is_cuda() && w.dtype() == DType::BF16 && w.dims()[1..] == all[0].dims()[1..])
    }) else {
        return Ok(None);
    };
    let Some(first) = dense.first() else { return Ok(None) };
    let (d_in, d_out) = (first.dim(1)?, dense.iter().map(|w| w.dims()[0]).sum::<usize>());
    let values = Tensor::zeros((d_out + BORDER, d_in + BORDER), DType::BF16, first.device())?;
    let whole = Arc::new(Whole { values, d_out, holds: Mutex::new(0) });
    let gpu = Gpu::of(first.device())?;
    let mut at = 0;
    let place = |weight: &Tensor| {
        let rows_of_it = weight.dim(0)?;
        let view = whole.values.narrow(0, at, rows_of_it)?.narrow(1, 0, d_in)?;
        rows::affine(&gpu, matrix(weight)?, None, None, None, matrix(&view)?, (rows_of_it, d_in))?;
        at += rows_of_it;
        Ok(FrozenWeight::Bordered(Bordered { weight: view, whole: whole.clone(), first: at - rows_of_it }))
    };
    dense.into_iter().map(place).collect::<Result<Vec<_>>>().map(Some)
}

/// x W^T for rows x [n, d_in], or x W for rows x [n, d_out] if `transposed`.
pub(super) fn product(
    weight: &FrozenWeight,
    x: &CudaStorage,
    layout: &Layout,
    transposed: bool,
) -> Result<(CudaStorage, Shape)> {
    let (gpu, n) = (Gpu::of(&Device::Cuda(x.device.clone()))?, layout.shape().dims2()?.0);
    let Some(dense) = weight.as_dense() else { bail!("a product on a device with a weight that is not dense") };
    let (d_out, d_in) = weight.dims();
    let (from, to) = if transposed { (d_out, d_in) } else { (d_in, d_out) };
    let y = gpu.alloc::<bf16>(n * to)?;
    let x = Operand { view: View::new(address_of::<bf16>(x, layout)?, from), transposed: false };
    let w = Operand { view: matrix(dense)?, transposed: !transposed };
    multiply(&gpu, (n, to, from), x, w, Out::Bf16(View::new(gpu.address(&y), to)), None, 1.0)?;
    Ok((CudaStorage::wrap_cuda_slice(y, gpu.device.clone()), Shape::from((n, to))))
}

/// |w_i|^2 of the rows of `weight` [d_out, d_in], f32 `[d_out]`.
pub(super) fn row_squares(weight: &Tensor) -> Result<Tensor> {
    let (gpu, (d_out, d_in)) = (Gpu::of(weight.device())?, weight.dims2()?);
    let (view, squares) = (matrix(weight)?, gpu.alloc::<f32>(d_out)?);
    let grid = ((d_out.div_ceil(8), 1, 1), 256, 0);
    launch_with!(&gpu, "low_rank_row_squares", grid, view.at, view.stride, gpu.address(&squares), d_out, d_in)?;
    Ok(gpu.tensor(squares, &[d_out]))
}
