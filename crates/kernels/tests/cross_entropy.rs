//! Cross entropy, softmax and log-softmax: kernel against reference, weights, labels out of range.
#![allow(clippy::unwrap_used)]
mod common;
use candle_core::{DType, Device, Tensor, Var};
use common::*;
use espalier_kernels::cross_entropy::{cross_entropy, linear_cross_entropy, log_softmax, reference, softmax};
use espalier_kernels::frozen::FrozenWeight;
use std::sync::Arc;

#[test]
fn cross_entropy_matches_the_f64_reference() {
    let mut r = rng(1);
    for (n, v) in [(0, 5), (1, 1), (1, 2), (5, 33), (130, 257), (3, 9001)] {
        let labels: Vec<u32> = (0..n).map(|i| ((i * 7919 + 3) % v) as u32).collect();
        let weights: Vec<f32> = (0..n).map(|i| [1.0, 0.0, 0.5, 2.5][i % 4]).collect();
        for dtype in FUSED {
            let x = (randn(&mut r, &[n, v], dtype) * 4.0).unwrap();
            for w in [None, Some(weights.as_slice())] {
                let what = format!("cross entropy [{n}, {v}] {dtype:?}, weights {}", w.is_some());
                matches_f64(&what, &|i| cross_entropy(&i[0], &labels, w), std::slice::from_ref(&x), rounding(dtype));
                assert_eq!(cross_entropy(&x, &labels, w).unwrap().dtype(), DType::F32);
            }
        }
    }
}

#[test]
fn softmaxes_match_the_f64_reference() {
    let mut r = rng(2);
    for dims in [vec![1], vec![0, 4], vec![3, 5, 33], vec![70, 300]] {
        for dtype in FUSED {
            let x = (randn(&mut r, &dims, dtype) * 3.0).unwrap();
            let what = format!("{dims:?} {dtype:?}");
            matches_f64(&format!("softmax {what}"), &|i| softmax(&i[0]), std::slice::from_ref(&x), rounding(dtype));
            matches_f64(&format!("log_softmax {what}"), &|i| log_softmax(&i[0]), &[x], rounding(dtype));
        }
    }
}

#[test]
fn references_match_finite_differences() {
    let x = randn(&mut rng(3), &[4, 6], DType::F64);
    let (labels, weights) = ([5, 0, 2, 2], [1.0, 0.5, 0.0, 2.0]);
    finite_differences("loss", &|i| reference::cross_entropy(&i[0], &labels, Some(&weights)), std::slice::from_ref(&x));
    finite_differences("softmax", &|i| softmax(&i[0]), std::slice::from_ref(&x));
    finite_differences("log_softmax", &|i| log_softmax(&i[0]), std::slice::from_ref(&x));
}

#[test]
fn large_and_infinite_logits() {
    let x = Tensor::new(&[[1e4f32, -1e4, 0.0], [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY]], &Device::Cpu).unwrap();
    let loss = flat(&cross_entropy(&x, &[0, 1], None).unwrap());
    assert_eq!(loss, vec![0.0, 0.0]);
    assert_eq!(flat(&softmax(&x).unwrap()), vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
}

#[test]
fn a_row_of_weight_zero_is_ignored_even_if_it_is_not_finite() {
    let x = Var::from_tensor(&Tensor::new(&[[f32::NAN, 1.0], [0.0, 0.0]], &Device::Cpu).unwrap()).unwrap();
    let loss = cross_entropy(&x, &[0, 1], Some(&[0.0, 1.0])).unwrap();
    let grads = loss.sum_all().unwrap().backward().unwrap();
    assert!((flat(&loss)[1] - std::f64::consts::LN_2).abs() < 1e-6 && flat(&loss)[0] == 0.0);
    assert_eq!(flat(grads.get(&x).unwrap()), vec![0.0, 0.0, 0.5, -0.5]);
    let nan = cross_entropy(&x, &[0, 1], None).unwrap();
    assert!(flat(&nan)[0].is_nan());
}

#[test]
fn bits_do_not_depend_on_threads() {
    let x = randn(&mut rng(4), &[64, 1003], DType::F32);
    let labels: Vec<u32> = (0..64).collect();
    same_bits_in_any_pool("loss", || everything(&|i| cross_entropy(&i[0], &labels, None), std::slice::from_ref(&x)));
    same_bits_in_any_pool("softmax", || everything(&|i| softmax(&i[0]), std::slice::from_ref(&x)));
}

#[test]
fn wrong_inputs_are_named() {
    let x = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
    let text = message(cross_entropy(&x, &[1, 4], None));
    assert!(text.contains("label 4 of row 1") && text.contains('4'), "{text}");
    assert!(message(cross_entropy(&x, &[1], None)).contains("1 labels"));
    assert!(message(cross_entropy(&x, &[1, 1], Some(&[1.0]))).contains("1 weights"));
    assert!(message(cross_entropy(&x.flatten_all().unwrap(), &[1, 1], None)).contains("[8]"));
    assert!(softmax(&Tensor::zeros((2, 0), DType::F32, &Device::Cpu).unwrap()).is_err());
}

#[test]
fn the_fused_projection_equals_scores_and_their_loss() {
    // One row, rows on both sides of the dot products' threshold, odd sizes, no rows.
    for (n, h, v) in [(1, 8, 5), (5, 17, 33), (40, 24, 130), (0, 6, 9)] {
        let mut r = rng(8);
        let w = randn(&mut r, &[v, h], DType::F32);
        let labels: Vec<u32> = (0..n as u32).map(|i| i * 7 % v as u32).collect();
        for dtype in FUSED {
            let weight = Arc::new(FrozenWeight::dense(w.to_dtype(dtype).unwrap()).unwrap());
            let x = randn(&mut r, &[n, h], dtype);
            matches_f64(
                &format!("[{n}, {h}] to {v} {dtype:?}"),
                &|i| linear_cross_entropy(&i[0], &weight, &labels),
                std::slice::from_ref(&x),
                rounding(dtype),
            );
            let untracked = linear_cross_entropy(&x, &weight, &labels).unwrap();
            let apart =
                cross_entropy(&weight.forward(&x.to_dtype(DType::F32).unwrap()).unwrap(), &labels, None).unwrap();
            close("without a gradient", &untracked, &apart, 4.0 * rounding(dtype));
        }
        let weight = Arc::new(FrozenWeight::nf4(&w, true).unwrap());
        let x = randn(&mut r, &[n, h], DType::F32);
        matches_f64("nf4", &|i| linear_cross_entropy(&i[0], &weight, &labels), &[x], 4e-6);
    }
    let weight = Arc::new(FrozenWeight::dense(randn(&mut rng(1), &[5, 4], DType::F32)).unwrap());
    let x = randn(&mut rng(1), &[2, 4], DType::F32);
    let message = |labels: &[u32]| linear_cross_entropy(&x, &weight, labels).unwrap_err().to_string();
    assert!(message(&[0, 5]).contains("label 5 of row 1"));
    assert!(message(&[0]).contains("1 labels for 2 rows"));
}
