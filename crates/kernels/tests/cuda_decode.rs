//! The kernels of a decoding step against their definitions in f64 on the CPU. Without a device these tests say so and end.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]
mod common;
use candle_core::{D, DType, Device, Tensor};
use common::parts::*;
use common::*;
use espalier_kernels::activation::{Activation, reference as act};
use espalier_kernels::attention::{AttentionSpec, reference};
use espalier_kernels::decode::single::{After, Past, attention, product};
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::norm::reference as norms;
use espalier_kernels::part::{Gain, PartNorm, Projection};
use espalier_kernels::rope::reference::rope;
use std::sync::Arc;

fn device() -> Option<Device> {
    let device = Device::new_cuda(0).ok();
    if device.is_none() {
        println!("skipped: no CUDA device");
    }
    device
}

fn wide(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
}

/// Projections with their weights rounded to bf16 and laid together on the device.
fn laid(on: &Device, all: &[Projection], over_norms: bool) -> Vec<Projection> {
    let weight = |p: &Projection| p.weight.as_dense().unwrap().to_dtype(DType::BF16).unwrap().to_device(on).unwrap();
    let apart: Vec<_> = all.iter().map(|p| FrozenWeight::dense(weight(p)).unwrap()).collect();
    let together = FrozenWeight::lay_together(&apart.iter().collect::<Vec<_>>()).unwrap().unwrap();
    let there = |(p, weight): (&Projection, FrozenWeight)| {
        let mut low_rank = p.low_rank.clone();
        if let Some(factors) = low_rank.as_mut().filter(|_| over_norms) {
            factors.gain = Some(Gain::OverNorm { square: weight.row_squares().unwrap() });
        }
        let bias = p.bias.as_ref().map(|b| b.to_device(on).unwrap());
        Projection { weight: Arc::new(weight), bias, low_rank }
    };
    all.iter().zip(together).map(there).collect()
}

/// g (W n + s B A n) + bias of each projection, in f64, for weights as they are on the device.
fn sums(n: &Tensor, all: &[Projection], flat: &Tensor, over_norms: bool) -> Tensor {
    let (flat, d_in) = (wide(flat), n.dim(1).unwrap());
    let mut at = 0;
    let mut take = |rows: usize, columns: usize| {
        at += rows * columns;
        flat.narrow(0, at - rows * columns, rows * columns).unwrap().reshape((rows, columns)).unwrap()
    };
    let rank = |p: &Projection| p.low_rank.as_ref().map_or(0, |l| l.rank);
    let a: Vec<_> = all.iter().map(|p| take(rank(p), d_in)).collect();
    let outputs = all.iter().zip(a).map(|(p, a)| {
        let d_out = p.weight.d_out();
        let mut w = wide(p.weight.as_dense().unwrap());
        let mut gain = None;
        if let Some(l) = &p.low_rank {
            let b = take(d_out, l.rank);
            w = (w + (b.matmul(&a).unwrap() * l.scale).unwrap()).unwrap();
            gain = l.gain.as_ref().map(|_| take(1, d_out));
        }
        if let Some(gain) = gain.as_mut().filter(|_| over_norms) {
            *gain = (&*gain / w.sqr().unwrap().sum(D::Minus1).unwrap().sqrt().unwrap().unsqueeze(0).unwrap()).unwrap();
        }
        let mut y = n.matmul(&w.t().unwrap()).unwrap();
        if let Some(gain) = gain {
            y = y.broadcast_mul(&gain).unwrap();
        }
        match &p.bias {
            Some(bias) => y.broadcast_add(&wide(bias)).unwrap(),
            None => y,
        }
    });
    Tensor::cat(&outputs.collect::<Vec<_>>(), 1).unwrap()
}

/// The results and s A y of a map after them.
fn agree(what: &str, got: Option<(Tensor, Option<Tensor>)>, want: &Tensor, next: Option<(&Projection, &Tensor)>) {
    let (y, u) = got.unwrap_or_else(|| panic!("{what}: no kernel"));
    let y = wide(&y);
    close(what, &y, want, 4.0 * rounding(DType::BF16));
    let (Some((p, flat)), Some(u)) = (next, u) else { return };
    let factors = p.low_rank.as_ref().unwrap();
    let a = wide(flat).narrow(0, 0, factors.rank * y.dim(1).unwrap()).unwrap().reshape((factors.rank, ())).unwrap();
    let want = (y.matmul(&a.t().unwrap()).unwrap() * factors.scale).unwrap();
    close(&format!("{what}, A y"), &wide(&u), &want, 1e-3);
}

