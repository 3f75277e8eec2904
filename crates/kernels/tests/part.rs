//! The fused halves of a block against their references, in values and all gradients.
#![allow(clippy::unwrap_used)]
mod common;
use candle_core::{DType, Tensor};
use common::parts::*;
use common::*;
use espalier_kernels::attention::{AttentionSpec, Segments};
use espalier_kernels::part::{
    AttentionPart, Factors, FeedForwardPart, Gain, Projection, Upstream, attention_part, feed_forward_part, reference,
};
use std::sync::Arc;

/// Fused against the reference in f64, in the value and in the gradients of x and of the parameters.
fn agree(
    what: &str,
    x: &Tensor,
    flat: &Tensor,
    fused: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    plain: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
) {
    let (y, grads) = value_and_gradients(&|i| fused(&i[0], &i[1]), &[x.clone(), flat.clone()]);
    let wide = [x.to_dtype(DType::F64).unwrap(), flat.to_dtype(DType::F64).unwrap()];
    let (want, want_grads) = value_and_gradients(&|i| plain(&i[0], &i[1]), &wide);
    // Several roundings of the storage type lie on the way.
    let tolerance = 6.0 * rounding(x.dtype());
    close(what, &y, &want, tolerance);
    close(&format!("{what}, dx"), &grads[0], &want_grads[0], 2.0 * tolerance);
    close(&format!("{what}, parameters"), &grads[1], &want_grads[1], 2.0 * tolerance);
    assert_eq!((grads[0].dtype(), grads[1].dtype()), (x.dtype(), DType::F32), "{what}");
}

#[test]
fn feed_forward_equals_its_reference() {
    for shape in ["gate and up", "fused", "plain"] {
        for (name, kind) in [("plain", PLAIN), ("lora", LORA), ("dora", DORA), ("biased", BIASED), ("wide", WIDE)] {
            // Odd sizes, one token, rows on both sides of the dot products' threshold, whole tiles and rests.
            for (b, t, h, ff) in [(2, 5, 17, 23), (1, 1, 8, 12), (1, 4, 32, 16), (3, 37, 64, 96)] {
                let (part, flat) = feed(5, (h, ff), kind, shape);
                for dtype in FUSED {
                    let x = randn(&mut rng(9), &[b, t, h], dtype);
                    agree(
                        &format!("feed-forward {shape} {name} [{b}, {t}, {h}] {dtype:?}"),
                        &x,
                        &flat,
                        |x, p| feed_forward_part(x, Some(p), &part),
                        |x, p| reference::feed_forward_part(x, p, &part),
                    );
                }
            }
        }
    }
}

#[test]
fn attention_equals_its_reference() {
    let segments = |b: usize, t: usize| {
        let ids: Vec<u32> =
            (0..b * t).map(|i| if i % t >= t - 1 { Segments::PADDING } else { (i % t / 4) as u32 }).collect();
        Arc::new(Segments::new(ids.clone(), ids, b))
    };
    let causal = || AttentionSpec { causal: true, ..AttentionSpec::default() };
    for (b, t, heads) in [(2, 9, (4, 2, 6)), (1, 1, (2, 1, 8)), (1, 70, (4, 4, 16)), (2, 5, (3, 1, 10))] {
        let cases = [
            ("causal", causal()),
            ("both ways", AttentionSpec::default()),
            ("window", AttentionSpec { window: Some(3), ..causal() }),
            ("packed", AttentionSpec { segments: Some(segments(b, t)), ..causal() }),
            ("capped", AttentionSpec { softcap: Some(2.0), ..causal() }),
        ];
        for (which, spec) in cases {
            for (name, kind, is_fused) in
                [("plain", PLAIN, false), ("lora", LORA, false), ("dora", DORA, true), ("biased", BIASED, true)]
            {
                let (part, flat) = attend(6, heads, kind, is_fused, t, spec.clone());
                for dtype in FUSED {
                    let x = randn(&mut rng(11), &[b, t, heads.0 * heads.2], dtype);
                    agree(
                        &format!("attention {which} {name} [{b}, {t}] {heads:?} {dtype:?}"),
                        &x,
                        &flat,
                        |x, p| attention_part(x, Some(p), &part),
                        |x, p| reference::attention_part(x, p, &part),
                    );
                }
            }
        }
    }
}

