//! How parameters move: optimisers and the course of the learning rate.

pub mod adamw;
pub mod rank_allocator;
pub mod schedule;

use candle_core::Tensor;
use espalier_adapters::ParameterMap;
use espalier_adapters::parameter::Role;

use crate::recipe::Recipe;
use crate::{Error, Result};

/// Factor on the learning rate of each trainable parameter: `lora_plus_ratio` for the side of a low-rank product that
/// writes the output, and for vectors beside it.
///
/// Source: LoRA+, arXiv 2402.12354 eq. 8; groups as in PEFT's `create_loraplus_optimizer`
pub fn rate_factors(recipe: &Recipe, parameters: &ParameterMap) -> Result<Vec<f64>> {
    let ratio = recipe.lora_plus_ratio;
    if ratio != 1.0 && !parameters.trainable().any(|p| p.role == Role::Up) {
        return Err(Error::recipe("lora_plus_ratio", "the method has no low-rank product whose sides could differ"));
    }
    Ok(parameters.trainable().map(|p| if p.role == Role::Up || p.tensor.rank() == 1 { ratio } else { 1.0 }).collect())
}

/// Norm of all gradients together, in f64.
///
/// # Errors
/// If a gradient cannot be read.
pub fn global_norm(gradients: &[Option<Tensor>]) -> Result<f64> {
    #[cfg(feature = "cuda")]
    {
        use espalier_kernels::cuda::{is_flat, optimizer::sum_of_squares};
        let all: Vec<&Tensor> = gradients.iter().flatten().collect();
        if all.first().is_some_and(|f| all.iter().all(|g| is_flat(g) && g.device().same_device(f.device()))) {
            return Ok(sum_of_squares(&all)?.sqrt());
        }
    }
    let mut square = 0.0;
    for gradient in gradients.iter().flatten() {
        let values = gradient.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>()?;
        square += values.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
    }
    Ok(square.sqrt())
}
