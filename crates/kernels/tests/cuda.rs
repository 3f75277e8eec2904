//! The CUDA kernels against the references in f64 on the CPU. Without a device these tests say so and end.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]
mod common;
use candle_core::{DType, Device, Tensor};
use common::parts::*;
use common::*;
use espalier_kernels::attention::{AttentionSpec, Segments};
use espalier_kernels::cross_entropy::{linear_cross_entropy, reference as loss};
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::norm::{layer_norm, reference as norm, rms_norm};
use espalier_kernels::part::{
    AttentionPart, FeedForwardPart, Gain, PartNorm, Projection, attention_part, feed_forward_part, reference,
};
use espalier_kernels::rows::put_rows;
use std::sync::Arc;

fn device() -> Option<Device> {
    let device = Device::new_cuda(0).ok();
    if device.is_none() {
        println!("skipped: no CUDA device");
    }
    device
}

fn rounded(x: &Tensor) -> Tensor {
    x.to_dtype(DType::BF16).unwrap()
}

/// A projection with its weights in bf16, and the same on a device.
fn projections(on: &Device, all: &[Projection]) -> (Vec<Projection>, Vec<Projection>) {
    let weights: Vec<Tensor> = all.iter().map(|p| rounded(p.weight.as_dense().unwrap())).collect();
    // On the device the weights of a group are in one piece, as a model lays them.
    let apart: Vec<_> = weights.iter().map(|w| FrozenWeight::dense(w.to_device(on).unwrap()).unwrap()).collect();
    let together = FrozenWeight::lay_together(&apart.iter().collect::<Vec<_>>()).unwrap().unwrap();
    all.iter()
        .zip(weights.iter().zip(together))
        .map(|(p, (weight, there))| {
            let bias = p.bias.as_ref().map(rounded);
            let on_cpu = Projection {
                weight: Arc::new(FrozenWeight::dense(weight.clone()).unwrap()),
                bias: bias.clone(),
                low_rank: p.low_rank.clone(),
            };
            let there = Projection {
                weight: Arc::new(there),
                bias: bias.map(|b| b.to_device(on).unwrap()),
                low_rank: p.low_rank.clone(),
            };
            (on_cpu, there)
        })
        .unzip()
}

/// The same with gains over the norms of their rows.
fn over_norms(all: &mut [Projection]) {
    for p in all {
        let square = p.weight.row_squares().unwrap().to_dtype(DType::F32).unwrap();
        if let Some(factors) = &mut p.low_rank {
            factors.gain = Some(Gain::OverNorm { square });
        }
    }
}

fn norms(on: &Device, norm: &PartNorm) -> (PartNorm, PartNorm) {
    let pair = |t: &Tensor| (rounded(t), rounded(t).to_device(on).unwrap());
    match norm {
        PartNorm::Rms { weight, eps, offset } => {
            let (a, b) = pair(weight);
            let with = |weight| PartNorm::Rms { weight, eps: *eps, offset: *offset };
            (with(a), with(b))
        }
        PartNorm::Layer { weight, bias, eps } => {
            let ((a, b), (c, d)) = (pair(weight), pair(bias));
            let with = |weight, bias| PartNorm::Layer { weight, bias, eps: *eps };
            (with(a, c), with(b, d))
        }
    }
}

/// The kernels of the device against the reference in f64, in the value and all gradients, as part of the largest entry.
fn agree(
    what: &str,
    on: &Device,
    x: &Tensor,
    flat: &Tensor,
    kernel: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    cpu: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    plain: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
) {
    let there = [x.to_device(on).unwrap(), flat.to_device(on).unwrap()];
    let (y, grads) = gradients_on(on, &|i| kernel(&i[0], &i[1]), &there);
    let wide = [x.to_dtype(DType::F64).unwrap(), flat.to_dtype(DType::F64).unwrap()];
    let (want, want_grads) = value_and_gradients(&|i| plain(&i[0], &i[1]), &wide);
    let tolerance = 8.0 * rounding(DType::BF16);
    close(what, &y, &want, tolerance);
    close(&format!("{what}, dx"), &grads[0], &want_grads[0], 2.0 * tolerance);
    close(&format!("{what}, parameters"), &grads[1], &want_grads[1], 2.0 * tolerance);
    // Single entries may be off by roundings; on the whole not by more than the CPU's bf16 kernels, which keep scores and their
    // slopes in f32 where the device rounds them too.
    let (rounded, rounded_grads) = value_and_gradients(&|i| cpu(&i[0], &i[1]), &[x.clone(), flat.clone()]);
    mean_close(what, &y, &want, &rounded);
    mean_close(&format!("{what}, dx"), &grads[0], &want_grads[0], &rounded_grads[0]);
    mean_close(&format!("{what}, parameters"), &grads[1], &want_grads[1], &rounded_grads[1]);
}

