//! Attention of equal numbers of queries and keys on CUDA devices of compute capability 9: `cuda/kernels/attention.cu`.

use super::{AttentionSpec, Dims, Segments};
use crate::cuda::rows::aligned;
use crate::cuda::{Gpu, View, address, launch_with};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, sys};
use candle_core::{DType, Device, Result, Tensor};
use half::bf16;
use std::ffi::c_void;

/// Keys of a tile; rows of log-sums are padded to a multiple.
const KEYS: usize = 128;

/// Whether the kernels handle attention of these sizes on this device.
pub(crate) fn supports(gpu: &Gpu, dims: &Dims, spec: &AttentionSpec) -> bool {
    gpu.capability == 90
        && dims.tq == dims.tk
        && dims.d == dims.dv
        && matches!(dims.d, 64 | 128)
        && spec.softcap.is_none()
        && spec.segments.as_deref().is_none_or(|s| s.query == s.key)
        && i32::try_from(dims.b * dims.tq).is_ok()
}

/// [`super::attention`] of tensors off the tape; None where the kernels do not handle it.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    dims: &Dims,
    spec: &AttentionSpec,
) -> Result<Option<Tensor>> {
    let plain = |t: &&Tensor| t.device().is_cuda() && t.dtype() == DType::BF16 && !t.track_op();
    if ![q, k, v].iter().all(plain) || dims.b * dims.tq == 0 {
        return Ok(None);
    }
    let gpu = Gpu::of(q.device())?;
    if !supports(&gpu, dims, spec) {
        return Ok(None);
    }
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let rows = |t: &Tensor, heads: usize| Ok::<_, candle_core::Error>(View::new(address::<bf16>(t)?, heads * dims.d));
    let views = Views { q: rows(&q, dims.h)?, k: rows(&k, dims.kv)?, v: rows(&v, dims.kv)? };
    if !aligned(&[views.q, views.k, views.v]) {
        return Ok(None);
    }
    let out = gpu.tensor(gpu.alloc::<bf16>(q.elem_count())?, q.dims());
    forward(&gpu, dims, spec, views, rows(&out, dims.h)?)?;
    Ok(Some(out))
}

/// Queries, keys and values: rows of b * t, heads side by side in each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Views {
    pub(crate) q: View,
    pub(crate) k: View,
    pub(crate) v: View,
}

/// What the kernels take of a specification.
struct Arguments {
    causal: bool,
    window: i32,
    segments: u64,
    padded: usize,
}

impl Arguments {
    fn of(gpu: &Gpu, dims: &Dims, spec: &AttentionSpec) -> Result<Self> {
        let segments = spec.segments.as_deref().map(|s| s.on(&Device::Cuda(gpu.device.clone()))).transpose()?;
        let segments = segments.map(|s| address::<u32>(&s)).transpose()?;
        let window = spec.window.map_or(0, |w| i32::try_from(w).unwrap_or(i32::MAX / 2).min(i32::MAX / 2));
        Ok(Self {
            causal: spec.causal,
            window,
            segments: segments.unwrap_or(0),
            padded: dims.tq.next_multiple_of(KEYS),
        })
    }
}

impl Segments {
    /// The ids of the queries on a device, uploaded once.
    fn on(&self, device: &Device) -> Result<Tensor> {
        if let Some(ids) = self.uploaded.get().filter(|ids| ids.device().same_device(device)) {
            return Ok(ids.clone());
        }
        let ids = Tensor::from_slice(&self.query, self.query.len(), device)?;
        let _ = self.uploaded.set(ids.clone());
        Ok(ids)
    }
}

