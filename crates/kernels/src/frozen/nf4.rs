//! 4-bit normal floats, block 64, with optional 8-bit scales: bitsandbytes' format and rounding.
//!
//! Equation: w_i = code`[q_i]` * absmax[i / 64] over the flattened matrix; q_i the nearest code of w_i / absmax
//!           double quantisation: absmax_b = map`[s_b]` * absmax2[b / 256] + offset, offset = mean of absmax
//! Shapes:   codes ceil(n / 2) bytes, first value in the high nibble; absmax ceil(n / 64); absmax2 ceil(blocks / 256)
//! Source:   arXiv 2305.14314 appendix E; bitsandbytes functional.py `quantize_4bit`, `create_dynamic_map`
//! Cost:     4.5 bits a weight, 4.127 with double quantisation

use super::{matrix_dims, with_values};
use crate::vector::scale;
use candle_core::{Device, Result, Tensor, bail};
use std::sync::OnceLock;

/// Weights a block.
const BLOCK: usize = 64;
/// Scales a block of the second quantisation.
const BLOCK2: usize = 256;
/// The code of 0.
const ZERO: u8 = 7;

/// The 16 values of a 4-bit normal float, ascending.
static CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// bitsandbytes' decision boundaries: the code of x is the number of boundaries below x.
static BOUNDARIES: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_43,
    -0.234_607_41,
    -0.137_911_73,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_77,
    0.389_312_54,
    0.501_663_4,
    0.642_786_9,
    0.861_478_4,
];

/// The 16 values of a 4-bit normal float, ascending.
pub fn nf4_code_book() -> &'static [f32; 16] {
    &CODE
}

/// The 256 values of bitsandbytes' signed dynamic 8-bit map (`create_dynamic_map(signed=True)`), ascending.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut map = [0f32; 256];
        let mut next = 0;
        // For each of 7 exponents, 2^i fractions spread over [0.1, 1]: the means of neighbouring boundaries.
        for i in 0..7u32 {
            let items = 1usize << i;
            let step = (1.0 - 0.1f32) / items as f32;
            // torch.linspace: forward from the start in the first half, backward from the end in the second.
            let boundary = |j: usize| {
                if j < items.div_ceil(2) { 0.1 + step * j as f32 } else { 1.0 - step * (items - j) as f32 }
            };
            let power = 10f64.powi(i as i32 - 6) as f32;
            for j in 0..items {
                let mean = (boundary(j) + boundary(j + 1)) / 2.0;
                map[next] = power * mean;
                map[next + 1] = -power * mean;
                next += 2;
            }
        }
        map[255] = 1.0; // map[254] stays 0
        map.sort_by(f32::total_cmp);
        map
    })
}

/// The two values of every byte.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODE[byte >> 4], CODE[byte & 15]];
        byte += 1;
    }
    pairs
};

/// Block scales, plain or quantised themselves.
#[derive(Debug, Clone)]
enum Scales {
    Plain(Vec<f32>),
    Double { codes: Vec<u8>, absmax: Vec<f32>, offset: f32 },
}

impl Scales {
    fn quantize(absmax: Vec<f32>) -> Self {
        let mean = absmax.iter().map(|a| f64::from(*a)).sum::<f64>() / absmax.len().max(1) as f64;
        let offset = mean as f32;
        let map = dynamic_map();
        let mut codes = Vec::with_capacity(absmax.len());
        let mut outer = Vec::with_capacity(absmax.len().div_ceil(BLOCK2));
        for block in absmax.chunks(BLOCK2) {
            let top = block.iter().fold(0f32, |m, a| m.max((a - offset).abs()));
            let inverse = if top > 0.0 { 1.0 / top } else { 0.0 };
            outer.push(top);
            codes.extend(block.iter().map(|a| nearest(map, (a - offset) * inverse)));
        }
        Self::Double { codes, absmax: outer, offset }
    }

    #[inline]
    fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[block],
            Self::Double { codes, absmax, offset } => {
                dynamic_map()[codes[block] as usize] * absmax[block / BLOCK2] + offset
            }
        }
    }
}

/// Index of the entry of an ascending map nearest to `x`; the lower one if two are equally near.
fn nearest(map: &[f32; 256], x: f32) -> u8 {
    let above = map.partition_point(|m| *m < x);
    match above {
        0 => 0,
        256 => 255,
        _ if x - map[above - 1] <= map[above] - x => (above - 1) as u8,
        _ => above as u8,
    }
}

/// A matrix [d_out, d_in] of 4-bit normal floats.
#[derive(Debug, Clone)]
pub struct Nf4 {
    d_out: usize,
    d_in: usize,
    codes: Vec<u8>,
    scales: Scales,
    device: Device,
    /// Codes (whole blocks) and scales on a device that is not the CPU.
    resident: Option<(Tensor, Tensor)>,
}

/// What an NF4 weight stores, for inspection.
#[derive(Debug, Clone)]
pub struct Nf4Parts<'a> {
    /// Two codes a byte, the first in the high nibble; the last low nibble is 7 (zero) if the count is odd.
    pub codes: &'a [u8],
    /// Scale of each block of 64, as dequantised.
    pub absmax: Vec<f32>,
    /// With double quantisation: 8-bit codes of the scales, their scale per 256, and the offset.
    pub double: Option<(&'a [u8], &'a [f32], f32)>,
}