/// Root mean square of a - b within 2.5 times that of rounded - b, or 0.5 % of that of b (three roundings to bf16).
fn mean_close(what: &str, a: &Tensor, b: &Tensor, rounded: &Tensor) {
    let (a, b, rounded) = (flat(a), flat(b), flat(rounded));
    let off = |x: &[f64]| x.iter().zip(&b).map(|(x, b)| (x - b).powi(2)).sum::<f64>().sqrt();
    let size = b.iter().map(|b| b * b).sum::<f64>().sqrt();
    // What is zero exactly may be of the size of a rounding.
    let allowed = (2.5 * off(&rounded)).max(0.005 * size).max(1e-4 * (b.len() as f64).sqrt());
    assert!(off(&a) <= allowed, "{what}: {} of {size}, the CPU's {}", off(&a), off(&rounded));
}

/// As `value_and_gradients`, with the same random weights of the sum on a device.
fn gradients_on(on: &Device, op: Op<'_>, inputs: &[Tensor]) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<candle_core::Var> = inputs.iter().map(|x| candle_core::Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tensors).unwrap();
    let r = randn(&mut rng(99), y.dims(), DType::F32).to_dtype(y.dtype()).unwrap().to_device(on).unwrap();
    let grads = (&y * r).unwrap().sum_all().unwrap().backward().unwrap();
    let cpu = |t: &Tensor| t.to_device(&Device::Cpu).unwrap();
    let all = vars.iter().map(|v| cpu(&grads.get(v).cloned().unwrap_or_else(|| v.zeros_like().unwrap()))).collect();
    (cpu(&y.detach()), all)
}

#[test]
fn feed_forward_equals_its_reference() {
    let Some(on) = device() else { return };
    for shape in ["gate and up", "fused", "plain"] {
        let kinds =
            [("plain", PLAIN), ("lora", LORA), ("gains", DORA), ("dora", DORA), ("biased", BIASED), ("wide", WIDE)];
        for (name, kind) in kinds {
            for (b, t, h, ff) in [(2, 5, 24, 40), (1, 1, 64, 128), (3, 37, 64, 96), (2, 150, 128, 352)] {
                let (part, flat) = feed(5, (h, ff), kind, shape);
                let (cpu_norm, norm) = norms(&on, part.norm.as_ref().unwrap());
                let (mut cpu_inputs, mut inputs) = projections(&on, &part.inputs);
                let (mut cpu_output, mut output) = projections(&on, std::slice::from_ref(&part.output));
                if name == "dora" {
                    [&mut cpu_inputs, &mut inputs, &mut cpu_output, &mut output]
                        .into_iter()
                        .for_each(|all| over_norms(all));
                }
                let with = |norm, inputs, output| {
                    Arc::new(FeedForwardPart { norm: Some(norm), inputs, output, ..(*part).clone() })
                };
                let there = with(norm, inputs, output.pop().unwrap());
                let cpu = with(cpu_norm, cpu_inputs, cpu_output.pop().unwrap());
                let x = randn(&mut rng(9), &[b, t, h], DType::BF16);
                assert!(there.is_fused(&x.to_device(&on).unwrap(), &[]).unwrap());
                agree(
                    &format!("feed-forward {shape} {name} [{b}, {t}, {h}, {ff}]"),
                    &on,
                    &x,
                    &flat,
                    |x, p| feed_forward_part(x, Some(p), &there),
                    |x, p| feed_forward_part(x, Some(p), &cpu),
                    |x, p| reference::feed_forward_part(x, p, &cpu),
                );
            }
        }
    }
}

