//! The memory of a run by formulas, from the shapes of model and method: for devices, and for programs whose allocations are
//! not counted.

use candle_core::DType;
use espalier_adapters::{Host, ModuleMut, ParameterMap};
use espalier_models::Model;
use espalier_models::config::NormPlacement;

use super::Estimate;
use crate::Result;
use crate::recipe::Recipe;
use crate::setup;

/// Bytes of the program, its thread stacks and allocator slack.
const PROGRAM: u64 = 48 << 20;

/// How the blocks of a model run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As two fused operations; with the sums below a gain where a method has one.
    Fused { gain: bool },
    /// Operation by operation; `plain` where each adapted map is one fused product.
    Taped { plain: bool },
}

/// Values that one token keeps in one block, and values that its backward pass needs for a while.
///
/// Fused: input and middle of the residual stream, q, k, v, the attention output, gate and up. Else its input, both norms'
/// outputs, q, k and v before and after rotation, the attention output and its projection, both sums, gate, up, their product,
/// and its projection; a method that is not one fused product keeps about as much again at the outputs of the adapted maps.
fn values_per_token(model: &Model, form: Form) -> (u64, u64) {
    let c = model.config();
    let (h, f) = (c.hidden as u64, c.intermediate as u64);
    let (q, kv) = ((c.heads * c.head_dim) as u64, (c.kv_heads * c.head_dim) as u64);
    let gates = if c.gated { 2 * f } else { f };
    let outputs = q + 2 * kv + 2 * h + gates;
    match form {
        Form::Fused { gain } => {
            let sums = if gain { outputs } else { 0 };
            (2 * h + 2 * q + 2 * kv + gates + sums, 2 * gates + f + 3 * h)
        }
        Form::Taped { plain } => {
            let kept = 7 * h + 3 * q + 3 * kv + gates + f + if plain { 0 } else { 2 * (outputs + f) };
            (kept, kept)
        }
    }
}

/// Estimates the peak of a run with the given parameters on rows of at most `longest` tokens.
///
/// # Errors
/// If the walk over the model fails.
pub(super) fn estimate(
    recipe: &Recipe,
    model: &mut Model,
    parameters: &ParameterMap,
    longest: usize,
) -> Result<Estimate> {
    let mut weights = 0u64;
    // On a device, what its attention takes; blocks of another form are told apart below.
    let on_device =
        cfg!(feature = "cuda") && model.dtype() == DType::BF16 && matches!(model.config().head_dim, 64 | 128);
    let (mut fused, mut plain, mut gain) = (model.device().is_cpu() || on_device, true, false);
    let bytes = |t: &candle_core::Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
    model.walk(&mut |module| {
        weights += match module {
            ModuleMut::Linear(l) => {
                if let Some(adapter) = l.adapter() {
                    let view = adapter.low_rank(l.base())?;
                    let gained = view.as_ref().is_some_and(|v| v.gain.is_some());
                    gain |= gained;
                    fused &= view.is_some() && adapter.dropout() == 0.0;
                    plain &= view.is_some() && !gained && adapter.dropout() == 0.0;
                }
                l.base().size_in_bytes() as u64 + l.bias().map_or(0, |b| bytes(b.frozen()))
            }
            ModuleMut::Embedding(e) => bytes(e.weight().frozen()),
            ModuleMut::Norm(n) => bytes(n.weight().frozen()) + n.bias().map_or(0, |b| bytes(b.frozen())),
        };
        Ok(())
    })?;
    let trained = parameters.trainable_count() as u64 * 16;
    let length = match recipe.packing {
        true => setup::max_length(recipe, model.config(), model.virtual_tokens()) as u64,
        false => longest as u64,
    };
    let tokens = recipe.batch_size as u64 * (length + model.virtual_tokens() as u64);
    let size = if model.dtype() == DType::F32 { 4 } else { 2 };
    let hidden = model.config().hidden as u64;
    let config = model.config();
    let form = if fused && config.placement == NormPlacement::Pre && !config.qk_norm {
        Form::Fused { gain }
    } else {
        Form::Taped { plain }
    };
    let (kept, passing) = values_per_token(model, form);
    let (per_block, passing) = (kept * tokens * size, passing * tokens * size);
    let blocks = model.blocks() as u64;
    let activations =
        if recipe.checkpointing { tokens * hidden * size * blocks + per_block } else { per_block * blocks };
    let scores = (tokens * model.config().vocab as u64).min(1 << 24);
    // Fused: the scores, and a copy of them in the run's type where that is another.
    let copies = match form {
        Form::Fused { .. } if size == 4 => scores * 4,
        Form::Fused { .. } => scores * 6,
        Form::Taped { .. } => scores * 12,
    };
    let transient = copies + passing;
    let total = weights + trained + activations + transient + PROGRAM;
    Ok(Estimate { weights, trained, activations, transient, program: PROGRAM, total, ..Estimate::default() })
}
