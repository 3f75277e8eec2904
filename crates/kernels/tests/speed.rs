//! Timings, printed: `cargo test --release -p espalier-kernels --test speed -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
mod common;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor, Var};
use common::*;
use espalier_kernels::activation::{Activation, gated};
use espalier_kernels::attention::{AttentionSpec, attention};
use espalier_kernels::cross_entropy::cross_entropy;
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::norm::rms_norm;
use std::sync::Arc;
use std::time::Instant;

/// Best of several runs, in milliseconds.
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let mut best = f64::INFINITY;
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < 0.4 {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64() * 1e3);
    }
    best
}

/// Times the forward pass alone and with its backward pass.
fn report(what: &str, inputs: &[Tensor], gflop: f64, gbyte: f64, op: impl Fn(&[Tensor]) -> Tensor) {
    let forward = best(|| drop(op(inputs)));
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tracked);
    let backward = best(|| drop(y.backward().unwrap()));
    println!(
        "{what:44} forward {forward:8.3} ms ({:6.1} GFLOP/s, {:5.1} GB/s)   backward {backward:8.3} ms",
        gflop / forward * 1e3,
        gbyte / forward * 1e3
    );
}

#[test]
#[ignore = "prints timings; run it alone"]
fn speed() {
    let mut r = rng(1);
    println!("{} threads", rayon::current_num_threads());
    for (n, d_in, d_out) in [(1024, 512, 1408), (1024, 1408, 512), (1024, 512, 512), (256, 2048, 2048)] {
        let gflop = 2e-9 * (n * d_in * d_out) as f64;
        let w = randn(&mut r, &[d_out, d_in], DType::F32);
        let x = randn(&mut r, &[n, d_in], DType::F32);
        report(&format!("candle matmul {n}x{d_in}x{d_out}"), std::slice::from_ref(&x), gflop, 0.0, |i| {
            i[0].matmul(&w.t().unwrap()).unwrap()
        });
        let weights = [
            FrozenWeight::dense(w.clone()).unwrap(),
            FrozenWeight::dense(w.to_dtype(DType::BF16).unwrap()).unwrap(),
            FrozenWeight::nf4(&w, true).unwrap(),
            FrozenWeight::int8(&w).unwrap(),
            FrozenWeight::gguf(Arc::new(QTensor::quantize(&w, GgmlDType::Q4_0).unwrap())).unwrap(),
        ];
        for weight in weights {
            let weight = Arc::new(weight);
            let bytes = 1e-9 * weight.size_in_bytes() as f64;
            let what = format!("frozen {} {n}x{d_in}x{d_out}", weight.dtype_name());
            report(&what, std::slice::from_ref(&x), gflop, bytes, |i| weight.forward(&i[0]).unwrap());
            if n == 256 {
                let one = x.narrow(0, 0, 1).unwrap();
                let what = format!("frozen {} 1x{d_in}x{d_out}", weight.dtype_name());
                report(&what, &[one], gflop / 256.0, bytes, |i| weight.forward(&i[0]).unwrap());
            }
        }
    }
    for (b, t, h, kv, d) in [(4, 256, 8, 8, 64), (4, 256, 8, 2, 64), (1, 2048, 8, 8, 64)] {
        let x = [
            randn(&mut r, &[b, t, h, d], DType::F32),
            randn(&mut r, &[b, t, kv, d], DType::F32),
            randn(&mut r, &[b, t, kv, d], DType::F32),
        ];
        let spec = AttentionSpec { scale: 0.125, causal: true, ..Default::default() };
        let gflop = 2e-9 * (b * h * t * t * d) as f64;
        report(&format!("attention causal b{b} t{t} h{h} kv{kv} d{d}"), &x, gflop, 0.0, |i| {
            attention(&i[0], &i[1], &i[2], &spec).unwrap()
        });
        let one = [x[0].narrow(1, 0, 1).unwrap(), x[1].clone(), x[2].clone()];
        let bytes = 8e-9 * (b * t * kv * d) as f64;
        report(&format!("attention decode b{b} tk{t} h{h} kv{kv} d{d}"), &one, 0.0, bytes, |i| {
            attention(&i[0], &i[1], &i[2], &spec).unwrap()
        });
    }
    for dtype in [DType::F32, DType::BF16] {
        let size = 1e-9 * dtype.size_in_bytes() as f64;
        let x = randn(&mut r, &[1024, 512], dtype);
        let w = randn(&mut r, &[512], DType::F32);
        report(&format!("rms_norm 1024x512 {dtype:?}"), &[x, w], 0.0, size * 2.0 * 1024.0 * 512.0, |i| {
            rms_norm(&i[0], &i[1], 1e-5, 0.0).unwrap()
        });
        for act in [Activation::Silu, Activation::Gelu] {
            let x = [randn(&mut r, &[1024, 1408], dtype), randn(&mut r, &[1024, 1408], dtype)];
            report(&format!("gated {act:?} 1024x1408 {dtype:?}"), &x, 0.0, size * 3.0 * 1024.0 * 1408.0, |i| {
                gated(&i[0], &i[1], act).unwrap()
            });
        }
        let x = randn(&mut r, &[1024, 8192], dtype);
        let labels: Vec<u32> = (0..1024).collect();
        report(&format!("cross_entropy 1024x8192 {dtype:?}"), &[x], 0.0, size * 1024.0 * 8192.0, |i| {
            cross_entropy(&i[0], &labels, None).unwrap()
        });
    }
}

#[test]
#[ignore = "prints timings; run it alone"]
fn few_rows() {
    let mut r = rng(2);
    for (d_out, d_in) in [(1408, 512), (512, 1408), (512, 512), (8192, 512)] {
        for dtype in [DType::F32, DType::BF16] {
            let count = 160_000_000 / (d_out * d_in * dtype.size_in_bytes());
            let one = randn(&mut r, &[d_out, d_in], dtype);
            let all: Vec<Arc<FrozenWeight>> =
                (0..count).map(|_| Arc::new(FrozenWeight::dense(one.copy().unwrap()).unwrap())).collect();
            for n in [1, 4, 8, 16, 32] {
                let x = randn(&mut r, &[n, d_in], DType::F32);
                let ms = best(|| all.iter().for_each(|w| drop(w.forward(&x).unwrap())));
                let bytes = count * d_out * d_in * dtype.size_in_bytes();
                println!(
                    "{d_out}x{d_in} {dtype:?} {n:2} rows: {:6.1} GB/s, {:6.1} GFLOP/s",
                    bytes as f64 / ms / 1e6,
                    2e-6 * (count * n * d_out * d_in) as f64 / ms
                );
            }
        }
    }
}
