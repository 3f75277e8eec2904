//! Attention: kernel against reference over groups, windows, segments, soft caps and lengths.
#![allow(clippy::unwrap_used)]
mod common;
use candle_core::{DType, Tensor, Var};
use common::*;
use espalier_kernels::attention::{AttentionSpec, Segments, attention, reference};
use std::sync::Arc;

#[derive(Clone, Copy, Debug)]
struct Case {
    b: usize,
    tq: usize,
    tk: usize,
    h: usize,
    kv: usize,
    d: usize,
    dv: usize,
}

fn inputs(case: Case, seed: u64, dtype: DType) -> Vec<Tensor> {
    let Case { b, tq, tk, h, kv, d, dv } = case;
    let mut r = rng(seed);
    vec![
        randn(&mut r, &[b, tq, h, d], dtype),
        randn(&mut r, &[b, tk, kv, d], dtype),
        randn(&mut r, &[b, tk, kv, dv], dtype),
    ]
}

fn plain(d: usize) -> AttentionSpec {
    AttentionSpec { scale: 1.0 / (d as f64).sqrt(), ..Default::default() }
}

/// Segments of uneven lengths, with padding at the end of each row; keys before the queries belong to segment 0.
fn segments(case: Case) -> Arc<Segments> {
    let id = |i: usize, t: usize| match i * 4 / t.max(1) {
        0 => 0,
        1 => 1,
        2 => 5,
        _ if i + 1 == t => Segments::PADDING,
        _ => 7,
    };
    let row = |t: usize| (0..case.b).flat_map(move |_| (0..t).map(move |i| id(i, t))).collect();
    Arc::new(Segments::new(row(case.tq), row(case.tk), case.b))
}

const CASES: [Case; 12] = [
    Case { b: 2, tq: 7, tk: 7, h: 4, kv: 2, d: 8, dv: 8 },
    Case { b: 1, tq: 1, tk: 1, h: 1, kv: 1, d: 1, dv: 1 },
    Case { b: 2, tq: 1, tk: 9, h: 6, kv: 2, d: 16, dv: 5 },
    Case { b: 1, tq: 1, tk: 1300, h: 4, kv: 1, d: 16, dv: 16 },
    Case { b: 1, tq: 2, tk: 130, h: 4, kv: 4, d: 16, dv: 16 },
    Case { b: 1, tq: 65, tk: 65, h: 2, kv: 2, d: 32, dv: 24 },
    Case { b: 2, tq: 130, tk: 130, h: 6, kv: 2, d: 16, dv: 16 },
    Case { b: 1, tq: 40, tk: 100, h: 4, kv: 1, d: 8, dv: 8 },
    Case { b: 1, tq: 100, tk: 40, h: 2, kv: 1, d: 8, dv: 8 },
    Case { b: 0, tq: 4, tk: 4, h: 2, kv: 1, d: 8, dv: 8 },
    Case { b: 2, tq: 0, tk: 4, h: 2, kv: 1, d: 8, dv: 8 },
    Case { b: 2, tq: 3, tk: 0, h: 2, kv: 1, d: 8, dv: 8 },
];

fn specs(case: Case) -> Vec<AttentionSpec> {
    let base = plain(case.d);
    let with = |f: &dyn Fn(&mut AttentionSpec)| {
        let mut spec = base.clone();
        f(&mut spec);
        spec
    };
    vec![
        base.clone(),
        with(&|s| s.causal = true),
        with(&|s| (s.causal, s.window) = (true, Some(5))),
        with(&|s| (s.causal, s.window) = (true, Some(70))),
        with(&|s| s.window = Some(3)),
        with(&|s| s.window = Some(0)),
        with(&|s| (s.causal, s.softcap) = (true, Some(1.5))),
        with(&|s| (s.causal, s.segments) = (true, Some(segments(case)))),
        with(&|s| s.segments = Some(segments(case))),
        with(&|s| (s.causal, s.window, s.softcap, s.segments) = (true, Some(9), Some(2.0), Some(segments(case)))),
    ]
}

