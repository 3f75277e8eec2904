//! What recipes name by a word: devices, dtypes, quantisations, and models by path or hub id.

use std::path::PathBuf;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use espalier_models::Quantization;

use crate::{Error, Result};

/// The device a recipe names.
///
/// # Errors
/// If it is unknown, or CUDA is asked for where there is none.
pub fn device(name: &str) -> Result<Device> {
    match name {
        "auto" => Ok(Device::cuda_if_available(0)?),
        "cpu" => Ok(Device::Cpu),
        "cuda" => Ok(Device::new_cuda(0)?),
        other => match other.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
            Some(index) => Ok(Device::new_cuda(index)?),
            None => Err(Error::recipe("device", format!("`{other}` is not auto, cpu or cuda:N"))),
        },
    }
}

/// The dtype a recipe names, on a device.
///
/// # Errors
/// If it is unknown.
pub fn dtype(name: &str, device: &Device) -> Result<DType> {
    match name {
        "auto" => Ok(if device.is_cuda() { DType::BF16 } else { DType::F32 }),
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        other => Err(Error::recipe(
            "dtype",
            espalier_adapters::config::unknown_value(other, &["auto", "f32", "bf16", "f16"]),
        )),
    }
}

/// Names of the quantisations of a frozen matrix at load.
pub const QUANTIZATIONS: &[&str] = &["none", "nf4", "nf4-double", "int8", "q8_0", "q6_k", "q5_0", "q4_0", "q4_k"];

/// The quantisation a recipe names.
///
/// # Errors
/// If it is unknown.
pub fn quantization(name: &str) -> Result<Option<Quantization>> {
    Ok(match name {
        "none" => None,
        "nf4" => Some(Quantization::Nf4 { double: false }),
        "nf4-double" => Some(Quantization::Nf4 { double: true }),
        "int8" => Some(Quantization::Int8),
        "q8_0" => Some(Quantization::Gguf(GgmlDType::Q8_0)),
        "q6_k" => Some(Quantization::Gguf(GgmlDType::Q6K)),
        "q5_0" => Some(Quantization::Gguf(GgmlDType::Q5_0)),
        "q4_0" => Some(Quantization::Gguf(GgmlDType::Q4_0)),
        "q4_k" => Some(Quantization::Gguf(GgmlDType::Q4K)),
        other => {
            let message = espalier_adapters::config::unknown_value(other, QUANTIZATIONS);
            return Err(Error::recipe("quantization", message));
        }
    })
}

/// The local path of a model: as given, the embedded seedling for an empty name, or a hub id's local copy.
///
/// # Errors
/// If there is no such model.
pub fn model_path(name: &str, revision: Option<&str>) -> Result<PathBuf> {
    if name.is_empty() || name == espalier_models::seedling::NAME {
        return Ok(espalier_models::seedling::folder()?);
    }
    let path = PathBuf::from(name);
    if path.exists() {
        return Ok(path);
    }
    hub(name, revision, path)
}

#[cfg(feature = "hub")]
fn hub(name: &str, revision: Option<&str>, path: PathBuf) -> Result<PathBuf> {
    if espalier_models::hub::is_hub_id(name) {
        return Ok(espalier_models::hub::fetch(name, revision)?);
    }
    Err(espalier_models::Error::NotAModel { path, message: "no such folder or file".into() }.into())
}

#[cfg(not(feature = "hub"))]
fn hub(_name: &str, _revision: Option<&str>, path: PathBuf) -> Result<PathBuf> {
    let message = "no such folder or file (this build cannot download from the hub)".into();
    Err(espalier_models::Error::NotAModel { path, message }.into())
}
