//! Steps of AdamW and norms over all tensors of a model in one launch each.
//!
//! Equation: p <- p keep - rate m' / (sqrt(v') / root + eps), m' = m + lerp (g - m), v' = beta2 v + square g^2, where g is
//!           the gradient times `scale`
//! Shapes:   p, g, m, v of one length, f32
//! Source:   arXiv 1711.05101 algorithm 2; each operation rounded as on the host, in the host's order
//! Cost:     28 bytes a parameter and step; 4 bytes a value of a norm

use super::launch::launch_with;
use super::{Gpu, address};
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{Result, Tensor, bail};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Values a block works on, as in `optimizer.cu`.
const CHUNK: usize = 4096;
/// Threads a block, as in `optimizer.cu`.
const THREADS: usize = 256;

/// One parameter with its gradient, its moments and the scalars that depend on its learning rate.
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    /// The parameter, written in place.
    pub parameter: &'a Tensor,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// The first moment, written in place.
    pub first: &'a Tensor,
    /// The second moment, written in place.
    pub second: &'a Tensor,
    /// Share of the parameter that weight decay leaves.
    pub keep: f32,
    /// Learning rate over the first moment's correction.
    pub rate: f32,
}

/// The scalars that all parameters share.
#[derive(Debug, Clone, Copy)]
pub struct Scalars {
    /// Weight of the gradient in the first moment.
    pub lerp: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Weight of the squared gradient in the second moment.
    pub square: f32,
    /// Root of the second moment's correction.
    pub root: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Factor on all gradients.
    pub scale: f32,
}

/// One step of AdamW for all parameters, in one launch. Parameters and moments are written where they are, as `Var::set`
/// does: tensors that share their memory change with them.
///
/// # Errors
/// If a tensor is not one that [`takes`] is true of, lengths differ, or the tensors are on several devices.
pub fn adamw(updates: &[Update<'_>], scalars: Scalars) -> Result<()> {
    let Some(Update { parameter, .. }) = updates.first() else { return Ok(()) };
    let gpu = Gpu::of(parameter.device())?;
    let mut lengths = Vec::with_capacity(updates.len());
    let mut entries = Vec::with_capacity(6 * updates.len());
    for update in updates {
        let length = update.parameter.elem_count();
        for tensor in [update.parameter, update.gradient, update.first, update.second] {
            if tensor.elem_count() != length {
                bail!("a step of AdamW: {} values for {length} parameters", tensor.elem_count())
            }
            entries.push(address_on(parameter, tensor)?);
        }
        entries.push(length as u64);
        entries.push(u64::from(update.keep.to_bits()) | u64::from(update.rate.to_bits()) << 32);
        lengths.push(length);
    }
    let pieces = Pieces::of(&gpu, &lengths)?;
    let entries = gpu.stream.clone_htod(&entries).w()?;
    launch_with!(
        &gpu,
        "optimizer_adamw",
        ((pieces.count, 1, 1), THREADS, 0),
        gpu.address(&entries),
        gpu.address(&pieces.table),
        scalars.lerp,
        scalars.beta2,
        scalars.square,
        scalars.root,
        scalars.eps,
        scalars.scale,
    )
}

/// The sum of the squares of all values, in f64; the same for the same tensors, always. Waits for the device.
///
/// # Errors
/// If a tensor is not one that [`takes`] is true of, or they are on several devices.
pub fn sum_of_squares(tensors: &[&Tensor]) -> Result<f64> {
    let Some(first) = tensors.first() else { return Ok(0.0) };
    let gpu = Gpu::of(first.device())?;
    let lengths: Vec<usize> = tensors.iter().map(|t| t.elem_count()).collect();
    let mut values = Vec::with_capacity(2 * tensors.len());
    for (tensor, length) in tensors.iter().zip(&lengths) {
        values.extend([address_on(first, tensor)?, *length as u64]);
    }
    let pieces = Pieces::of(&gpu, &lengths)?;
    let values = gpu.stream.clone_htod(&values).w()?;
    let partial = gpu.alloc::<f64>(pieces.count)?;
    let total = gpu.alloc::<f64>(1)?;
    launch_with!(
        &gpu,
        "optimizer_squares",
        ((pieces.count, 1, 1), THREADS, 0),
        gpu.address(&values),
        gpu.address(&pieces.table),
        gpu.address(&partial),
    )?;
    launch_with!(
        &gpu,
        "optimizer_squares_total",
        ((1, 1, 1), 1024, 0),
        gpu.address(&partial),
        pieces.count,
        gpu.address(&total),
    )?;
    let total = gpu.stream.clone_dtoh(&total).w()?;
    gpu.stream.synchronize().w()?;
    Ok(total.first().copied().unwrap_or(0.0))
}

fn address_on(first: &Tensor, tensor: &Tensor) -> Result<u64> {
    if !tensor.device().same_device(first.device()) {
        bail!("tensors of one launch on {:?} and {:?}", first.device(), tensor.device())
    }
    address::<f32>(tensor)
}

/// How tensors of certain lengths are cut: for each block the tensor it works on and the place of its piece there.
struct Pieces {
    lengths: Vec<usize>,
    table: CudaSlice<u32>,
    count: usize,
}

impl Pieces {
    /// Kept on each device for the lengths of the last call, which are those of the next one in training.
    fn of(gpu: &Gpu, lengths: &[usize]) -> Result<Arc<Self>> {
        static LAST: OnceLock<Mutex<HashMap<DeviceId, Arc<Pieces>>>> = OnceLock::new();
        let mut last = LAST.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pieces) = last.get(&gpu.device.id()).filter(|p| p.lengths == lengths) {
            return Ok(pieces.clone());
        }
        let mut table = Vec::new();
        for (tensor, length) in lengths.iter().enumerate() {
            table.extend((0..length.div_ceil(CHUNK)).flat_map(|piece| [tensor as u32, piece as u32]));
        }
        let count = table.len() / 2;
        if i32::try_from(count).is_err() {
            bail!("{count} pieces of {CHUNK} values are more than one launch takes")
        }
        let table = if count == 0 { gpu.zeros::<u32>(1)? } else { gpu.stream.clone_htod(&table).w()? };
        let pieces = Arc::new(Self { lengths: lengths.to_vec(), table, count });
        last.insert(gpu.device.id(), pieces.clone());
        Ok(pieces)
    }
}