#[test]
fn kernel_matches_the_f64_reference_in_values_and_gradients() {
    for (seed, case) in CASES.into_iter().enumerate() {
        for spec in specs(case) {
            let op = |i: &[Tensor]| attention(&i[0], &i[1], &i[2], &spec);
            matches_f64(&format!("{case:?} {spec:?}"), &op, &inputs(case, seed as u64, DType::F32), 6e-6);
        }
        for dtype in [DType::BF16, DType::F16] {
            let spec = &specs(case)[1];
            let op = |i: &[Tensor]| attention(&i[0], &i[1], &i[2], spec);
            matches_f64(&format!("{case:?} {dtype:?}"), &op, &inputs(case, seed as u64, dtype), rounding(dtype));
        }
    }
}

#[test]
fn random_shapes_match_too() {
    use rand::Rng;
    let mut r = rng(77);
    for seed in 0..25 {
        let kv = r.random_range(1..4);
        let case = Case {
            b: r.random_range(1..3),
            tq: r.random_range(1..150),
            tk: r.random_range(1..150),
            h: kv * r.random_range(1..4),
            kv,
            d: r.random_range(1..40),
            dv: r.random_range(1..40),
        };
        for spec in specs(case) {
            let op = |i: &[Tensor]| attention(&i[0], &i[1], &i[2], &spec);
            matches_f64(&format!("{case:?} {spec:?}"), &op, &inputs(case, seed, DType::F32), 6e-6);
        }
    }
}

#[test]
fn reference_matches_finite_differences() {
    let case = Case { b: 2, tq: 4, tk: 5, h: 2, kv: 1, d: 3, dv: 2 };
    for spec in specs(case) {
        let op = |i: &[Tensor]| reference::attention(&i[0], &i[1], &i[2], &spec);
        finite_differences(&format!("{spec:?}"), &op, &inputs(case, 5, DType::F64));
    }
}

#[test]
fn packed_segments_equal_separate_sequences() {
    let case = Case { b: 1, tq: 90, tk: 90, h: 4, kv: 2, d: 16, dv: 16 };
    let x = inputs(case, 8, DType::F32);
    let ids: Vec<u32> = (0..90).map(|i| if i < 37 { 4 } else { 2 }).collect();
    let segments = Arc::new(Segments::new(ids.clone(), ids, 1));
    let spec = AttentionSpec { causal: true, ..plain(16) };
    let packed = attention(&x[0], &x[1], &x[2], &AttentionSpec { segments: Some(segments), ..spec.clone() }).unwrap();
    for (start, len) in [(0, 37), (37, 53)] {
        let part: Vec<Tensor> = x.iter().map(|x| x.narrow(1, start, len).unwrap()).collect();
        let alone = attention(&part[0], &part[1], &part[2], &spec).unwrap();
        close("packed", &packed.narrow(1, start, len).unwrap(), &alone, 2e-6);
    }
}

#[test]
fn one_token_at_a_time_equals_all_at_once() {
    let case = Case { b: 2, tq: 70, tk: 70, h: 4, kv: 2, d: 16, dv: 16 };
    let x = inputs(case, 9, DType::F32);
    let spec = AttentionSpec { causal: true, window: Some(33), ..plain(16) };
    let all = attention(&x[0], &x[1], &x[2], &spec).unwrap();
    for i in [0, 1, 40, 69] {
        let part = |x: &Tensor| x.narrow(1, 0, i + 1).unwrap();
        let one = attention(&x[0].narrow(1, i, 1).unwrap(), &part(&x[1]), &part(&x[2]), &spec).unwrap();
        close("decode", &one, &all.narrow(1, i, 1).unwrap(), 2e-6);
    }
}

#[test]
fn queries_that_see_nothing_give_zeros_and_no_gradient() {
    let case = Case { b: 1, tq: 5, tk: 2, h: 2, kv: 1, d: 4, dv: 4 };
    let x = inputs(case, 10, DType::F32);
    let spec = AttentionSpec { causal: true, ..plain(4) };
    let (y, grads) = value_and_gradients(&|i| attention(&i[0], &i[1], &i[2], &spec), &x);
    assert!(flat(&y.narrow(1, 0, 3).unwrap()).iter().all(|y| *y == 0.0));
    assert!(flat(&grads[0].narrow(1, 0, 3).unwrap()).iter().all(|g| *g == 0.0));
    assert!(flat(&y.narrow(1, 3, 2).unwrap()).iter().all(|y| *y != 0.0));
}

