//! New random weights: normal matrices and tables, unit norms, zero biases.
//!
//! Source: transformers' `_init_weights` with `initializer_range` (0.02 where absent); GPT-2's residual scaling of the
//! block outputs, 1 / sqrt(2 layers), for all families

use std::path::Path;

use candle_core::{DType, Tensor};
use espalier_adapters::module::NormKind;
use espalier_adapters::{FrozenWeight, random};

use super::{LoadOptions, WeightSource};
use crate::Result;
use crate::config::ModelConfig;

/// Draws every tensor from its own stream of the seed.
#[derive(Debug)]
pub(crate) struct RandomSource {
    std: f64,
    residual_std: f64,
    residual: [&'static str; 2],
    norm_gain: f64,
    seed: u64,
}

impl RandomSource {
    pub(crate) fn new(config: &ModelConfig, seed: u64) -> Self {
        let std = config.raw.get("initializer_range").and_then(serde_json::Value::as_f64).unwrap_or(0.02);
        let offset = if let NormKind::Rms { offset, .. } = config.norm { offset } else { 0.0 };
        Self {
            std,
            residual_std: std / (2.0 * config.layers.max(1) as f64).sqrt(),
            residual: [config.names.o, config.names.down],
            norm_gain: 1.0 - offset,
            seed,
        }
    }

    fn draw(&self, name: &str, shape: &[usize], options: &LoadOptions) -> Result<Tensor> {
        let lower = name.to_ascii_lowercase();
        let device = &options.device;
        let values = if name.ends_with(".bias") {
            Tensor::zeros(shape, DType::F32, device)?
        } else if shape.len() == 1 || lower.contains("norm") || lower.contains(".ln_") {
            (Tensor::ones(shape, DType::F32, device)? * self.norm_gain)?
        } else {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let std = if self.residual.iter().any(|r| module.ends_with(r)) { self.residual_std } else { self.std };
            random::normal(&mut random::stream(self.seed, name), std, shape, device)?
        };
        Ok(values.to_dtype(options.dtype)?)
    }
}

impl WeightSource for RandomSource {
    fn path(&self) -> &Path {
        Path::new("(new weights)")
    }

    fn has(&self, _name: &str) -> bool {
        true
    }

    fn claim(&mut self, _name: &str, _shape: &[usize]) -> Result<bool> {
        Ok(true)
    }

    fn dense(&mut self, name: &str, shape: &[usize], options: &LoadOptions) -> Result<Tensor> {
        self.draw(name, shape, options)
    }

    fn matrix(
        &mut self,
        name: &str,
        d_out: usize,
        d_in: usize,
        _transposed: bool,
        options: &LoadOptions,
    ) -> Result<FrozenWeight> {
        let weight = self.draw(name, &[d_out, d_in], options)?;
        match options.quantization {
            Some(quantization) => quantization.apply(&weight.to_dtype(DType::F32)?),
            None => Ok(FrozenWeight::dense(weight)?),
        }
    }

    fn missing(&self) -> &[String] {
        &[]
    }

    fn unused(&self) -> Vec<String> {
        Vec::new()
    }
}
