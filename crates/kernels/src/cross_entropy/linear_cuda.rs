//! The output projection and the loss as one operation on a CUDA device, in bf16: scores become their own gradient in place.

use super::cuda::in_place;
use super::linear::LinearCrossEntropy;
use crate::cuda::product::{Operand, Out, multiply};
use crate::cuda::{Gpu, View, address, address_of, rows::scale_rows};
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaStorage, Device, Layout, Result, Shape, Tensor, bail};
use half::bf16;

impl LinearCrossEntropy {
    pub(super) fn forward_on(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::of(&Device::Cuda(x.device.clone()))?;
        let ((v, h), n) = (self.weight.dims(), self.labels.len());
        let Some(weight) = self.weight.as_dense() else { bail!("linear-cross-entropy: the projection is not dense") };
        let labels = Tensor::from_slice(&self.labels, n, &Device::Cuda(gpu.device.clone()))?;
        let (scores, losses) = (gpu.alloc::<bf16>(n * v)?, gpu.alloc::<f32>(n)?);
        let scores_view = View::new(gpu.address(&scores), v);
        let x = Operand { view: View::new(address_of::<bf16>(x, layout)?, h), transposed: false };
        let weight = View::new(address::<bf16>(weight)?, h);
        let turned = Operand { view: weight, transposed: true };
        multiply(&gpu, (n, v, h), x, turned, Out::Bf16(scores_view), None, 1.0)?;
        let labels = address::<u32>(&labels)?;
        in_place(&gpu, scores_view, labels, gpu.address(&losses), 1.0, self.wants_gradient, (n, v))?;
        if self.wants_gradient {
            let dx = gpu.alloc::<bf16>(n * h)?;
            let slopes = Operand { view: scores_view, transposed: false };
            let weight = Operand { view: weight, transposed: false };
            multiply(&gpu, (n, h, v), slopes, weight, Out::Bf16(View::new(gpu.address(&dx), h)), None, 1.0)?;
            let _ = self.gradient.set(Box::new(dx));
        }
        Ok((CudaStorage::wrap_cuda_slice(losses, gpu.device.clone()), Shape::from(n)))
    }

    /// The gradient of x [n, h] for `g` `[n]` of the losses.
    pub(super) fn backward_on(&self, x: &Tensor, g: &Tensor) -> Result<Tensor> {
        let (gpu, (n, h)) = (Gpu::of(x.device())?, x.dims2()?);
        let Some(unit) = self.gradient.get().and_then(|d| d.downcast_ref::<CudaSlice<bf16>>()) else {
            bail!("linear-cross-entropy: the forward pass was told that no gradient is wanted")
        };
        let dx = gpu.alloc::<bf16>(n * h)?;
        let (from, to) = (View::new(gpu.address(unit), h), View::new(gpu.address(&dx), h));
        scale_rows(&gpu, from, address::<f32>(g)?, to, (n, h))?;
        Ok(gpu.tensor(dx, x.dims()))
    }
}