#[test]
fn products_of_few_rows_equal_their_definition() {
    let Some(on) = device() else { return };
    let kinds = [
        ("plain", PLAIN, false),
        ("rank 1", Kind { rank: 1, ..PLAIN }, false),
        ("rank 16", Kind { rank: 16, bias: true, ..PLAIN }, false),
        ("rank 48", Kind { rank: 48, gain: true, bias: true }, false),
        ("over norms", Kind { rank: 5, gain: true, ..PLAIN }, true),
    ];
    for m in [1, 3, 8, 17, 32] {
        for (d_in, [q, k, v]) in [(24, [40, 8, 24]), (200, [136, 72, 72]), (1040, [264, 24, 40]), (5632, [56, 8, 8])] {
            for (name, kind, over_norms) in kinds {
                for with_norm in [false, true] {
                    let what = format!("{name}, {m} rows of {d_in}, {}", if with_norm { "norm" } else { "no norm" });
                    let r = &mut rng(3);
                    let all = [(q, kind), (k, PLAIN), (v, kind)].map(|(d_out, kind)| projection(r, d_out, d_in, kind));
                    let flat = parameters(r, &[&all]).to_device(&on).unwrap();
                    let there = laid(&on, &all, over_norms);
                    let x = randn(r, &[m, d_in], DType::BF16);
                    let weight = (randn(r, &[d_in], DType::F32) * 0.2).unwrap();
                    let norm = PartNorm::Rms { weight: weight.to_device(&on).unwrap(), eps: 1e-6, offset: 1.0 };
                    let norm = Some(&norm).filter(|_| with_norm);
                    let mut n = wide(&x);
                    if with_norm {
                        n = norms::rms_norm(&n, &wide(&weight), 1e-6, 1.0).unwrap();
                    }
                    let x = x.to_device(&on).unwrap();
                    let outputs = q + k + v;
                    let residual = randn(r, &[m, outputs], DType::BF16);
                    let residual_on = residual.to_device(&on).unwrap();
                    let follower = projection(r, 16, outputs, Kind { rank: 7, ..PLAIN });
                    let a = parameters(r, &[std::slice::from_ref(&follower)]).to_device(&on).unwrap();
                    let follower = laid(&on, &[follower], false).remove(0);
                    let want = sums(&n, &there, &flat, over_norms);
                    let got = product(&x, norm, &there, Some(&flat), &After::default()).unwrap();
                    agree(&what, got, &want, None);
                    let next = Some((&follower, &a));
                    let after = After { residual: Some(&residual_on), next, gated: None };
                    let got = product(&x, norm, &there, Some(&flat), &after).unwrap();
                    agree(&format!("{what}, sum"), got, &(want + wide(&residual)).unwrap(), next);
                }
            }
        }
    }
}

#[test]
fn gates_of_few_rows_equal_their_definition() {
    let Some(on) = device() else { return };
    let kind = Kind { rank: 16, gain: true, bias: true };
    for m in [1, 3, 8, 17, 32] {
        for (d_in, ff) in [(24, 40), (256, 352), (2048, 264)] {
            for (activation, fused) in
                [(Activation::Silu, false), (Activation::Silu, true), (Activation::GeluTanh, false)]
            {
                let r = &mut rng(4);
                let all = if fused {
                    vec![projection(r, 2 * ff, d_in, kind)]
                } else {
                    vec![projection(r, ff, d_in, kind), projection(r, ff, d_in, PLAIN)]
                };
                let flat = parameters(r, &[&all]).to_device(&on).unwrap();
                let there = laid(&on, &all, false);
                let x = randn(r, &[m, d_in], DType::BF16);
                let follower = projection(r, 16, ff, Kind { rank: 16, ..PLAIN });
                let a = parameters(r, &[std::slice::from_ref(&follower)]).to_device(&on).unwrap();
                let follower = laid(&on, &[follower], false).remove(0);
                let both = sums(&wide(&x), &there, &flat, false);
                let (gate, up) = (both.narrow(1, 0, ff).unwrap(), both.narrow(1, ff, ff).unwrap());
                let want = act::gated(&gate.contiguous().unwrap(), &up.contiguous().unwrap(), activation).unwrap();
                let after = After { gated: Some(activation), residual: None, next: Some((&follower, &a)) };
                let got = product(&x.to_device(&on).unwrap(), None, &there, Some(&flat), &after).unwrap();
                agree(&format!("{activation:?}, {m} rows of {d_in}"), got, &want, after.next);
            }
        }
    }
}

