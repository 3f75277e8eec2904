//! RMS and layer norm: kernel against reference, reference against finite differences.
#![allow(clippy::unwrap_used)]
mod common;
use candle_core::{DType, Device, Tensor};
use common::*;
use espalier_kernels::norm::{layer_norm, reference, rms_norm};

#[test]
fn kernels_match_the_f64_reference_in_values_and_gradients() {
    let mut r = rng(1);
    for dims in [vec![3, 5, 64], vec![1, 7], vec![0, 16], vec![2, 0, 33], vec![1, 1, 1], vec![70, 300], vec![1000, 33]]
    {
        let h = *dims.last().unwrap();
        for dtype in FUSED {
            let x = randn(&mut r, &dims, dtype);
            let w = randn(&mut r, &[h], dtype);
            let b = randn(&mut r, &[h], dtype);
            // Sums over many rows in half types are rounded once more than a single entry.
            let tolerance = 2.0 * rounding(dtype);
            for offset in [0.0, 1.0] {
                let op = |i: &[Tensor]| rms_norm(&i[0], &i[1], 1e-5, offset);
                matches_f64(&format!("rms_norm {dims:?} {dtype:?}"), &op, &[x.clone(), w.clone()], tolerance);
            }
            let op = |i: &[Tensor]| layer_norm(&i[0], &i[1], Some(&i[2]), 1e-5);
            // A single entry has no deviation: its gradient is all rounding.
            if h > 1 {
                matches_f64(&format!("layer_norm {dims:?} {dtype:?}"), &op, &[x.clone(), w.clone(), b], tolerance);
                let op = |i: &[Tensor]| layer_norm(&i[0], &i[1], None, 1e-5);
                matches_f64(&format!("layer_norm {dims:?} {dtype:?} without bias"), &op, &[x, w], tolerance);
            }
        }
    }
}

#[test]
fn references_match_finite_differences() {
    let mut r = rng(2);
    let (x, w, b) =
        (randn(&mut r, &[3, 5], DType::F64), randn(&mut r, &[5], DType::F64), randn(&mut r, &[5], DType::F64));
    finite_differences("rms", &|i| reference::rms_norm(&i[0], &i[1], 1e-5, 1.0), &[x.clone(), w.clone()]);
    finite_differences("layer", &|i| reference::layer_norm(&i[0], &i[1], Some(&i[2]), 1e-5), &[x, w, b]);
}

#[test]
fn f32_weight_with_bf16_input_and_strided_input() {
    let mut r = rng(3);
    let x = randn(&mut r, &[8, 4, 32], DType::BF16).transpose(0, 1).unwrap();
    let w = randn(&mut r, &[32], DType::F32);
    let y = rms_norm(&x, &w, 1e-6, 0.0).unwrap();
    assert_eq!((y.dtype(), y.dims()), (DType::BF16, &[4, 8, 32][..]));
    let want = rms_norm(&x.to_dtype(DType::F64).unwrap(), &w, 1e-6, 0.0).unwrap();
    close("mixed", &y, &want, rounding(DType::BF16));
}

#[test]
fn layer_norm_of_a_large_mean_keeps_its_precision() {
    let x = (randn(&mut rng(4), &[4, 256], DType::F32) + 100.0).unwrap();
    let w = Tensor::ones(256, DType::F32, &Device::Cpu).unwrap();
    matches_f64("large mean", &|i| layer_norm(&i[0], &i[1], None, 1e-5), &[x, w], 2e-4);
}

#[test]
fn only_tracked_inputs_get_gradients() {
    let mut r = rng(5);
    let x = candle_core::Var::from_tensor(&randn(&mut r, &[4, 8], DType::F32)).unwrap();
    let w = randn(&mut r, &[8], DType::F32);
    let grads = rms_norm(&x, &w, 1e-5, 0.0).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&w).is_none());
    let w = candle_core::Var::from_tensor(&w).unwrap();
    let x = x.as_tensor().detach();
    let grads = layer_norm(&x, &w, None, 1e-5).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_none() && grads.get(&w).is_some());
}

#[test]
fn bits_do_not_depend_on_threads() {
    let mut r = rng(6);
    let inputs =
        [randn(&mut r, &[301, 257], DType::F32), randn(&mut r, &[257], DType::F32), randn(&mut r, &[257], DType::F32)];
    same_bits_in_any_pool("rms", || everything(&|i| rms_norm(&i[0], &i[1], 1e-5, 0.0), &inputs[..2]));
    same_bits_in_any_pool("layer", || everything(&|i| layer_norm(&i[0], &i[1], Some(&i[2]), 1e-5), &inputs));
}

#[test]
fn wrong_shapes_are_named() {
    let x = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
    let w = Tensor::zeros(5, DType::F32, &Device::Cpu).unwrap();
    let text = message(rms_norm(&x, &w, 1e-5, 0.0));
    assert!(text.contains("[5]") && text.contains("[2, 4]"), "{text}");
    assert!(message(layer_norm(&x, &w.narrow(0, 0, 4).unwrap(), Some(&w), 1e-5)).contains("bias"));
    let ids = Tensor::zeros((2, 4), DType::U32, &Device::Cpu).unwrap();
    assert!(message(rms_norm(&ids, &w.narrow(0, 0, 4).unwrap(), 1e-5, 0.0)).contains("float"));
    let empty = Tensor::zeros((2, 0), DType::F32, &Device::Cpu).unwrap();
    assert!(rms_norm(&empty, &w.narrow(0, 0, 0).unwrap(), 1e-5, 0.0).is_err());
}
