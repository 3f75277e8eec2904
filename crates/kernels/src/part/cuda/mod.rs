//! The parts on CUDA devices, in bf16 with f32 sums: the kernels of each operation around cuBLASLt's products.
//!
//! Everything is launched on the device's stream without waiting for it. Sums over tokens are in f32; dq is added up in the
//! order in which tiles of keys finish, so the last bits of gradients may differ from run to run.

mod attention;
mod feed_forward;
mod group;

use super::PartNorm;
use crate::cuda::{Gpu, View, address_of, rows};
use crate::frozen::BORDER;
use crate::norm::cuda::{Kind, Norm};
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaStorage, DType, Layout, Result, Tensor};
use half::bf16;
use std::sync::atomic::{AtomicU64, Ordering};

/// A matrix of bf16 that a kernel wrote.
pub(super) struct Rows {
    data: CudaSlice<bf16>,
    at: u64,
    stride: usize,
    border: bool,
}

/// Rows that a group reads, and whether each goes on with [`BORDER`] values that the group may write.
#[derive(Debug, Clone, Copy)]
pub(in crate::part) struct Input {
    pub(in crate::part) view: View,
    pub(in crate::part) border: bool,
}

impl Input {
    fn plain(view: View) -> Self {
        Self { view, border: false }
    }
}

impl Rows {
    /// Room for [n, columns].
    pub(super) fn new(gpu: &Gpu, n: usize, columns: usize) -> Result<Self> {
        let data = gpu.alloc::<bf16>(n * columns)?;
        Ok(Self { at: gpu.address(&data), data, stride: columns, border: false })
    }

    /// Room for [n, columns] and a border.
    fn bordered(gpu: &Gpu, n: usize, columns: usize) -> Result<Self> {
        Ok(Self { border: true, ..Self::new(gpu, n, columns + BORDER)? })
    }

    pub(super) fn view(&self) -> View {
        View::new(self.at, self.stride)
    }

    pub(super) fn input(&self) -> Input {
        Input { view: self.view(), border: self.border }
    }

    /// As a tensor [b, t, h] without the border.
    pub(super) fn into_tensor(self, gpu: &Gpu, (b, t, h): (usize, usize, usize)) -> Result<Tensor> {
        gpu.tensor(self.data, &[b, t, self.stride]).narrow(2, 0, h)
    }

    pub(super) fn into_data(self) -> CudaSlice<bf16> {
        self.data
    }
}

/// The flat parameters of a part: as they are, and as the products read them. The tensor they come from must outlive it.
pub(super) struct Flat {
    values: u64,
    rounded: Rows,
    /// Another number for each: tells whose factors are in a border.
    id: u64,
}

impl Flat {
    /// Rounds contiguous f32 values.
    pub(super) fn new(gpu: &Gpu, storage: &CudaStorage, layout: &Layout) -> Result<Self> {
        let (n, values) = (layout.shape().elem_count(), address_of::<f32>(storage, layout)?);
        let rounded = Rows::new(gpu, 1, n)?;
        rows::to_bf16(gpu, values, rounded.at, n)?;
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Ok(Self { values, rounded, id: NEXT.fetch_add(1, Ordering::Relaxed) })
    }

    /// Address of the value at `index` in f32.
    fn exact(&self, index: usize) -> u64 {
        self.values + (index * size_of::<f32>()) as u64
    }

    /// The matrix with rows of `columns` that begins at `index`, in bf16.
    fn matrix(&self, index: usize, columns: usize) -> View {
        View::new(self.rounded.at + (index * size_of::<bf16>()) as u64, columns)
    }
}

/// A part on a CUDA device.
pub(super) trait OnDevice {
    /// What a forward pass keeps.
    type Kept: Send + Sync + 'static;
    /// Whether the kernels handle rows of that size (b, t).
    fn supports(&self, gpu: &Gpu, size: (usize, usize)) -> bool;
    /// The result [b * t, h].
    fn forward_on(&self, gpu: &Gpu, x: View, flat: &Flat, size: (usize, usize)) -> Result<(Rows, Self::Kept)>;
    /// The gradient of x if it is wanted; those of the parameters are added to zeros.
    fn backward_on(&self, gpu: &Gpu, kept: &Self::Kept, back: &BackOn<'_>) -> Result<Option<Rows>>;
}

/// What a backward pass on a device has.
pub(super) struct BackOn<'a> {
    pub(super) x: View,
    pub(super) g: Input,
    pub(super) flat: &'a Flat,
    /// b and t.
    pub(super) size: (usize, usize),
    /// Address of zeros for the gradients of the parameters, in f32.
    pub(super) d_parameters: Option<u64>,
    /// Whether the gradient of x is wanted.
    pub(super) wants_x: bool,
}

impl PartNorm {
    fn on_device(&self) -> Norm<'_> {
        match self {
            Self::Rms { weight, eps, offset } => {
                Norm { kind: Kind::Rms { offset: *offset }, weight, bias: None, eps: *eps }
            }
            Self::Layer { weight, bias, eps } => Norm { kind: Kind::Layer, weight, bias: Some(bias), eps: *eps },
        }
    }
}

/// The rows [n, h] that the projections read: those of `x` after the norm, and what holds them.
fn normed(gpu: &Gpu, norm: Option<&PartNorm>, x: View, (n, h): (usize, usize)) -> Result<(Input, Option<Rows>)> {
    let Some(norm) = norm else { return Ok((Input::plain(x), None)) };
    let rows = Rows::bordered(gpu, n, h)?;
    crate::norm::cuda::forward(gpu, &norm.on_device(), x, rows.view(), (n, h))?;
    Ok((rows.input(), Some(rows)))
}

/// The gradient of a part's input from that of its normalised rows and, through the residual sum, of its result; with a border
/// after a norm.
fn finish(
    gpu: &Gpu,
    norm: Option<&PartNorm>,
    (x, d_rows): (View, Rows),
    residual: Option<View>,
    (n, h): (usize, usize),
) -> Result<Rows> {
    match (norm, residual) {
        (Some(norm), beside) => {
            let dx = Rows::bordered(gpu, n, h)?;
            crate::norm::cuda::backward(gpu, &norm.on_device(), x, d_rows.view(), beside, dx.view(), (n, h))?;
            Ok(dx)
        }
        (None, None) => Ok(d_rows),
        (None, Some(g)) => {
            let view = d_rows.view();
            rows::affine(gpu, view, None, None, Some(g), view, (n, h))?;
            Ok(d_rows)
        }
    }
}

/// A frozen vector in f32.
fn exact(vector: &Tensor) -> Result<Tensor> {
    vector.to_dtype(DType::F32)?.flatten_all()?.contiguous()
}