#[test]
fn only_tracked_inputs_get_gradients_and_strided_inputs_work() {
    let case = Case { b: 2, tq: 9, tk: 9, h: 2, kv: 2, d: 8, dv: 8 };
    let x: Vec<Tensor> = inputs(case, 11, DType::F32);
    let spec = AttentionSpec { causal: true, ..plain(8) };
    for which in 0..3 {
        let mut mixed = x.clone();
        let var = Var::from_tensor(&x[which]).unwrap();
        mixed[which] = var.as_tensor().clone();
        let grads = attention(&mixed[0], &mixed[1], &mixed[2], &spec).unwrap().sum_all().unwrap().backward().unwrap();
        assert!((0..3).all(|i| grads.get(&mixed[i]).is_some() == (i == which)));
    }
    // [b, h, t, d] seen as [b, t, h, d]
    let strided: Vec<Tensor> =
        x.iter().map(|x| x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap()).collect();
    let y = attention(&strided[0], &strided[1], &strided[2], &spec).unwrap();
    assert_eq!(bits(&y), bits(&attention(&x[0], &x[1], &x[2], &spec).unwrap()));
}

#[test]
fn bits_do_not_depend_on_threads() {
    let spec = AttentionSpec { causal: true, ..plain(32) };
    for case in [
        Case { b: 2, tq: 150, tk: 150, h: 4, kv: 2, d: 32, dv: 32 },
        Case { b: 1, tq: 1, tk: 3000, h: 8, kv: 2, d: 32, dv: 32 },
    ] {
        let x = inputs(case, 12, DType::F32);
        same_bits_in_any_pool("attention", || everything(&|i| attention(&i[0], &i[1], &i[2], &spec), &x));
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let case = Case { b: 1, tq: 70, tk: 70, h: 1, kv: 1, d: 4, dv: 4 };
    let x: Vec<Tensor> = inputs(case, 13, DType::F32).iter().map(|x| (x * 50.0).unwrap()).collect();
    let spec = AttentionSpec { scale: 1.0, causal: true, ..Default::default() };
    let (y, grads) = value_and_gradients(&|i| attention(&i[0], &i[1], &i[2], &spec), &x);
    assert!(grads.iter().chain([&y]).all(|t| flat(t).iter().all(|v| v.is_finite())));
}

#[test]
fn wrong_inputs_are_named() {
    let case = Case { b: 1, tq: 3, tk: 3, h: 3, kv: 2, d: 4, dv: 4 };
    let x = inputs(case, 14, DType::F32);
    let text = message(attention(&x[0], &x[1], &x[2], &plain(4)));
    assert!(text.contains("[1, 3, 3, 4]") && text.contains("[1, 3, 2, 4]"), "{text}");
    let x = inputs(Case { h: 2, ..case }, 14, DType::F32);
    assert!(attention(&x[0], &x[1].to_dtype(DType::BF16).unwrap(), &x[2], &plain(4)).is_err());
    let cap = AttentionSpec { softcap: Some(0.0), ..plain(4) };
    assert!(message(attention(&x[0], &x[1], &x[2], &cap)).contains("soft cap"));
    let short = Arc::new(Segments::new(vec![0; 2], vec![0; 3], 1));
    let spec = AttentionSpec { segments: Some(short), ..plain(4) };
    assert!(message(attention(&x[0], &x[1], &x[2], &spec)).contains("2 query"));
}

#[test]
fn keys_in_a_longer_cache_give_the_bits_of_copied_ones() {
    let (b, kv, d, room) = (3, 2, 8, 40);
    for dtype in FUSED {
        let (keys, values) =
            (randn(&mut rng(1), &[b, room, kv, d], dtype), randn(&mut rng(2), &[b, room, kv, d], dtype));
        for (tq, tk) in [(1, 1), (1, 39), (5, 12), (33, 33)] {
            let q = randn(&mut rng(3), &[b, tq, 4, d], dtype);
            for window in [None, Some(7)] {
                let spec = AttentionSpec { scale: 0.3, causal: true, window, ..AttentionSpec::default() };
                let [k, v] = [&keys, &values].map(|t| t.narrow(1, 0, tk).unwrap());
                let there = attention(&q, &k, &v, &spec).unwrap();
                let copied = attention(&q, &k.contiguous().unwrap(), &v.contiguous().unwrap(), &spec).unwrap();
                assert_eq!(bits(&there), bits(&copied), "{dtype:?} {tq} of {tk}, window {window:?}");
            }
        }
    }
}
