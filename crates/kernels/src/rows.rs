//! Rows of a matrix by their places.

#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{Result, Tensor};

/// `into` [n, h] plus `rows` [m, h] at the places `index` `[m]` (u32), all different and zero before. On a CUDA device the rows
/// are written into the memory of `into` itself.
///
/// # Errors
/// If shapes or types do not fit, or a place is outside on the CPU.
pub fn put_rows(into: &Tensor, index: &Tensor, rows: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if into.device().is_cuda() && into.dtype() == DType::BF16 {
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

/// The rows of `x` [n, h] at the places `index` `[m]` (u32): [m, h], off the tape.
///
/// # Errors
/// If shapes or types do not fit, or a place is outside on the CPU.
pub fn take_rows(x: &Tensor, index: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && x.dtype() == DType::BF16 {
        use crate::cuda::{Gpu, View, address, matrix, rows::gather};
        let ((_, h), m) = (x.dims2()?, index.dims1()?);
        let gpu = Gpu::of(x.device())?;
        let out = gpu.alloc::<half::bf16>(m * h)?;
        gather(&gpu, matrix(x)?, address::<u32>(index)?, View::new(gpu.address(&out), h), (m, h))?;
        return Ok(gpu.tensor(out, &[m, h]));
    }
    x.detach().index_select(index, 0)
}

/// All values of `parts` in one vector, off the tape.
///
/// # Errors
/// If types or devices differ.
pub fn concatenate(parts: &[Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(first) = parts.first()
        && parts.len() <= 32
        && parts.iter().all(|p| crate::cuda::is_flat(p) && p.device().same_device(first.device()))
    {
        let gpu = crate::cuda::Gpu::of(first.device())?;
        // Addresses, then where each part begins; those that are not there begin at the end.
        let mut table = vec![0u64; 32 + 33];
        let mut total = 0u64;
        for (i, part) in parts.iter().enumerate() {
            table[i] = crate::cuda::address::<f32>(part)?;
            table[32 + i] = total;
            total += part.elem_count() as u64;
        }
        table[32 + parts.len()..].fill(total);
        let out = gpu.alloc::<f32>(total as usize)?;
        let blocks = (total as usize).div_ceil(1024);
        let table = table.into_boxed_slice();
        crate::cuda::launch_with!(&gpu, "rows_concatenate", ((blocks, 1, 1), 256, 0), table, gpu.address(&out))?;
        return Ok(gpu.tensor(out, &[total as usize]));
    }
    let flat = parts.iter().map(|p| p.detach().flatten_all()).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&flat, 0)
}
