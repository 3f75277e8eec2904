//! How long a sequence may become, and whether lengths of other sequences in a batch would change its rotary table.

use espalier_models::config::Positions;
use espalier_models::config::rope::RopeScaling;
use espalier_models::{Model, ModelConfig};

/// Most tokens that a sequence of the model may have, prompt and answer together: `max_position_embeddings`, stretched
/// by the factor of dynamic and yarn scaling, which are made to go beyond it.
pub fn max_length(config: &ModelConfig) -> usize {
    let stretched = |original: f64, factor: f64| ((original * factor) as usize).max(config.max_positions);
    match &config.positions {
        Positions::Rope(rope) => match &rope.scaling {
            RopeScaling::Dynamic { factor } => stretched(config.max_positions as f64, *factor),
            RopeScaling::Yarn { factor, original, .. } => stretched(*original, *factor),
            _ => config.max_positions,
        },
        Positions::Learned { .. } => config.max_positions,
    }
}

/// Most tokens that a sequence of the model may have as it is now: what stands before the sequences takes a part of the positions.
pub fn longest(model: &Model) -> usize {
    max_length(model.config()).saturating_sub(model.virtual_tokens())
}

/// Whether a batch whose longest sequence has `length` tokens must run one sequence at a time, because the rotary table
/// follows the longest sequence of a batch.
pub(crate) fn table_follows_length(config: &ModelConfig, length: usize) -> bool {
    match &config.positions {
        Positions::Rope(rope) => match &rope.scaling {
            RopeScaling::Dynamic { .. } => length > rope.max_positions,
            RopeScaling::LongRope { original, .. } => length > *original,
            _ => false,
        },
        Positions::Learned { .. } => false,
    }
}
