//! Frozen weights: products against the dequantised matrix, quantisation against its definition.
#![allow(clippy::unwrap_used)]
mod common;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use common::*;
use espalier_kernels::frozen::{FrozenWeight, dynamic_map, nf4_code_book};
use std::sync::Arc;

fn weights(w: &Tensor, gguf: bool) -> Vec<FrozenWeight> {
    let mut all: Vec<FrozenWeight> = [DType::F32, DType::F16, DType::BF16, DType::F64]
        .into_iter()
        .map(|dtype| FrozenWeight::dense(w.to_dtype(dtype).unwrap()).unwrap())
        .collect();
    all.push(FrozenWeight::nf4(w, false).unwrap());
    all.push(FrozenWeight::nf4(w, true).unwrap());
    all.push(FrozenWeight::int8(w).unwrap());
    if gguf {
        for dtype in [
            GgmlDType::F32,
            GgmlDType::F16,
            GgmlDType::BF16,
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q8_0,
            GgmlDType::Q2K,
            GgmlDType::Q3K,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
            GgmlDType::Q6K,
        ] {
            all.push(FrozenWeight::gguf(Arc::new(QTensor::quantize(w, dtype).unwrap())).unwrap());
        }
    }
    all
}

#[test]
fn rows_are_those_of_the_whole() {
    let mut r = rng(3);
    let w = randn(&mut r, &[9, 256], DType::F32);
    for weight in weights(&w, true) {
        let whole = weight.dequantize(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        for run in [0..9, 0..1, 3..7, 8..9, 4..4] {
            let rows = weight.rows(run.clone()).unwrap().to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
            assert!(rows == whole[run.clone()], "{} {run:?}", weight.dtype_name());
        }
        assert!(weight.rows(4..10).is_err(), "{}", weight.dtype_name());
    }
}

#[test]
fn a_block_type_is_refused_where_rows_are_no_whole_blocks() {
    let w = Tensor::zeros((4, 96), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(FrozenWeight::gguf_from(&w, GgmlDType::Q8_0).unwrap().dtype_name(), "q8_0");
    let error = FrozenWeight::gguf_from(&w, GgmlDType::Q4K).unwrap_err().to_string();
    assert!(error.contains("[4, 96]") && error.contains("q4_k") && error.contains("256"), "{error}");
}

/// Both products of every storage type, on both sides of the threshold between dot products and matrix products.
fn products(d_out: usize, d_in: usize, rows: &[usize], gguf: bool) {
    let mut r = rng((d_out * 1000 + d_in) as u64);
    let w = randn(&mut r, &[d_out, d_in], DType::F32);
    for weight in weights(&w, gguf) {
        let name = weight.dtype_name();
        let weight = Arc::new(weight);
        let dense = weight.dequantize(DType::F64).unwrap();
        assert_eq!(dense.dims(), &[d_out, d_in]);
        for &n in rows {
            for dtype in FUSED {
                // The transposed product is the gradient too, so this checks both directions twice.
                let what = format!("{name} [{d_out}, {d_in}] x {n} {dtype:?}");
                let x = randn(&mut r, &[n, d_in], dtype);
                matches_f64(&what, &|i| weight.forward(&i[0]), std::slice::from_ref(&x), rounding(dtype));
                let y = randn(&mut r, &[n, d_out], dtype);
                matches_f64(
                    &format!("{what} transposed"),
                    &|i| weight.forward_transposed(&i[0]),
                    &[y],
                    rounding(dtype),
                );
                if n > 0 {
                    let want = x.to_dtype(DType::F64).unwrap().matmul(&dense.t().unwrap()).unwrap();
                    close(&format!("{what} by hand"), &weight.forward(&x).unwrap(), &want, rounding(dtype));
                }
            }
        }
    }
}

#[test]
fn products_of_small_and_odd_matrices() {
    products(1, 1, &[0, 1, 4, 5], false);
    products(17, 33, &[1, 4, 5, 37], false);
    products(33, 7, &[2, 6], false);
}

#[test]
fn products_of_matrices_beyond_one_block() {
    products(300, 768, &[0, 1, 3, 5], true);
    products(64, 2304, &[4, 9], true);
    products(700, 256, &[65], true);
}

#[test]
fn any_leading_shape_and_strided_inputs() {
    let mut r = rng(3);
    let weight = Arc::new(FrozenWeight::dense(randn(&mut r, &[6, 8], DType::F32)).unwrap());
    let x = randn(&mut r, &[2, 3, 8], DType::F32);
    let y = weight.forward(&x).unwrap();
    assert_eq!(y.dims(), &[2, 3, 6]);
    let strided = x.transpose(0, 1).unwrap();
    close("strided", &weight.forward(&strided).unwrap().transpose(0, 1).unwrap(), &y, 1e-6);
    assert_eq!(weight.forward(&x.get(0).unwrap().get(0).unwrap()).unwrap().dims(), &[6]);
    assert_eq!(weight.forward(&x.narrow(0, 0, 0).unwrap()).unwrap().dims(), &[0, 3, 6]);
}

#[test]
fn the_weight_gets_no_gradient() {
    let mut r = rng(4);
    for dtype in [DType::F32, DType::F64] {
        let w = Var::from_tensor(&randn(&mut r, &[6, 8], dtype)).unwrap();
        let x = Var::from_tensor(&randn(&mut r, &[5, 8], dtype)).unwrap();
        let weight = Arc::new(FrozenWeight::dense(w.as_tensor().clone()).unwrap());
        let grads = weight.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&w).is_none() && grads.get(&x).is_some());
    }
}