#[test]
fn attention_of_one_token_equals_its_reference() {
    let Some(on) = device() else { return };
    for (m, heads, kv, d) in [
        (1, 32, 4, 64),
        (3, 14, 2, 64),
        (32, 32, 4, 64),
        (2, 2, 2, 64),
        (5, 6, 1, 128),
        (32, 32, 8, 128),
        (1, 4, 4, 128),
    ] {
        for length in [0, 1, 63, 64, 65, 500] {
            for window in [None, Some(70)] {
                let what = format!("{m} rows, {heads} heads over {kv} of {d}, {length} places, window {window:?}");
                let r = &mut rng(5);
                let capacity = length + 3;
                let qkv = randn(r, &[m, (heads + 2 * kv) * d], DType::BF16);
                let past = [(); 2].map(|()| randn(r, &[m, capacity, kv, d], DType::BF16));
                let [keys, values] = [0, 1].map(|i| past[i].to_device(&on).unwrap());
                let padding: Vec<u32> = (0..m).map(|i| (3 * i % (length + 1)) as u32).collect();
                let angles = randn(r, &[capacity, d / 2], DType::F32);
                let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
                let (cos_on, sin_on) = (cos.to_device(&on).unwrap(), sin.to_device(&on).unwrap());
                let follower = projection(r, 16, heads * d, Kind { rank: 16, ..PLAIN });
                let a = parameters(r, &[std::slice::from_ref(&follower)]).to_device(&on).unwrap();
                let follower = laid(&on, &[follower], false).remove(0);
                let next = Some((&follower, &a));
                let scale = 1.0 / (d as f64).sqrt();
                let rotary = (&cos_on, &sin_on);
                let seen = Past { keys: &keys, values: &values, length, padding: &padding, rotary };
                let there = qkv.to_device(&on).unwrap();
                let got = attention(&there, heads, &seen, (scale, window), next).unwrap();
                let spec = AttentionSpec { scale, causal: true, window, ..AttentionSpec::default() };
                let mut want = Vec::new();
                for (row, first) in padding.iter().enumerate() {
                    let first = *first as usize;
                    let new = wide(&qkv).narrow(0, row, 1).unwrap();
                    let part = |from: usize, count: usize| {
                        new.narrow(1, from * d, count * d).unwrap().reshape((1, 1, count, d)).unwrap()
                    };
                    let angle = |t: &Tensor| wide(t).narrow(0, length - first, 1).unwrap().unsqueeze(0).unwrap();
                    let turned = |x: &Tensor| rope(x, &angle(&cos), &angle(&sin)).unwrap();
                    let (q, k, v) = (turned(&part(0, heads)), turned(&part(heads, kv)), part(heads + kv, kv));
                    let appended = |t: &Tensor| wide(t).narrow(0, row, 1).unwrap().narrow(1, length, 1).unwrap();
                    close(&format!("{what}, key"), &appended(&keys), &k, 2.0 * rounding(DType::BF16));
                    close(&format!("{what}, value"), &appended(&values), &v, 0.0);
                    let before =
                        |t: &Tensor| wide(t).narrow(0, row, 1).unwrap().narrow(1, first, length - first).unwrap();
                    let k = Tensor::cat(&[before(&past[0]), k], 1).unwrap();
                    let v = Tensor::cat(&[before(&past[1]), v], 1).unwrap();
                    want.push(reference::attention(&q, &k, &v, &spec).unwrap().reshape((1, heads * d)).unwrap());
                }
                agree(&what, got, &Tensor::cat(&want, 0).unwrap(), next);
            }
        }
    }
}
