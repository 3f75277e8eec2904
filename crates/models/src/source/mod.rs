//! Where the weights of a model come from. A source hands out tensors by the name transformers gives them and knows which
//! were taken, so that what is left over can be reported.

pub mod folder;
pub mod gguf;
pub(crate) mod gguf_names;
pub(crate) mod outline;
pub(crate) mod random;

use std::ops::Range;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use espalier_adapters::FrozenWeight;

use crate::Result;

/// How weights are kept in memory.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Dtype of activations and dense weights.
    pub dtype: DType,
    /// Device of everything.
    pub device: Device,
    /// Quantisation of the blocks' matrices at load.
    pub quantization: Option<Quantization>,
    /// Labels of a new classification head, where the file has none or another number.
    pub labels: Option<usize>,
    /// Seed of tensors that the files lack (a new classification head).
    pub seed: u64,
}

impl LoadOptions {
    /// f32 on the CPU, not quantised.
    pub fn cpu() -> Self {
        Self { dtype: DType::F32, device: Device::Cpu, quantization: None, labels: None, seed: 0 }
    }
}

/// Quantisation of a frozen matrix when it is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// 4-bit normal floats in blocks of 64, with quantised scales if `double`.
    Nf4 {
        /// Quantise the scales as well (QLoRA).
        double: bool,
    },
    /// 8-bit integers with a scale for each row.
    Int8,
    /// A block type of GGUF.
    Gguf(GgmlDType),
}

impl Quantization {
    /// Quantises `weight` [d_out, d_in].
    ///
    /// # Errors
    /// If the weight is not a matrix of finite values.
    pub fn apply(self, weight: &Tensor) -> Result<FrozenWeight> {
        Ok(match self {
            Self::Nf4 { double } => FrozenWeight::nf4(weight, double)?,
            Self::Int8 => FrozenWeight::int8(weight)?,
            Self::Gguf(dtype) => FrozenWeight::gguf_from(weight, dtype)?,
        })
    }
}

/// A set of named weights.
pub(crate) trait WeightSource: Send + Sync {
    /// The folder or file, for messages.
    fn path(&self) -> &Path;

    /// Whether there is a tensor of that name.
    fn has(&self, name: &str) -> bool;

    /// Whether it gives shapes without values.
    fn is_outline(&self) -> bool {
        false
    }

    /// Takes note that a tensor is used; whether it is there, in the shape that the architecture wants.
    ///
    /// # Errors
    /// If it has another shape.
    fn claim(&mut self, name: &str, shape: &[usize]) -> Result<bool>;

    /// Rows (of the first dimension) of a tensor as the file has them, on the CPU; None where the source gives none but whole
    /// tensors.
    ///
    /// # Errors
    /// If it cannot be read.
    fn rows(&mut self, name: &str, rows: Range<usize>) -> Result<Option<Tensor>> {
        let _ = (name, rows);
        Ok(None)
    }

    /// A small or dense tensor (norm, bias, table) in `dtype`; `shape` as the architecture wants it.
    fn dense(&mut self, name: &str, shape: &[usize], options: &LoadOptions) -> Result<Tensor>;

    /// A matrix [d_out, d_in] of a block, in the storage that the options or the file ask for; `transposed` where the file
    /// keeps [d_in, d_out].
    fn matrix(
        &mut self,
        name: &str,
        d_out: usize,
        d_in: usize,
        transposed: bool,
        options: &LoadOptions,
    ) -> Result<FrozenWeight>;

    /// Names asked for but not there.
    fn missing(&self) -> &[String];

    /// Names there but not asked for.
    fn unused(&self) -> Vec<String>;
}