impl Nf4 {
    /// Rounds `weight` [d_out, d_in] of any float type.
    pub fn quantize(weight: &Tensor, double_quant: bool) -> Result<Self> {
        let (d_out, d_in) = matrix_dims("NF4", weight.dims())?;
        if !weight.dtype().is_float() {
            bail!("NF4 weight [{d_out}, {d_in}] is {:?}, expected a float type", weight.dtype())
        }
        let device = weight.device().clone();
        let (codes, absmax) = with_values(weight, |flat| {
            if let Some(at) = flat.iter().position(|w| !w.is_finite()) {
                bail!("NF4 weight [{d_out}, {d_in}] is {} at row {}, column {}", flat[at], at / d_in, at % d_in)
            }
            let mut codes = vec![0u8; flat.len().div_ceil(2)];
            let mut absmax = vec![0f32; flat.len().div_ceil(BLOCK)];
            for ((block, codes), absmax) in flat.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / 2)).zip(&mut absmax) {
                *absmax = block.iter().fold(0f32, |m, w| m.max(w.abs()));
                let inverse = 1.0 / absmax.max(1e-38);
                let code = |w: &f32| BOUNDARIES.iter().map(|b| u8::from(w * inverse > *b)).sum::<u8>();
                for (pair, byte) in block.chunks(2).zip(codes) {
                    *byte = code(&pair[0]) << 4 | pair.get(1).map_or(ZERO, code);
                }
            }
            Ok((codes, absmax))
        })?;
        let scales = if double_quant { Scales::quantize(absmax) } else { Scales::Plain(absmax) };
        let mut this = Self { d_out, d_in, codes, scales, device, resident: None };
        if !this.device.is_cpu() {
            let mut padded = this.codes.clone();
            padded.resize(this.blocks() * BLOCK / 2, ZERO << 4 | ZERO);
            let count = padded.len();
            let codes = Tensor::from_vec(padded, count, &this.device)?;
            let absmax: Vec<f32> = (0..this.blocks()).map(|b| this.scales.get(b)).collect();
            let count = absmax.len();
            this.resident = Some((codes, Tensor::from_vec(absmax, (count, 1), &this.device)?));
        }
        Ok(this)
    }

    fn blocks(&self) -> usize {
        (self.d_out * self.d_in).div_ceil(BLOCK)
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
        self.codes.len()
            + match &self.scales {
                Scales::Plain(absmax) => 4 * absmax.len(),
                Scales::Double { codes, absmax, .. } => codes.len() + 4 * absmax.len() + 4,
            }
    }

    /// Codes and scales.
    pub fn parts(&self) -> Nf4Parts<'_> {
        Nf4Parts {
            codes: &self.codes,
            absmax: (0..self.blocks()).map(|b| self.scales.get(b)).collect(),
            double: match &self.scales {
                Scales::Plain(_) => None,
                Scales::Double { codes, absmax, offset } => Some((codes, absmax, *offset)),
            },
        }
    }

    /// The matrix in bf16 on a CUDA device.
    #[cfg(feature = "cuda")]
    pub(super) fn bf16_on_device(&self) -> Result<Tensor> {
        use crate::cuda::{Gpu, View, address};
        let Some((codes, absmax)) = &self.resident else {
            bail!("NF4 weight [{}, {}] has no copy on {:?}", self.d_out, self.d_in, self.device.location())
        };
        let gpu = Gpu::of(&self.device)?;
        let out = gpu.alloc::<half::bf16>(self.d_out * self.d_in)?;
        let to = View::new(gpu.address(&out), self.d_in);
        super::quantised_cuda::nf4(&gpu, address::<u8>(codes)?, address::<f32>(absmax)?, to, (self.d_out, self.d_in))?;
        Ok(gpu.tensor(out, &[self.d_out, self.d_in]))
    }

    /// The matrix in f32 by candle operations, for devices other than the CPU.
    pub(super) fn on_device(&self) -> Result<Tensor> {
        let Some((codes, absmax)) = &self.resident else {
            bail!("NF4 weight [{}, {}] has no copy on {:?}", self.d_out, self.d_in, self.device.location())
        };
        let table = Tensor::new(&PAIRS, &self.device)?;
        let values = table.index_select(codes, 0)?.reshape((self.blocks(), BLOCK))?.broadcast_mul(absmax)?;
        values.flatten_all()?.narrow(0, 0, self.d_out * self.d_in)?.reshape((self.d_out, self.d_in))
    }

    /// `dst` <- weights `start..start + dst.len()` of the flattened matrix.
    pub(super) fn load(&self, start: usize, dst: &mut [f32]) {
        let (mut at, end) = (start, start + dst.len());
        let mut dst = dst;
        while at < end {
            let block = at / BLOCK;
            let stop = end.min((block + 1) * BLOCK);
            let absmax = self.scales.get(block);
            let (head, rest) = std::mem::take(&mut dst).split_at_mut(stop - at);
            dst = rest;
            // An odd start is the low nibble of its byte.
            let odd = at % 2;
            if odd == 1 {
                head[0] = PAIRS[self.codes[at / 2] as usize][1];
            }
            let (two, last) = head[odd..].as_chunks_mut::<2>();
            for (out, byte) in two.iter_mut().zip(&self.codes[(at + odd) / 2..]) {
                *out = PAIRS[*byte as usize];
            }
            if let [last] = last {
                *last = PAIRS[self.codes[(stop - 1) / 2] as usize][0];
            }
            scale(absmax, head);
            at = stop;
        }
    }
}