#[test]
fn parts_without_norm_or_residual_equal_their_references() {
    let x = randn(&mut rng(9), &[2, 19, 24], DType::F32);
    for (norm, residual) in [(false, true), (true, false), (false, false)] {
        let (part, flat) = feed(5, (24, 40), WIDE, "gate and up");
        let part = Arc::new(FeedForwardPart { norm: part.norm.clone().filter(|_| norm), residual, ..(*part).clone() });
        agree(
            &format!("feed-forward, norm {norm}, residual {residual}"),
            &x,
            &flat,
            |x, p| feed_forward_part(x, Some(p), &part),
            |x, p| reference::feed_forward_part(x, p, &part),
        );
        let (part, flat) = attend(6, (4, 2, 6), WIDE, false, 19, AttentionSpec { causal: true, ..Default::default() });
        let part = Arc::new(AttentionPart {
            norm: part.norm.clone().filter(|_| norm),
            residual,
            rotary: None,
            ..(*part).clone()
        });
        agree(
            &format!("attention, norm {norm}, residual {residual}"),
            &x,
            &flat,
            |x, p| attention_part(x, Some(p), &part),
            |x, p| reference::attention_part(x, p, &part),
        );
    }
}

#[test]
fn the_references_equal_finite_differences() {
    let (part, flat) = feed(1, (4, 5), DORA, "gate and up");
    let x = randn(&mut rng(2), &[1, 3, 4], DType::F64);
    finite_differences("feed-forward", &|i| reference::feed_forward_part(&i[0], &i[1], &part), &[x, flat]);
    let spec = AttentionSpec { causal: true, ..AttentionSpec::default() };
    let (part, flat) = attend(1, (2, 1, 2), DORA, false, 3, spec);
    let x = randn(&mut rng(2), &[1, 3, 4], DType::F64);
    finite_differences("attention", &|i| reference::attention_part(&i[0], &i[1], &part), &[x, flat]);
}