#[test]
fn nf4_follows_its_definition() {
    let book = nf4_code_book();
    let w = randn(&mut rng(5), &[7, 33], DType::F32);
    let values = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for double in [false, true] {
        let weight = FrozenWeight::nf4(&w, double).unwrap();
        let parts = weight.nf4_parts().unwrap();
        assert_eq!((parts.codes.len(), parts.absmax.len(), parts.double.is_some()), (116, 4, double));
        assert_eq!(parts.codes[115] & 15, 7);
        let out = weight.dequantize(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (i, (w, got)) in values.iter().zip(&out).enumerate() {
            let exact =
                values[i / 64 * 64..values.len().min((i / 64 + 1) * 64)].iter().fold(0f32, |m, w| m.max(w.abs()));
            let code =
                (0..16).min_by(|a, b| (book[*a] - w / exact).abs().total_cmp(&(book[*b] - w / exact).abs())).unwrap();
            let byte = parts.codes[i / 2];
            assert_eq!(usize::from(if i % 2 == 0 { byte >> 4 } else { byte & 15 }), code, "entry {i}");
            assert_eq!(*got, book[code] * parts.absmax[i / 64]);
            if double {
                assert!((parts.absmax[i / 64] - exact).abs() < 0.01 * exact);
            } else {
                assert_eq!(parts.absmax[i / 64], exact);
            }
        }
    }
    assert!((FrozenWeight::nf4(&w, true).unwrap().size_in_bytes() as f64) < 0.6 * values.len() as f64);
}

#[test]
fn nf4_of_zeros_is_zero() {
    let w = Tensor::zeros((3, 50), DType::F32, &Device::Cpu).unwrap();
    for weight in weights(&w, false) {
        assert!(flat(&weight.dequantize(DType::F32).unwrap()).iter().all(|w| *w == 0.0), "{}", weight.dtype_name());
    }
}

#[test]
fn dynamic_map_is_that_of_bitsandbytes() {
    let map = dynamic_map();
    assert!(map.windows(2).all(|w| w[0] < w[1]));
    // create_dynamic_map(signed=True): ends, zero, neighbours of zero, and the coarsest fractions.
    assert_eq!((map[255], map[127]), (1.0, 0.0));
    for (at, want) in [(128, 5.5e-7), (126, -5.5e-7), (129, 3.25e-6), (130, 7.75e-6), (254, 0.9929688), (0, -0.9929688)]
    {
        assert!((map[at] - want).abs() <= 2e-7 * want.abs(), "map[{at}] is {}, expected {want}", map[at]);
    }
}

#[test]
fn int8_follows_its_definition() {
    let w = Tensor::new(&[[0.5f32, -1.0, 0.25, 0.0], [254.0, 3.0, -2.0, 1.0]], &Device::Cpu).unwrap();
    let weight = FrozenWeight::int8(&w).unwrap();
    let (codes, absmax) = weight.int8_parts().unwrap();
    assert_eq!(absmax, &[1.0, 254.0]);
    // 63.5 and 0.5, 1.5 round to even.
    assert_eq!(codes, &[64, -127, 32, 0, 127, 2, -1, 0]);
    close("int8", &weight.dequantize(DType::F32).unwrap(), &w, 0.02);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let mut r = rng(6);
    let w = randn(&mut r, &[517, 768], DType::F32);
    for weight in weights(&w, true) {
        let weight = Arc::new(weight);
        for n in [1, 3, 130] {
            let x = randn(&mut r, &[n, 768], DType::F32);
            let what = format!("{} x {n}", weight.dtype_name());
            same_bits_in_any_pool(&what, || everything(&|i| weight.forward(&i[0]), std::slice::from_ref(&x)));
        }
    }
    // Large enough for the parallel matrix product with several blocks of its inner dimension.
    let weight = Arc::new(FrozenWeight::dense(randn(&mut r, &[1000, 1501], DType::F32)).unwrap());
    let x = randn(&mut r, &[300, 1501], DType::F32);
    same_bits_in_any_pool("large f32", || everything(&|i| weight.forward(&i[0]), std::slice::from_ref(&x)));
}

#[test]
fn names_sizes_and_accessors() {
    let w = randn(&mut rng(7), &[4, 256], DType::F32);
    let names: Vec<String> = weights(&w, true).iter().map(FrozenWeight::dtype_name).collect();
    let expected = [
        "f32", "f16", "bf16", "f64", "nf4", "nf4", "int8", "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1",
        "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    ];
    assert_eq!(names, expected);
    for weight in weights(&w, true) {
        assert_eq!((weight.d_out(), weight.d_in()), (4, 256));
        assert!(weight.device().is_cpu() && weight.size_in_bytes() > 0);
        assert_eq!(weight.as_dense().is_some(), matches!(weight, FrozenWeight::Dense(_)));
    }
    assert_eq!(FrozenWeight::int8(&w).unwrap().size_in_bytes(), 1024 + 16);
    assert_eq!(FrozenWeight::nf4(&w, false).unwrap().size_in_bytes(), 512 + 64);
}

#[test]
fn wrong_inputs_are_named() {
    let w = randn(&mut rng(8), &[4, 6], DType::F32);
    assert!(message(FrozenWeight::dense(w.flatten_all().unwrap())).contains("[24]"));
    assert!(FrozenWeight::dense(w.to_dtype(DType::U32).unwrap()).is_err());
    assert!(FrozenWeight::nf4(&w.unsqueeze(0).unwrap(), true).is_err());
    let nan = Tensor::new(&[[0f32, 1.0], [f32::NAN, 0.0]], &Device::Cpu).unwrap();
    assert!(message(FrozenWeight::nf4(&nan, true)).contains("row 1, column 0"));
    assert!(message(FrozenWeight::int8(&nan)).contains("row 1, column 0"));
    let weight = Arc::new(FrozenWeight::dense(w).unwrap());
    let text = message(weight.forward(&Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap()));
    assert!(text.contains("[2, 4]") && text.contains("[4, 6]"), "{text}");
    assert!(weight.forward_transposed(&Tensor::zeros((2, 6), DType::F32, &Device::Cpu).unwrap()).is_err());
    assert!(weight.forward(&Tensor::zeros((2, 6), DType::U32, &Device::Cpu).unwrap()).is_err());
}