#[test]
fn thin_products_of_odd_sizes_equal_their_reference() {
    let Some(on) = device() else { return };
    // Ranks of each of the kernels, none of which fills the last strip of columns; 60 is left to the library.
    for (rank, gain) in [(8, false), (16, true), (24, false), (40, true), (64, false), (60, false)] {
        for (b, t) in [(1, 1), (3, 43), (2, 300)] {
            let (part, flat) = feed(5, (264, 520), Kind { rank, gain, bias: false }, "gate and up");
            let (cpu_norm, norm) = norms(&on, part.norm.as_ref().unwrap());
            let (cpu_inputs, inputs) = projections(&on, &part.inputs);
            let (mut cpu_output, mut output) = projections(&on, std::slice::from_ref(&part.output));
            let with = |norm, inputs, output| {
                Arc::new(FeedForwardPart { norm: Some(norm), inputs, output, ..(*part).clone() })
            };
            let there = with(norm, inputs, output.pop().unwrap());
            let cpu = with(cpu_norm, cpu_inputs, cpu_output.pop().unwrap());
            agree(
                &format!("thin products of rank {rank}, [{b}, {t}]"),
                &on,
                &randn(&mut rng(9), &[b, t, 264], DType::BF16),
                &flat,
                |x, p| feed_forward_part(x, Some(p), &there),
                |x, p| feed_forward_part(x, Some(p), &cpu),
                |x, p| reference::feed_forward_part(x, p, &cpu),
            );
        }
    }
}

#[test]
fn attention_equals_its_reference() {
    let Some(on) = device() else { return };
    let segments = |b: usize, t: usize| {
        let ids: Vec<u32> =
            (0..b * t).map(|i| if i % t >= t - t / 8 { Segments::PADDING } else { (i % t / 45) as u32 }).collect();
        Arc::new(Segments::new(ids.clone(), ids, b))
    };
    let causal = || AttentionSpec { causal: true, ..AttentionSpec::default() };
    // Below, at and above the tiles of 64, 128 and 192 rows.
    for (b, t, heads) in [
        (2, 1, (2, 1, 64)),
        (2, 63, (4, 2, 64)),
        (1, 128, (2, 2, 64)),
        (2, 193, (8, 1, 64)),
        (1, 400, (4, 4, 64)),
        (1, 5, (2, 1, 128)),
        (2, 130, (4, 2, 128)),
        (1, 333, (2, 2, 128)),
    ] {
        let cases = [
            ("causal", causal()),
            ("both ways", AttentionSpec::default()),
            ("window", AttentionSpec { window: Some(70), ..causal() }),
            ("window both ways", AttentionSpec { window: Some(30), ..AttentionSpec::default() }),
            ("packed", AttentionSpec { segments: Some(segments(b, t)), ..causal() }),
        ];
        for (which, spec) in cases {
            for (name, kind, is_fused) in [("lora", LORA, false), ("dora", DORA, false), ("biased", BIASED, true)] {
                let (part, flat) = attend(6, heads, kind, is_fused, t, spec.clone());
                let (cpu_norm, norm) = norms(&on, part.norm.as_ref().unwrap());
                let (mut cpu_inputs, mut inputs) = projections(&on, &part.inputs);
                let (mut cpu_output, mut output) = projections(&on, std::slice::from_ref(&part.output));
                if name == "dora" {
                    [&mut cpu_inputs, &mut inputs, &mut cpu_output, &mut output]
                        .into_iter()
                        .for_each(|all| over_norms(all));
                }
                let with = |norm, inputs, output, rotary| {
                    Arc::new(AttentionPart { norm: Some(norm), inputs, output, rotary, ..(*part).clone() })
                };
                let turned = part.rotary.as_ref();
                let rotary = turned.map(|(c, s)| (c.to_device(&on).unwrap(), s.to_device(&on).unwrap()));
                let there = with(norm, inputs, output.pop().unwrap(), rotary);
                let cpu = with(cpu_norm, cpu_inputs, cpu_output.pop().unwrap(), part.rotary.clone());
                let x = randn(&mut rng(11), &[b, t, heads.0 * heads.2], DType::BF16);
                assert!(there.is_fused(&x.to_device(&on).unwrap(), &[]).unwrap());
                agree(
                    &format!("attention {which} {name} [{b}, {t}] {heads:?}"),
                    &on,
                    &x,
                    &flat,
                    |x, p| attention_part(x, Some(p), &there),
                    |x, p| attention_part(x, Some(p), &cpu),
                    |x, p| reference::attention_part(x, p, &cpu),
                );
            }
        }
    }
}

