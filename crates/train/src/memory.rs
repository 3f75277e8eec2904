//! How much memory a run will need, by item, before it starts; and how much it uses.

use candle_core::DType;
use espalier_adapters::{Host, ModuleMut, ParameterMap};
use espalier_models::Model;
use serde::Serialize;

use crate::Result;
use crate::recipe::Recipe;
use crate::setup;

/// An estimate of the peak, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// Frozen weights.
    pub weights: u64,
    /// Trained parameters, their gradients and the optimiser's moments.
    pub trained: u64,
    /// What the blocks keep for the backward pass.
    pub activations: u64,
    /// Scores of the head and their gradient, and scratch of the widest block.
    pub transient: u64,
    /// The program itself.
    pub program: u64,
    /// Sum.
    pub total: u64,
    /// What the machine has, where it can be told.
    pub available: Option<u64>,
}

/// Bytes of the program, its thread stacks and allocator slack.
const PROGRAM: u64 = 48 << 20;

/// Values that one token keeps in one block: its input, both norms' outputs, q, k and v before and after rotation, the
/// attention output and its projection, both sums, gate, up, their product, and its projection. A method that is not one
/// fused product keeps about as much again at the outputs of the adapted maps.
fn values_per_token(model: &Model, fused: bool) -> u64 {
    let c = model.config();
    let (h, f) = (c.hidden as u64, c.intermediate as u64);
    let (q, kv) = ((c.heads * c.head_dim) as u64, (c.kv_heads * c.head_dim) as u64);
    let inner = if c.gated { 3 * f } else { 2 * f };
    let outputs = if fused { 0 } else { 2 * (q + 2 * kv + 2 * h + inner) };
    7 * h + 3 * q + 3 * kv + inner + outputs
}

/// Estimates the peak of a run with the given parameters on rows of at most `longest` tokens.
///
/// # Errors
/// If the walk over the model fails.
pub fn estimate(recipe: &Recipe, model: &mut Model, parameters: &ParameterMap, longest: usize) -> Result<Estimate> {
    let mut weights = 0u64;
    let mut fused = true;
    let bytes = |t: &candle_core::Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
    model.walk(&mut |module| {
        weights += match module {
            ModuleMut::Linear(l) => {
                let plain = |a: &std::sync::Arc<dyn espalier_adapters::Adapter>| {
                    Ok::<_, espalier_adapters::Error>(
                        a.low_rank(l.base())?.is_some_and(|v| v.gain.is_none()) && a.dropout() == 0.0,
                    )
                };
                fused &= l.adapter().map(plain).transpose()?.unwrap_or(true);
                l.base().size_in_bytes() as u64 + l.bias().map_or(0, |b| bytes(b.frozen()))
            }
            ModuleMut::Embedding(e) => bytes(e.weight().frozen()),
            ModuleMut::Norm(n) => bytes(n.weight().frozen()) + n.bias().map_or(0, |b| bytes(b.frozen())),
        };
        Ok(())
    })?;
    let trained = parameters.trainable_count() as u64 * 16;
    let length = match recipe.packing {
        true => setup::max_length(recipe, model.config()) as u64,
        false => longest as u64,
    };
    let tokens = recipe.batch_size as u64 * length;
    let size = if model.dtype() == DType::F32 { 4 } else { 2 };
    let hidden = model.config().hidden as u64;
    let per_block = values_per_token(model, fused) * tokens * size;
    let blocks = model.blocks() as u64;
    let activations =
        if recipe.checkpointing { tokens * hidden * size * blocks + per_block } else { per_block * blocks };
    let scores = (tokens * model.config().vocab as u64).min(1 << 24);
    let transient = scores * 4 * 3 + per_block;
    let total = weights + trained + activations + transient + PROGRAM;
    Ok(Estimate { weights, trained, activations, transient, program: PROGRAM, total, available: available() })
}

fn status(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Memory that can be had now, in bytes.
pub fn available() -> Option<u64> {
    status("/proc/meminfo", "MemAvailable:")
}

/// Peak resident memory of this process so far, in bytes.
pub fn peak() -> Option<u64> {
    status("/proc/self/status", "VmHWM:")
}

/// Resident memory of this process now, in bytes.
pub fn resident() -> Option<u64> {
    status("/proc/self/status", "VmRSS:")
}
