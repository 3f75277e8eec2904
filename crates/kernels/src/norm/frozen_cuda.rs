//! Norms with frozen gains as operations on a CUDA device, in bf16.

use super::cuda::{Kind, Norm, backward, forward};
use crate::cuda::{Gpu, View, address, address_of};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use half::bf16;

/// A norm whose gain and shift have no gradient.
pub(super) struct FrozenNorm {
    pub(super) kind: Kind,
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
    pub(super) eps: f64,
}

impl FrozenNorm {
    fn norm(&self) -> Norm<'_> {
        Norm { kind: self.kind, weight: &self.weight, bias: self.bias.as_ref(), eps: self.eps }
    }
}

impl CustomOp1 for FrozenNorm {
    fn name(&self) -> &'static str {
        "frozen-norm"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("frozen-norm: made for a CUDA device, given a tensor on the CPU")
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let gpu = Gpu::of(&Device::Cuda(x.device.clone()))?;
        let h = self.weight.elem_count();
        let n = layout.shape().elem_count() / h.max(1);
        let y = gpu.alloc::<bf16>(n * h)?;
        let (from, to) = (View::new(address_of::<bf16>(x, layout)?, h), View::new(gpu.address(&y), h));
        forward(&gpu, &self.norm(), from, to, (n, h))?;
        Ok((CudaStorage::wrap_cuda_slice(y, gpu.device.clone()), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let (gpu, g) = (Gpu::of(x.device())?, g.contiguous()?);
        let h = self.weight.elem_count();
        let n = x.elem_count() / h.max(1);
        let dx = gpu.alloc::<bf16>(n * h)?;
        let view = |at| View::new(at, h);
        let (from, g, to) = (view(address::<bf16>(x)?), view(address::<bf16>(&g)?), view(gpu.address(&dx)));
        backward(&gpu, &self.norm(), from, g, None, to, (n, h))?;
        Ok(Some(gpu.tensor(dx, x.dims())))
    }
}