#[test]
fn a_gradient_with_room_behind_its_rows_is_the_same_gradient() {
    let Some(on) = device() else { return };
    for (name, kind) in [("lora", LORA), ("dora", DORA), ("wide", WIDE)] {
        for (b, t) in [(1, 1), (3, 37)] {
            let on_device = |norm: &Option<PartNorm>, all: &[Projection]| {
                (norm.as_ref().map(|n| norms(&on, n).1), projections(&on, all).1)
            };
            let ((a, a_flat), (f, f_flat)) = (
                attend(6, (2, 1, 64), kind, false, t, AttentionSpec { causal: true, ..AttentionSpec::default() }),
                feed(5, (128, 352), kind, "gate and up"),
            );
            let ((norm, inputs), output) =
                (on_device(&a.norm, &a.inputs), projections(&on, std::slice::from_ref(&a.output)).1.remove(0));
            let rotary = a.rotary.as_ref().map(|(c, s)| (c.to_device(&on).unwrap(), s.to_device(&on).unwrap()));
            let a = Arc::new(AttentionPart { norm, inputs, output, rotary, ..(*a).clone() });
            let ((norm, inputs), output) =
                (on_device(&f.norm, &f.inputs), projections(&on, std::slice::from_ref(&f.output)).1.remove(0));
            let f = Arc::new(FeedForwardPart { norm, inputs, output, ..(*f).clone() });
            let [x, g] = [9, 10].map(|seed| randn(&mut rng(seed), &[b, t, 128], DType::BF16).to_device(&on).unwrap());
            let (a_flat, f_flat) = (a_flat.to_device(&on).unwrap(), f_flat.to_device(&on).unwrap());
            let above = f.node(&x, Some(&f_flat)).unwrap().1;
            let upstream = || above.backward(&g.clone().into(), (true, true)).unwrap().0.unwrap();
            let apart = Tensor::from(upstream());
            assert!(!apart.is_contiguous() || b * t == 1, "no room behind the rows");
            let below = a.node(&x, Some(&a_flat)).unwrap().1;
            let (dx, d) = below.backward(&upstream(), (true, true)).unwrap();
            let (want, want_d) = below.backward(&apart.contiguous().unwrap().into(), (true, true)).unwrap();
            let tolerance = 4.0 * rounding(DType::BF16);
            let what = format!("{name} [{b}, {t}]");
            let cpu = |t: Tensor| t.contiguous().unwrap().to_device(&Device::Cpu).unwrap();
            close(&format!("{what}, dx"), &cpu(dx.unwrap().into()), &cpu(want.unwrap().into()), tolerance);
            close(&format!("{what}, parameters"), &cpu(d.unwrap()), &cpu(want_d.unwrap()), tolerance);
        }
    }
}

#[test]
fn what_no_kernel_handles_runs_by_definition() {
    let Some(on) = device() else { return };
    let spec = AttentionSpec { causal: true, softcap: Some(2.0), ..AttentionSpec::default() };
    let (part, flat) = attend(6, (2, 1, 8), LORA, false, 9, spec);
    let (_, norm) = norms(&on, part.norm.as_ref().unwrap());
    let (_, inputs) = projections(&on, &part.inputs);
    let (_, mut output) = projections(&on, std::slice::from_ref(&part.output));
    let turned = part.rotary.as_ref();
    let rotary = turned.map(|(c, s)| (c.to_device(&on).unwrap(), s.to_device(&on).unwrap()));
    let part = AttentionPart { norm: Some(norm), inputs, output: output.pop().unwrap(), rotary, ..(*part).clone() };
    let x = randn(&mut rng(11), &[1, 9, 16], DType::BF16).to_device(&on).unwrap();
    let flat = flat.to_device(&on).unwrap();
    assert!(!part.is_fused(&x, std::slice::from_ref(&flat)).unwrap());
    assert!(Arc::new(part.clone()).node(&x, Some(&flat)).unwrap_err().to_string().contains("no fused kernel"));
    assert_eq!(attention_part(&x, Some(&flat), &Arc::new(part)).unwrap().dims(), [1, 9, 16]);
}

