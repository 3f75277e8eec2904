//! 8-bit integers with one scale a row (the weights of LLM.int8).
//!
//! Equation: q_ij = round(w_ij * 127 / absmax_i), half to even; w_ij = q_ij * absmax_i / 127
//! Shapes:   codes [d_out, d_in] i8, absmax `[d_out]` f32
//! Source:   arXiv 2208.07339; bitsandbytes `int8_vectorwise_quant`
//! Cost:     8 bits a weight

use super::{matrix_dims, with_values};
use crate::vector::from_i8;
use candle_core::{DType, Device, Result, Tensor, bail};

/// A matrix [d_out, d_in] of 8-bit integers.
#[derive(Debug, Clone)]
pub struct Int8 {
    d_out: usize,
    d_in: usize,
    codes: Vec<i8>,
    absmax: Vec<f32>,
    device: Device,
    /// Codes + 128 and scales on a device that is not the CPU.
    resident: Option<(Tensor, Tensor)>,
}

impl Int8 {
    /// Rounds `weight` [d_out, d_in] of any float type.
    pub fn quantize(weight: &Tensor) -> Result<Self> {
        let (d_out, d_in) = matrix_dims("int8", weight.dims())?;
        if !weight.dtype().is_float() {
            bail!("int8 weight [{d_out}, {d_in}] is {:?}, expected a float type", weight.dtype())
        }
        let device = weight.device().clone();
        let (codes, absmax) = with_values(weight, |flat| {
            if let Some(at) = flat.iter().position(|w| !w.is_finite()) {
                bail!("int8 weight [{d_out}, {d_in}] is {} at row {}, column {}", flat[at], at / d_in, at % d_in)
            }
            let (mut codes, mut absmax) = (Vec::with_capacity(flat.len()), Vec::with_capacity(d_out));
            for row in flat.chunks(d_in) {
                let top = row.iter().fold(0f32, |m, w| m.max(w.abs()));
                let scale = if top > 0.0 { 127.0 / top } else { 0.0 };
                absmax.push(top);
                codes.extend(row.iter().map(|w| (w * scale).round_ties_even() as i8));
            }
            Ok((codes, absmax))
        })?;
        let resident = if device.is_cpu() {
            None
        } else {
            let shifted: Vec<u8> = codes.iter().map(|c| (i16::from(*c) + 128) as u8).collect();
            let scales: Vec<f32> = absmax.iter().map(|a| a / 127.0).collect();
            Some((Tensor::from_vec(shifted, (d_out, d_in), &device)?, Tensor::from_vec(scales, (d_out, 1), &device)?))
        };
        Ok(Self { d_out, d_in, codes, absmax, device, resident })
    }

    /// (d_out, d_in).
    pub fn dims(&self) -> (usize, usize) {
        (self.d_out, self.d_in)
    }

    /// Where the codes live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of codes and scales.
    pub fn size_in_bytes(&self) -> usize {
        self.codes.len() + 4 * self.absmax.len()
    }

    /// Codes [d_out * d_in] and absmax `[d_out]`.
    pub fn parts(&self) -> (&[i8], &[f32]) {
        (&self.codes, &self.absmax)
    }

    /// The matrix in bf16 on a CUDA device.
    #[cfg(feature = "cuda")]
    pub(super) fn bf16_on_device(&self) -> Result<Tensor> {
        use crate::cuda::{Gpu, View, address};
        let Some((codes, scales)) = &self.resident else {
            bail!("int8 weight [{}, {}] has no copy on {:?}", self.d_out, self.d_in, self.device.location())
        };
        let gpu = Gpu::of(&self.device)?;
        let out = gpu.alloc::<half::bf16>(self.d_out * self.d_in)?;
        let to = View::new(gpu.address(&out), self.d_in);
        super::quantised_cuda::int8(
            &gpu,
            address::<u8>(codes)?,
            address::<f32>(scales)?,
            128,
            to,
            (self.d_out, self.d_in),
        )?;
        Ok(gpu.tensor(out, &[self.d_out, self.d_in]))
    }

    /// The matrix in f32 by candle operations, for devices other than the CPU.
    pub(super) fn on_device(&self) -> Result<Tensor> {
        match &self.resident {
            Some((codes, scales)) => (codes.to_dtype(DType::F32)? - 128.0)?.broadcast_mul(scales),
            None => bail!("int8 weight [{}, {}] has no copy on {:?}", self.d_out, self.d_in, self.device.location()),
        }
    }

    /// Codes of a row, and its scale absmax / 127.
    pub(super) fn row(&self, row: usize) -> (&[i8], f32) {
        (&self.codes[row * self.d_in..][..self.d_in], self.absmax[row] / 127.0)
    }

    /// `dst` <- columns `start..start + dst.len()` of a row.
    pub(super) fn load(&self, row: usize, start: usize, dst: &mut [f32]) {
        let (codes, scale) = self.row(row);
        from_i8(scale, &codes[start..start + dst.len()], dst);
    }
}