/// The attention's output into `out`; the log-sums [b, h, padded] are kept for the way back.
pub(crate) fn forward(gpu: &Gpu, dims: &Dims, spec: &AttentionSpec, x: Views, out: View) -> Result<CudaSlice<f32>> {
    let Dims { b, tq: t, h, kv, d, .. } = *dims;
    let a = Arguments::of(gpu, dims, spec)?;
    let log_sums = gpu.alloc::<f32>(b * h * a.padded)?;
    // Query rows of a tile, and what `ForwardShared` takes.
    let queries = if d == 64 { 192 } else { 128 };
    let shared = (queries + 4 * KEYS) * d * 2 + 128;
    let map_q = map(x.q, dims, h, queries)?;
    let (map_k, map_v) = (map(x.k, dims, kv, KEYS)?, map(x.v, dims, kv, KEYS)?);
    let grid = ((h * b, t.div_ceil(queries), 1), if d == 64 { 512 } else { 384 }, shared);
    let sums = gpu.address(&log_sums);
    let name = if d == 64 { "attention_forward_64" } else { "attention_forward_128" };
    launch_with!(
        gpu, name, grid, map_q, map_k, map_v, out.at, out.stride, sums, t, a.padded, h, kv, spec.scale, a.causal,
        a.window, a.segments
    )?;
    Ok(log_sums)
}

/// The gradients of `x` into `dx` for those of the output, `g`; rows of `dx` are of one stride.
pub(crate) fn backward(
    gpu: &Gpu,
    dims: &Dims,
    spec: &AttentionSpec,
    x: Views,
    (out, log_sums): (View, &CudaSlice<f32>),
    g: View,
    dx: Views,
) -> Result<()> {
    let Dims { b, tq: t, h, kv, d, .. } = *dims;
    let a = Arguments::of(gpu, dims, spec)?;
    let sums = gpu.address(log_sums);
    let delta = gpu.alloc::<f32>(b * h * a.padded)?;
    let delta_at = gpu.address(&delta);
    let rows = (((a.padded * h * d / 8).div_ceil(256), b, 1), 256, 0);
    launch_with!(gpu, "attention_delta", rows, g.at, g.stride, out.at, out.stride, delta_at, sums, t, a.padded, h, d)?;
    let dq = gpu.zeros::<f32>(b * h * a.padded * d)?;
    let dq_at = gpu.address(&dq);
    let queries = if d == 64 { 128 } else { 64 };
    let shared = (2 * KEYS + 4 * queries) * d * 2 + 6 * KEYS * queries + 2 * 64 * 64 * 4 + 4 * queries * 4 + 64;
    let (map_q, map_g) = (map(x.q, dims, h, queries)?, map(g, dims, h, queries)?);
    let (map_k, map_v) = (map(x.k, dims, kv, KEYS)?, map(x.v, dims, kv, KEYS)?);
    let grid = ((kv * b, t.div_ceil(KEYS), 1), 384, shared);
    let name = if d == 64 { "attention_backward_64" } else { "attention_backward_128" };
    launch_with!(
        gpu,
        name,
        grid,
        map_q,
        map_k,
        map_v,
        map_g,
        sums,
        delta_at,
        dq_at,
        dx.k.at,
        dx.v.at,
        dx.k.stride,
        t,
        a.padded,
        h,
        kv,
        spec.scale,
        a.causal,
        a.window,
        a.segments
    )?;
    let tiles = ((a.padded * d / 4096 * 2, h, b), 512, 0);
    launch_with!(gpu, "attention_dq", tiles, dq_at, dx.q.at, dx.q.stride, t, a.padded, h, d, spec.scale)
}

/// A map over rows of [b, t, heads, d] that brings 64 values of one head for `rows` rows of a sequence.
fn map(view: View, dims: &Dims, heads: usize, rows: usize) -> Result<sys::CUtensorMap> {
    use sys::{
        CUtensorMapDataType_enum as Type, CUtensorMapFloatOOBfill_enum as Fill,
        CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
        CUtensorMapSwizzle_enum as Swizzle,
    };
    let row = (view.stride * size_of::<bf16>()) as u64;
    let sizes = [dims.d, heads, dims.tq, dims.b].map(|n| n as u64);
    let strides = [(dims.d * size_of::<bf16>()) as u64, row, row * dims.tq as u64];
    let (block, steps) = ([64, 1, rows as u32, 1], [1u32; 4]);
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the driver reads the four arrays and writes the map during the call; the address is not read.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            4,
            view.at as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            block.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .w()?;
    Ok(map)
}