#[test]
fn norms_equal_their_references() {
    let Some(on) = device() else { return };
    for (n, h) in [(1, 8), (3, 63), (70, 512), (5, 2048), (9, 5000), (2, 16384)] {
        let x = randn(&mut rng(1), &[n, h], DType::BF16);
        let (w, b) = (randn(&mut rng(2), &[h], DType::BF16), randn(&mut rng(3), &[h], DType::F32));
        let (w_on, b_on) = (w.to_device(&on).unwrap(), b.to_device(&on).unwrap());
        let wide = [x.to_dtype(DType::F64).unwrap()];
        let there = [x.to_device(&on).unwrap()];
        let tolerance = 2.0 * rounding(DType::BF16);
        let (y, g) = gradients_on(&on, &|i| rms_norm(&i[0], &w_on, 1e-6, 1.0), &there);
        let (want, want_g) = value_and_gradients(&|i| norm::rms_norm(&i[0], &w, 1e-6, 1.0), &wide);
        close(&format!("rms [{n}, {h}]"), &y, &want, tolerance);
        close(&format!("rms [{n}, {h}] dx"), &g[0], &want_g[0], 2.0 * tolerance);
        let (y, g) = gradients_on(&on, &|i| layer_norm(&i[0], &w_on, Some(&b_on), 1e-5), &there);
        let (want, want_g) = value_and_gradients(&|i| norm::layer_norm(&i[0], &w, Some(&b), 1e-5), &wide);
        close(&format!("layer [{n}, {h}]"), &y, &want, tolerance);
        close(&format!("layer [{n}, {h}] dx"), &g[0], &want_g[0], 2.0 * tolerance);
    }
}

#[test]
fn the_fused_loss_equals_its_reference() {
    let Some(on) = device() else { return };
    for (n, h, v) in [(1, 16, 40), (7, 64, 1000), (33, 128, 32000), (3, 32, 151_936)] {
        let x = randn(&mut rng(1), &[n, h], DType::BF16);
        let w = (randn(&mut rng(2), &[v, h], DType::F32) * 0.3).unwrap().to_dtype(DType::BF16).unwrap();
        let labels: Vec<u32> = (0..n).map(|i| ((i * 7919) % v) as u32).collect();
        let weight = Arc::new(FrozenWeight::dense(w.to_device(&on).unwrap()).unwrap());
        let (y, g) =
            gradients_on(&on, &|i| linear_cross_entropy(&i[0], &weight, &labels), &[x.to_device(&on).unwrap()]);
        let wide = w.to_dtype(DType::F64).unwrap();
        let plain = |i: &[Tensor]| loss::cross_entropy(&i[0].matmul(&wide.t()?)?, &labels, None);
        let (want, want_g) = value_and_gradients(&plain, &[x.to_dtype(DType::F64).unwrap()]);
        close(&format!("loss [{n}, {h}, {v}]"), &y, &want, 2.0 * rounding(DType::BF16));
        close(&format!("loss [{n}, {h}, {v}] dx"), &g[0], &want_g[0], 8.0 * rounding(DType::BF16));
    }
}

#[test]
fn rows_go_to_their_places() {
    let Some(on) = device() else { return };
    let rows = randn(&mut rng(1), &[5, 24], DType::BF16);
    let index = Tensor::new(&[9u32, 0, 3, 4, 7], &Device::Cpu).unwrap();
    let zeros = Tensor::zeros((10, 24), DType::BF16, &Device::Cpu).unwrap();
    let want = put_rows(&zeros, &index, &rows).unwrap();
    let [zeros, index, rows] = [zeros, index, rows].map(|t| t.to_device(&on).unwrap());
    let got = put_rows(&zeros, &index, &rows).unwrap().to_device(&Device::Cpu).unwrap();
    assert_eq!(bits(&got), bits(&want));
}

#[test]
fn quantised_weights_are_read_as_on_the_cpu() {
    let Some(on) = device() else { return };
    for (d_out, d_in) in [(24, 64), (7, 33), (130, 256)] {
        let w = randn(&mut rng(4), &[d_out, d_in], DType::F32);
        let there = w.to_device(&on).unwrap();
        let pairs = [
            (FrozenWeight::nf4(&w, false).unwrap(), FrozenWeight::nf4(&there, false).unwrap()),
            (FrozenWeight::nf4(&w, true).unwrap(), FrozenWeight::nf4(&there, true).unwrap()),
            (FrozenWeight::int8(&w).unwrap(), FrozenWeight::int8(&there).unwrap()),
        ];
        for (cpu, gpu) in pairs {
            let want = cpu.dequantize(DType::BF16).unwrap();
            let got = gpu.dequantize(DType::BF16).unwrap().to_device(&Device::Cpu).unwrap();
            close(&format!("{} [{d_out}, {d_in}]", cpu.dtype_name()), &got, &want, rounding(DType::BF16));
        }
    }
}
