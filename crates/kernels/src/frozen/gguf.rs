//! Reading runs of GGUF blocks as f32, straight from the stored bytes.

use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8_1,
    BlockQ8K, GgmlType,
};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Result, bail};
use half::{bf16, f16};
use std::borrow::Cow;

/// llama.cpp's name of a block type, in lower case.
pub(super) fn name(dtype: GgmlDType) -> &'static str {
    match dtype {
        GgmlDType::F32 => "f32",
        GgmlDType::F16 => "f16",
        GgmlDType::BF16 => "bf16",
        GgmlDType::Q4_0 => "q4_0",
        GgmlDType::Q4_1 => "q4_1",
        GgmlDType::Q5_0 => "q5_0",
        GgmlDType::Q5_1 => "q5_1",
        GgmlDType::Q8_0 => "q8_0",
        GgmlDType::Q8_1 => "q8_1",
        GgmlDType::Q2K => "q2_k",
        GgmlDType::Q3K => "q3_k",
        GgmlDType::Q4K => "q4_k",
        GgmlDType::Q5K => "q5_k",
        GgmlDType::Q6K => "q6_k",
        GgmlDType::Q8K => "q8_k",
    }
}

/// The blocks of a matrix on the CPU.
pub(super) struct Blocks<'a> {
    data: Cow<'a, [u8]>,
    dtype: GgmlDType,
    d_in: usize,
}

/// Reads `count` blocks of type `B` from block `first` on.
fn read<B: GgmlType>(data: &[u8], first: usize, count: usize, dst: &mut [f32]) {
    let size = std::mem::size_of::<B>();
    let bytes = &data[first * size..(first + count) * size];
    assert_eq!(bytes.as_ptr().align_offset(std::mem::align_of::<B>()), 0, "GGUF blocks are not aligned");
    // SAFETY: `bytes` holds `count` whole blocks (sliced above), aligned (asserted above); block types are plain old
    // data (floats and integers in repr(C)), valid for any bits.
    let blocks = unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<B>(), count) };
    B::to_float(blocks, dst);
}

impl<'a> Blocks<'a> {
    pub(super) fn new(weight: &'a QTensor) -> Result<Self> {
        let data = weight.data()?;
        let dtype = weight.dtype();
        let dims = weight.shape().dims();
        let d_in = dims.last().copied().unwrap_or(0);
        let wanted = weight.shape().elem_count() / dtype.block_size() * dtype.type_size();
        if data.len() != wanted || !d_in.is_multiple_of(dtype.block_size()) {
            bail!("GGUF weight {dims:?} of type {} holds {} bytes, expected {wanted}", name(dtype), data.len())
        }
        // Blocks hold 16- and 32-bit fields.
        if data.as_ptr().align_offset(4) != 0 {
            bail!("GGUF weight {dims:?} of type {} is not aligned to 4 bytes in memory", name(dtype))
        }
        Ok(Self { data, dtype, d_in })
    }

    /// `dst` <- columns `start..start + dst.len()` of a row; both ends on block borders.
    pub(super) fn load(&self, row: usize, start: usize, dst: &mut [f32]) {
        let block = self.dtype.block_size();
        let first = (row * self.d_in + start) / block;
        let count = dst.len() / block;
        let data = &self.data;
        match self.dtype {
            GgmlDType::F32 => read::<f32>(data, first, count, dst),
            GgmlDType::F16 => read::<f16>(data, first, count, dst),
            GgmlDType::BF16 => read::<bf16>(data, first, count, dst),
            GgmlDType::Q4_0 => read::<BlockQ4_0>(data, first, count, dst),
            GgmlDType::Q4_1 => read::<BlockQ4_1>(data, first, count, dst),
            GgmlDType::Q5_0 => read::<BlockQ5_0>(data, first, count, dst),
            GgmlDType::Q5_1 => read::<BlockQ5_1>(data, first, count, dst),
            GgmlDType::Q8_0 => read::<BlockQ8_0>(data, first, count, dst),
            GgmlDType::Q8_1 => read::<BlockQ8_1>(data, first, count, dst),
            GgmlDType::Q2K => read::<BlockQ2K>(data, first, count, dst),
            GgmlDType::Q3K => read::<BlockQ3K>(data, first, count, dst),
            GgmlDType::Q4K => read::<BlockQ4K>(data, first, count, dst),
            GgmlDType::Q5K => read::<BlockQ5K>(data, first, count, dst),
            GgmlDType::Q6K => read::<BlockQ6K>(data, first, count, dst),
            GgmlDType::Q8K => read::<BlockQ8K>(data, first, count, dst),
        }
    }
}
