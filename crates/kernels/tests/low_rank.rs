//! The fused low-rank product: kernel against reference, reference against finite differences.
#![allow(clippy::unwrap_used)]
mod common;
use candle_core::{DType, Tensor};
use common::*;
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::low_rank::{low_rank_linear, reference};
use std::sync::Arc;

fn inputs(seed: u64, rows: &[usize], d_out: usize, d_in: usize, rank: usize, dtype: DType) -> (Tensor, [Tensor; 3]) {
    let mut r = rng(seed);
    let small = |t: Tensor, by: usize| (t * (1.0 / (by as f64).sqrt())).unwrap();
    let w = small(randn(&mut r, &[d_out, d_in], DType::F32), d_in);
    let x = randn(&mut r, &[rows, &[d_in]].concat(), dtype);
    let a = small(randn(&mut r, &[rank, d_in], DType::F32), d_in);
    let b = small(randn(&mut r, &[d_out, rank], DType::F32), rank);
    (w, [x, a, b])
}

#[test]
fn kernel_matches_the_reference_in_values_and_gradients() {
    // Rows on both sides of the dispatch of the frozen product, odd sizes, no rows, one row, a rank above a dimension.
    let shapes = [
        (vec![3, 5], 33, 17, 4),
        (vec![1], 8, 64, 1),
        (vec![0], 7, 9, 3),
        (vec![2, 0], 5, 6, 2),
        (vec![300], 96, 130, 16),
        (vec![4], 3, 5, 11),
    ];
    for (rows, d_out, d_in, rank) in shapes {
        for dtype in FUSED {
            let (w, given) = inputs(7, &rows, d_out, d_in, rank, dtype);
            let weight = Arc::new(FrozenWeight::dense(w).unwrap());
            let fused = |i: &[Tensor]| low_rank_linear(&weight, &i[0], &i[1], &i[2], 1.5);
            let plain = |i: &[Tensor]| reference::low_rank_linear(&weight, &i[0], &i[1], &i[2], 1.5);
            let (y, grads) = value_and_gradients(&fused, &given);
            let (y_ref, grads_ref) = value_and_gradients(&plain, &given);
            let what = format!("{rows:?} {d_out}x{d_in} rank {rank} {dtype:?}");
            let tolerance = 4.0 * rounding(dtype);
            close(&what, &y, &y_ref, tolerance);
            for (name, (ours, theirs)) in ["dx", "dA", "dB"].iter().zip(grads.iter().zip(&grads_ref)) {
                close(&format!("{what} {name}"), ours, theirs, tolerance);
            }
        }
    }
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    let (w, given) = inputs(3, &[257], 192, 160, 8, DType::F32);
    let weight = Arc::new(FrozenWeight::dense(w).unwrap());
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let op = |i: &[Tensor]| low_rank_linear(&weight, &i[0], &i[1], &i[2], 2.0);
            let (y, grads) = value_and_gradients(&op, &given);
            std::iter::once(&y).chain(&grads).flat_map(bits).collect::<Vec<_>>()
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(4));
}

#[test]
fn reference_matches_finite_differences() {
    let (w, given) = inputs(5, &[2, 3], 4, 5, 2, DType::F64);
    let weight = Arc::new(FrozenWeight::dense(w.to_dtype(DType::F64).unwrap()).unwrap());
    let given = given.map(|t| t.to_dtype(DType::F64).unwrap());
    finite_differences("low rank", &|i| reference::low_rank_linear(&weight, &i[0], &i[1], &i[2], 0.7), &given);
}

#[test]
fn only_tracked_inputs_get_gradients_and_shapes_are_checked() {
    let (w, [x, a, b]) = inputs(9, &[6], 10, 12, 3, DType::F32);
    let weight = Arc::new(FrozenWeight::dense(w).unwrap());
    let trained = candle_core::Var::from_tensor(&b).unwrap();
    let y = low_rank_linear(&weight, &x, &a, trained.as_tensor(), 1.0).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&trained).is_some() && grads.get(&x).is_none() && grads.get(&a).is_none());
    let error = low_rank_linear(&weight, &x, &b, &a, 1.0).unwrap_err().to_string();
    assert!(error.contains("[10, 12]"), "{error}");
}
