//! A frozen matrix in any storage, multiplied by activations; the weight itself never gets a gradient.
//!
//! Equation: forward y = x W^T; transposed x = y W; the gradient of each is the other
//! Shapes:   W [d_out, d_in], x [.., d_in], y [.., d_out]; results in the input's dtype, rounded once
//! Source:   NF4 and double quantisation arXiv 2305.14314 (QLoRA), int8 arXiv 2208.07339 (LLM.int8), GGUF block types as
//!           in llama.cpp
//! Cost:     2 n d_in d_out FLOPs; stored weights are widened block by block, never as a whole matrix

mod bordered;
mod cpu;
#[cfg(feature = "cuda")]
mod dense_cuda;
mod gguf;
mod int8;
mod nf4;
#[cfg(feature = "cuda")]
mod quantised_cuda;
pub mod reference;

pub use bordered::Bordered;
#[cfg(feature = "cuda")]
pub(crate) use bordered::{BORDER, Whole};
pub use int8::Int8;
pub use nf4::{Nf4, Nf4Parts, dynamic_map, nf4_code_book};

pub(crate) use cpu::{Dots, multiply as multiply_frozen, with_dots, with_operand, with_transposed};

use crate::fused;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Storage, Tensor, bail};
use std::ops::Range;
use std::sync::Arc;

/// A frozen matrix [d_out, d_in].
#[derive(Debug, Clone)]
pub enum FrozenWeight {
    /// f32, f16, bf16 or f64 as it is, contiguous and off the tape.
    Dense(Tensor),
    /// bf16 on a CUDA device, in one piece with the weights beside it.
    Bordered(Bordered),
    /// 4-bit normal floats in blocks of 64.
    Nf4(Nf4),
    /// 8-bit integers with one scale a row.
    Int8(Int8),
    /// A GGUF block type.
    Gguf(Arc<QTensor>),
}

/// d_out and d_in of a matrix, or an error that names its shape.
fn matrix_dims(what: &str, dims: &[usize]) -> Result<(usize, usize)> {
    match dims {
        &[d_out, d_in] if d_out > 0 && d_in > 0 => Ok((d_out, d_in)),
        other => bail!("{what} weight has shape {other:?}, expected a matrix [d_out, d_in]"),
    }
}

/// Calls `f` with the values of `weight` in f32, without a copy where they are that on the CPU already.
fn with_values<T>(weight: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let flat = weight.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = flat.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => f(&storage.as_slice::<f32>()?[start..end]),
        _ => bail!("the values of a weight {:?} are not in one piece", weight.dims()),
    }
}

