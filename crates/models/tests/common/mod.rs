//! Golden files made with transformers and PEFT.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use espalier_adapters::Flow;
use espalier_adapters::formats::safetensors::TensorFile;
use espalier_models::{LoadOptions, Model, TokenBatch};

pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../parity/golden")
}

pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    TensorFile::open(path).unwrap().load_all(&Device::Cpu).unwrap()
}

pub(crate) fn rows(ids: &Tensor) -> Vec<Vec<u32>> {
    let ids = ids.to_dtype(DType::I64).unwrap().to_vec2::<i64>().unwrap();
    ids.into_iter().map(|row| row.into_iter().map(|id| id as u32).collect()).collect()
}

pub(crate) fn batch(ids: &Tensor) -> TokenBatch {
    let rows = rows(ids);
    TokenBatch::new(rows.concat(), rows.len(), rows[0].len()).unwrap()
}

pub(crate) fn load(folder: &Path) -> Model {
    Model::load(folder, &LoadOptions { device: device(), ..LoadOptions::cpu() }).unwrap()
}

/// The CPU, or what `ESPALIER_TEST_DEVICE` names (cuda:0).
pub(crate) fn device() -> Device {
    // Two handles of one device would be two devices to candle.
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let named = || match std::env::var("ESPALIER_TEST_DEVICE") {
        Ok(name) => Device::new_cuda(name.trim_start_matches("cuda:").parse().unwrap()).unwrap(),
        Err(_) => Device::Cpu,
    };
    DEVICE.get_or_init(named).clone()
}

pub(crate) fn logits(model: &Model, ids: &Tensor) -> Tensor {
    let scores = model.forward(&batch(ids), &Flow::eval()).unwrap();
    scores.detach().to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

/// Greatest absolute difference; NaN, which the maximum of a tensor passes over, counts as infinite.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let wide = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let d = (wide(a) - wide(b)).unwrap();
    largest(&d)
}

/// Greatest absolute value; NaN counts as infinite.
pub(crate) fn largest(t: &Tensor) -> f64 {
    let values = t.to_dtype(DType::F64).unwrap().abs().unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    values.into_iter().fold(0.0, |m, d| if d >= 0.0 { m.max(d) } else { f64::INFINITY })
}