#[test]
fn nodes_give_the_bits_of_the_tape() {
    let spec = AttentionSpec { causal: true, ..AttentionSpec::default() };
    let (attention, a) = attend(3, (4, 2, 8), LORA, false, 33, spec);
    let (feed, f) = feed(4, (32, 48), DORA, "gate and up");
    for dtype in FUSED {
        let x = randn(&mut rng(5), &[2, 33, 32], dtype);
        let g = randn(&mut rng(99), &[2, 33, 32], DType::F32).to_dtype(dtype).unwrap();
        let on_tape = [
            value_and_gradients(&|i| attention_part(&i[0], Some(&i[1]), &attention), &[x.clone(), a.clone()]),
            value_and_gradients(&|i| feed_forward_part(&i[0], Some(&i[1]), &feed), &[x.clone(), f.clone()]),
        ];
        let nodes = [attention.node(&x, Some(&a)).unwrap(), feed.node(&x, Some(&f)).unwrap()];
        for ((y, grads), (y_node, node)) in on_tape.iter().zip(&nodes) {
            assert_eq!(bits(y), bits(y_node));
            let upstream = Upstream::from(g.clone());
            let (dx, dp) = node.backward(&upstream, (true, true)).unwrap();
            assert_eq!(bits(&grads[0]), bits(&dx.unwrap().into()));
            assert_eq!(bits(&grads[1]), bits(&dp.unwrap()));
            let (dx, dp) = node.backward(&upstream, (false, true)).unwrap();
            assert!(dx.is_none());
            assert_eq!(bits(&grads[1]), bits(&dp.unwrap()));
            assert!(node.backward(&g.narrow(1, 0, 3).unwrap().into(), (true, true)).is_err());
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_on_other_rows() {
    let spec = AttentionSpec { causal: true, ..AttentionSpec::default() };
    let (attention, a) = attend(3, (4, 2, 16), LORA, false, 150, spec);
    let (feed, f) = feed(4, (64, 160), LORA, "gate and up");
    for dtype in FUSED {
        let x = randn(&mut rng(5), &[2, 150, 64], dtype);
        same_bits_in_any_pool("parts", || {
            let (y, mut all) =
                value_and_gradients(&|i| attention_part(&i[0], Some(&i[1]), &attention), &[x.clone(), a.clone()]);
            let (z, more) =
                value_and_gradients(&|i| feed_forward_part(&i[0], Some(&i[1]), &feed), &[x.clone(), f.clone()]);
            all.extend(more);
            all.extend([y, z]);
            all
        });
        let whole = feed_forward_part(&attention_part(&x, Some(&a), &attention).unwrap(), Some(&f), &feed).unwrap();
        let second = x.narrow(0, 1, 1).unwrap().contiguous().unwrap();
        let alone =
            feed_forward_part(&attention_part(&second, Some(&a), &attention).unwrap(), Some(&f), &feed).unwrap();
        assert_eq!(bits(&whole.narrow(0, 1, 1).unwrap()), bits(&alone), "{dtype:?}");
    }
}

#[test]
fn no_rows_and_wrong_shapes() {
    let (part, flat) = feed(1, (8, 12), LORA, "gate and up");
    let none = randn(&mut rng(1), &[0, 3, 8], DType::F32);
    let (y, grads) = value_and_gradients(&|i| feed_forward_part(&i[0], Some(&i[1]), &part), &[none, flat.clone()]);
    assert_eq!(y.dims(), [0, 3, 8]);
    assert!(flat_is_zero(&grads[1]));
    let x = randn(&mut rng(1), &[1, 3, 8], DType::F32);
    let short = flat.narrow(0, 0, 5).unwrap();
    let message = feed_forward_part(&x, Some(&short), &part).unwrap_err().to_string();
    assert!(message.contains("[5]"), "{message}");
    let message = feed_forward_part(&x, None, &part).unwrap_err().to_string();
    assert!(message.contains("[0]"), "{message}");
    let spec = AttentionSpec { causal: true, ..AttentionSpec::default() };
    let (part, flat) = attend(1, (2, 1, 4), LORA, false, 3, spec);
    let longer = randn(&mut rng(1), &[1, 4, 8], DType::F32);
    assert!(attention_part(&longer, Some(&flat), &part).unwrap_err().to_string().contains("cos"));
    let short = Some(Arc::new(Segments::new(vec![0; 2], vec![0; 2], 1)));
    let few = AttentionPart { spec: AttentionSpec { segments: short, ..part.spec.clone() }, ..(*part).clone() };
    assert!(attention_part(&x, Some(&flat), &Arc::new(few)).unwrap_err().to_string().contains("2 query"));
    let wrong = Arc::new(AttentionPart { heads: 4, ..(*part).clone() });
    assert!(attention_part(&x, Some(&flat), &wrong).unwrap_err().to_string().contains("outputs"));
}

fn flat_is_zero(x: &Tensor) -> bool {
    flat(x).iter().all(|v| *v == 0.0)
}

#[test]
fn every_instruction_set_passes_these_tests() {
    // The choice is made once a process, so each set has a process of its own.
    if std::env::var_os("ESPALIER_SIMD").is_some() {
        return;
    }
    for level in ["avx512", "avx2", "baseline"] {
        let run =
            std::process::Command::new(std::env::current_exe().unwrap()).env("ESPALIER_SIMD", level).output().unwrap();
        assert!(run.status.success(), "{level}:\n{}", String::from_utf8_lossy(&run.stdout));
    }
}

#[test]
fn gains_over_norms_are_gains_of_that_value() {
    for dtype in FUSED {
        let (part, flat) = feed(5, (24, 40), DORA, "gate and up");
        let over = |p: &Projection| {
            let square = p.weight.row_squares().unwrap().to_dtype(DType::F32).unwrap();
            let low_rank = p.low_rank.clone().map(|f| Factors { gain: Some(Gain::OverNorm { square }), ..f });
            Projection { low_rank, ..p.clone() }
        };
        let normed = Arc::new(FeedForwardPart {
            inputs: part.inputs.iter().map(over).collect(),
            output: over(&part.output),
            ..(*part).clone()
        });
        // The flat vector with each magnitude over the norm of its row of W + s B A.
        let (mut values, mut start) = (common::flat(&flat), 0);
        for group in [&part.inputs[..], std::slice::from_ref(&part.output)] {
            let d_in = group[0].weight.d_in();
            let (first, ranks) = (start, DORA.rank * group.len());
            start += ranks * d_in;
            for (i, p) in group.iter().enumerate() {
                let (d_out, s) = (p.weight.d_out(), p.low_rank.as_ref().unwrap().scale);
                let w = common::flat(p.weight.as_dense().unwrap());
                let (a, b) = (first + i * DORA.rank * d_in, start);
                let gains = b + d_out * DORA.rank;
                for o in 0..d_out {
                    let entry = |j: usize| {
                        let product = |r| values[b + o * DORA.rank + r] * values[a + r * d_in + j];
                        w[o * d_in + j] + s * (0..DORA.rank).map(product).sum::<f64>()
                    };
                    let norm = (0..d_in).map(|j| entry(j).powi(2)).sum::<f64>().sqrt();
                    values[gains + o] /= norm;
                }
                start = gains + d_out;
            }
        }
        let divided = Tensor::new(values, flat.device()).unwrap().to_dtype(DType::F32).unwrap();
        let x = randn(&mut rng(9), &[2, 5, 24], dtype);
        assert!(!normed.is_fused(&x, &[]).unwrap());
        let got = feed_forward_part(&x, Some(&flat), &normed).unwrap();
        let want = feed_forward_part(&x, Some(&divided), &part).unwrap();
        close(&format!("{dtype:?}"), &got, &want, 6.0 * rounding(dtype));
    }
}