impl FrozenWeight {
    /// A dense matrix [d_out, d_in] of f32, f16, bf16 or f64; shares `weight`'s storage if that is contiguous.
    pub fn dense(weight: Tensor) -> Result<Self> {
        matrix_dims("dense", weight.dims())?;
        if !matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
            bail!("dense weight is {:?}, expected f32, f16, bf16 or f64", weight.dtype())
        }
        Ok(Self::Dense(weight.detach().contiguous()?))
    }

    /// The shape of a matrix without its values, which nothing may multiply by: a place for a weight that is not loaded.
    pub fn blank(d_out: usize, d_in: usize, dtype: DType) -> Result<Self> {
        matrix_dims("blank", &[d_out, d_in])?;
        Ok(Self::Dense(Tensor::zeros(1, dtype, &Device::Cpu)?.broadcast_as((d_out, d_in))?))
    }

    /// `weight` [d_out, d_in] rounded to 4-bit normal floats; `double_quant` also stores the block scales in 8 bits.
    pub fn nf4(weight: &Tensor, double_quant: bool) -> Result<Self> {
        Nf4::quantize(weight, double_quant).map(Self::Nf4)
    }

    /// `weight` [d_out, d_in] rounded to 8-bit integers, one scale a row.
    pub fn int8(weight: &Tensor) -> Result<Self> {
        Int8::quantize(weight).map(Self::Int8)
    }

    /// `weight` [d_out, d_in] rounded to a block type of GGUF; its rows are whole blocks.
    pub fn gguf_from(weight: &Tensor, dtype: GgmlDType) -> Result<Self> {
        let (d_out, d_in) = matrix_dims("GGUF", weight.dims())?;
        let (name, block) = (gguf::name(dtype), dtype.block_size());
        if !d_in.is_multiple_of(block) {
            bail!("a weight [{d_out}, {d_in}] has no {name} form: its rows of {d_in} are no whole blocks of {block}")
        }
        Self::gguf(Arc::new(QTensor::quantize(&weight.detach().to_dtype(DType::F32)?, dtype)?))
    }

    /// A matrix of a GGUF file.
    pub fn gguf(weight: Arc<QTensor>) -> Result<Self> {
        matrix_dims("GGUF", weight.shape().dims())?;
        Ok(Self::Gguf(weight))
    }

    /// (d_out, d_in).
    pub fn dims(&self) -> (usize, usize) {
        let dims = match self {
            Self::Dense(w) | Self::Bordered(Bordered { weight: w, .. }) => w.dims(),
            Self::Nf4(w) => return w.dims(),
            Self::Int8(w) => return w.dims(),
            Self::Gguf(w) => w.shape().dims(),
        };
        (dims.first().copied().unwrap_or(0), dims.get(1).copied().unwrap_or(0))
    }

    /// Number of outputs (rows).
    pub fn d_out(&self) -> usize {
        self.dims().0
    }

    /// Number of inputs (columns).
    pub fn d_in(&self) -> usize {
        self.dims().1
    }

    /// "f32", "bf16", "nf4", "int8", "q4_0" and so on.
    pub fn dtype_name(&self) -> String {
        match self {
            Self::Dense(w) | Self::Bordered(Bordered { weight: w, .. }) => w.dtype().as_str().to_string(),
            Self::Nf4(_) => "nf4".to_string(),
            Self::Int8(_) => "int8".to_string(),
            Self::Gguf(w) => gguf::name(w.dtype()).to_string(),
        }
    }

    /// Bytes the stored form takes, scales included.
    pub fn size_in_bytes(&self) -> usize {
        match self {
            Self::Dense(w) | Self::Bordered(Bordered { weight: w, .. }) => w.elem_count() * w.dtype().size_in_bytes(),
            Self::Nf4(w) => w.size_in_bytes(),
            Self::Int8(w) => w.size_in_bytes(),
            Self::Gguf(w) => w.storage_size_in_bytes(),
        }
    }

    /// Where the weight lives.
    pub fn device(&self) -> Device {
        match self {
            Self::Dense(w) | Self::Bordered(Bordered { weight: w, .. }) => w.device().clone(),
            Self::Nf4(w) => w.device().clone(),
            Self::Int8(w) => w.device().clone(),
            Self::Gguf(w) => w.device(),
        }
    }

    /// The dense tensor, if stored as one; a view with gaps between its rows if it is [`Self::Bordered`].
    pub fn as_dense(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(w) | Self::Bordered(Bordered { weight: w, .. }) => Some(w),
            _ => None,
        }
    }

    /// Codes and scales, if stored as NF4.
    pub fn nf4_parts(&self) -> Option<Nf4Parts<'_>> {
        match self {
            Self::Nf4(w) => Some(w.parts()),
            _ => None,
        }
    }

    /// Codes [d_out * d_in] and absmax `[d_out]`, if stored as int8.
    pub fn int8_parts(&self) -> Option<(&[i8], &[f32])> {
        match self {
            Self::Int8(w) => Some(w.parts()),
            _ => None,
        }
    }

    /// The matrix [d_out, d_in] in `dtype`, off the tape.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(w) | Self::Bordered(Bordered { weight: w, .. }) => w.to_dtype(dtype),
            #[cfg(feature = "cuda")]
            Self::Nf4(w) if dtype == DType::BF16 && w.device().is_cuda() => w.bf16_on_device(),
            #[cfg(feature = "cuda")]
            Self::Int8(w) if dtype == DType::BF16 && w.device().is_cuda() => w.bf16_on_device(),
            _ if self.device().is_cpu() => cpu::dequantize(self, 0..self.d_out())?.to_dtype(dtype),
            Self::Nf4(w) => w.on_device()?.to_dtype(dtype),
            Self::Int8(w) => w.on_device()?.to_dtype(dtype),
            Self::Gguf(w) => w.dequantize(&w.device())?.to_dtype(dtype),
        }
    }

    /// Rows `rows` of the matrix [n, d_in], off the tape: as they are where they are dense, else in f32.
    pub fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        match self {
            Self::Dense(w) | Self::Bordered(Bordered { weight: w, .. }) => {
                w.narrow(0, rows.start, rows.len())?.contiguous()
            }
            _ if self.device().is_cpu() => cpu::dequantize(self, rows),
            _ => self.dequantize(DType::F32)?.narrow(0, rows.start, rows.len())?.contiguous(),
        }
    }

    /// |W|^2 by row `[d_out]`: in f64, or in f32 for bf16 on a CUDA device.
    pub fn row_squares(&self) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(w) = self.as_dense().filter(|w| w.device().is_cuda() && w.dtype() == DType::BF16) {
            return dense_cuda::row_squares(w);
        }
        self.dequantize(DType::F64)?.sqr()?.sum(candle_core::D::Minus1)
    }

    /// x [.., d_in] W^T: [.., d_out] in x's dtype. Differentiable in x only.
    pub fn forward(self: &Arc<Self>, x: &Tensor) -> Result<Tensor> {
        self.apply("forward", x, false)
    }

    /// y [.., d_out] W: [.., d_in] in y's dtype. Differentiable in y only.
    pub fn forward_transposed(self: &Arc<Self>, y: &Tensor) -> Result<Tensor> {
        self.apply("forward_transposed", y, true)
    }

    /// Whether the weight is stored in bf16 on a CUDA device, and the crate is built for it.
    pub fn is_bf16_on_device(&self) -> bool {
        cfg!(feature = "cuda") && self.as_dense().is_some_and(|w| w.device().is_cuda() && w.dtype() == DType::BF16)
    }

    /// Whether a CUDA device multiplies rows `x` by the weight as it is stored.
    fn runs_on_device(&self, x: &Tensor) -> bool {
        x.device().is_cuda() && x.dtype() == DType::BF16 && self.is_bf16_on_device()
    }

    /// Dense bf16 weights of maps with one input in one piece, with a border for the factors of their adapters; None where they
    /// stay as they are: in another type, or not on a CUDA device.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn lay_together(weights: &[&Self]) -> Result<Option<Vec<Self>>> {
        #[cfg(feature = "cuda")]
        return dense_cuda::lay_together(weights);
        #[cfg(not(feature = "cuda"))]
        {
            let _ = weights;
            Ok(None)
        }
    }

    fn apply(self: &Arc<Self>, what: &str, x: &Tensor, transposed: bool) -> Result<Tensor> {
        let (d_out, d_in) = self.dims();
        let (from, to) = if transposed { (d_out, d_in) } else { (d_in, d_out) };
        let Some((&last, outer)) = x.dims().split_last() else {
            bail!("frozen {what}: input is a scalar, expected [.., {from}] for a weight [{d_out}, {d_in}]")
        };
        if last != from {
            bail!("frozen {what}: input {:?} does not end in {from}, as the weight [{d_out}, {d_in}] needs", x.dims())
        }
        if !x.dtype().is_float() {
            bail!("frozen {what}: input is {:?}, expected a float type", x.dtype())
        }
        if !x.device().same_device(&self.device()) {
            bail!(
                "frozen {what}: input is on {:?}, the weight on {:?}",
                x.device().location(),
                self.device().location()
            )
        }
        let rows: usize = outer.iter().product();
        let shape: Vec<usize> = outer.iter().copied().chain([to]).collect();
        let x = x.reshape((rows, from))?;
        let y = if fused(&x) || self.runs_on_device(&x) {
            x.contiguous()?.apply_op1(cpu::FrozenProduct { weight: self.clone(), transposed })?
        } else if rows == 0 {
            // Keeps an empty product on the tape: candle's matmul refuses it.
            x.sum_keepdim(1)?.broadcast_as((0, to))?
        } else {
            reference::product(self, &x, transposed)?
        };
        y.reshape(shape)
    }
}
