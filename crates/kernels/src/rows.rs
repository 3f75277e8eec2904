//! Rows of a matrix by their places.

use candle_core::{Result, Tensor};

/// `into` [n, h] plus `rows` [m, h] at the places `index` `[m]` (u32), all different and zero before. On a CUDA device the rows
/// are written into the memory of `into` itself.
///
/// # Errors
/// If shapes or types do not fit, or a place is outside on the CPU.
pub fn put_rows(into: &Tensor, index: &Tensor, rows: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if into.device().is_cuda() && into.dtype() == candle_core::DType::BF16 {
        use crate::cuda::{Gpu, View, address, rows::scatter};
        use half::bf16;
        let ((_, h), (m, width)) = (into.dims2()?, rows.dims2()?);
        if width != h || index.dims() != [m] {
            candle_core::bail!("put_rows: rows {:?} at places {:?} of {:?}", rows.dims(), index.dims(), into.dims())
        }
        let (rows, gpu) = (rows.contiguous()?, Gpu::of(into.device())?);
        let (from, to) = (View::new(address::<bf16>(&rows)?, h), View::new(address::<bf16>(into)?, h));
        scatter(&gpu, from, address::<u32>(index)?, to, (m, h))?;
        return Ok(into.clone());
    }
    into.index_add(index, rows, 0)
}
