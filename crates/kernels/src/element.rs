//! The storage types of the fused kernels: f32, bf16 and f16, all computed on as f32 and rounded once when stored.

use crate::vector;
use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::borrow::Cow;

/// A storage type of the fused kernels.
pub(crate) trait Element: WithDType {
    /// `dst` <- `src`, widened.
    fn load(src: &[Self], dst: &mut [f32]);
    /// `dst` <- `src`, rounded to nearest.
    fn store(src: &[f32], dst: &mut [Self]);
    /// Scratch that `view` and `write` need for slices of up to `len` entries.
    fn scratch(len: usize) -> Vec<f32> {
        vec![0.0; len]
    }
    /// `src` as f32: itself, or widened into `scratch`.
    fn view<'a>(src: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..src.len()];
        Self::load(src, scratch);
        scratch
    }
    /// Lets `fill` write f32 values that end up, rounded, in `dst`.
    fn write(dst: &mut [Self], scratch: &mut [f32], fill: impl FnOnce(&mut [f32])) {
        let scratch = &mut scratch[..dst.len()];
        fill(scratch);
        Self::store(scratch, dst);
    }
    /// The whole of `src` as f32, borrowed where it is f32 already.
    fn widened(src: &[Self]) -> Cow<'_, [f32]> {
        let mut out = vec![0.0; src.len()];
        crate::parallel::chunks(&mut out, 1 << 14, src.len(), |i, dst| Self::load(&src[i << 14..][..dst.len()], dst));
        Cow::Owned(out)
    }
    /// `src` rounded to the storage type.
    fn narrowed(src: Vec<f32>) -> Vec<Self> {
        let mut out = zeros::<Self>(src.len());
        let n = src.len();
        crate::parallel::chunks(&mut out, 1 << 14, n, |i, dst| Self::store(&src[i << 14..][..dst.len()], dst));
        out
    }
}

impl Element for f32 {
    fn load(src: &[Self], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    fn store(src: &[f32], dst: &mut [Self]) {
        dst.copy_from_slice(src);
    }
    fn scratch(_: usize) -> Vec<f32> {
        Vec::new()
    }
    fn view<'a>(src: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        src
    }
    fn write(dst: &mut [Self], _: &mut [f32], fill: impl FnOnce(&mut [f32])) {
        fill(dst);
    }
    fn widened(src: &[Self]) -> Cow<'_, [f32]> {
        Cow::Borrowed(src)
    }
    fn narrowed(src: Vec<f32>) -> Vec<Self> {
        src
    }
}

impl Element for bf16 {
    fn load(src: &[Self], dst: &mut [f32]) {
        vector::from_bf16(src.reinterpret_cast(), dst);
    }
    fn store(src: &[f32], dst: &mut [Self]) {
        vector::to_bf16(src, dst.reinterpret_cast_mut());
    }
}

impl Element for f16 {
    fn load(src: &[Self], dst: &mut [f32]) {
        src.convert_to_f32_slice(dst);
    }
    fn store(src: &[f32], dst: &mut [Self]) {
        dst.convert_from_f32_slice(src);
    }
}

/// `len` zeros.
pub(crate) fn zeros<T: WithDType>(len: usize) -> Vec<T> {
    vec![T::from_f64(0.0); len]
}

/// The entries of a contiguous CPU tensor.
pub(crate) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        // A view of nothing may start past the end.
        Some((start, end)) if start == end => Ok(&[]),
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => bail!("kernel given a strided tensor of shape {:?}: call contiguous() first", layout.shape()),
    }
}

/// The same, from the storage of a tensor.
pub(crate) fn cpu_slice<'a, T: WithDType>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    match storage {
        Storage::Cpu(storage) => slice(storage, layout),
        _ => bail!("CPU kernel given a tensor on another device, shape {:?}", layout.shape()),
    }
}

/// A tensor of `like`'s shape from values.
pub(crate) fn tensor_like<T: WithDType>(values: Vec<T>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), like.device())
}

/// Runs an expression with `$T` bound to the element type of a dtype.
macro_rules! by_dtype {
    ($dtype:expr, $op:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            other => candle_core::bail!("{}: the fused CPU kernel takes f32, bf16 or f16, found {other:?}", $op),
        }
    };
}
pub(crate) use by_dtype;
