//! Parts with random weights.

use super::{randn, rng};
use candle_core::{DType, Tensor};
use espalier_kernels::activation::Activation;
use espalier_kernels::attention::AttentionSpec;
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::part::{AttentionPart, Factors, FeedForwardPart, Gain, PartNorm, Projection};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// What the projections of a case have: rank (0: no adapter), gain, bias.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) rank: usize,
    pub(crate) gain: bool,
    pub(crate) bias: bool,
}

pub(crate) const PLAIN: Kind = Kind { rank: 0, gain: false, bias: false };
pub(crate) const LORA: Kind = Kind { rank: 3, gain: false, bias: false };
pub(crate) const DORA: Kind = Kind { rank: 2, gain: true, bias: false };
pub(crate) const BIASED: Kind = Kind { rank: 16, gain: false, bias: true };
/// Ranks of a group that are more than a block of outer products.
pub(crate) const WIDE: Kind = Kind { rank: 20, gain: true, bias: true };

pub(crate) fn projection(r: &mut ChaCha8Rng, d_out: usize, d_in: usize, kind: Kind) -> Projection {
    let w = (randn(r, &[d_out, d_in], DType::F32) * (1.0 / (d_in as f64).sqrt())).unwrap();
    Projection {
        weight: Arc::new(FrozenWeight::dense(w).unwrap()),
        bias: kind.bias.then(|| randn(r, &[d_out], DType::F32)),
        low_rank: (kind.rank > 0).then_some(Factors {
            rank: kind.rank,
            scale: 0.7,
            gain: kind.gain.then_some(Gain::Given),
        }),
    }
}

/// Flat parameters of groups of projections.
pub(crate) fn parameters(r: &mut ChaCha8Rng, groups: &[&[Projection]]) -> Tensor {
    let mut parts = vec![Tensor::zeros(0, DType::F32, &candle_core::Device::Cpu).unwrap()];
    let rank = |p: &Projection| p.low_rank.as_ref().map_or(0, |l| l.rank);
    for group in groups {
        let d_in = group[0].weight.d_in();
        for p in *group {
            parts.push((randn(r, &[rank(p) * d_in], DType::F32) * (1.0 / (d_in as f64).sqrt())).unwrap());
        }
        for p in *group {
            parts.push((randn(r, &[rank(p) * p.weight.d_out()], DType::F32) * 0.5).unwrap());
            if p.low_rank.as_ref().is_some_and(|l| l.gain.is_some()) {
                parts.push(((randn(r, &[p.weight.d_out()], DType::F32) * 0.3).unwrap() + 1.0).unwrap());
            }
        }
    }
    Tensor::cat(&parts, 0).unwrap()
}

/// A feed-forward part and its parameters.
pub(crate) fn feed(seed: u64, (h, ff): (usize, usize), kind: Kind, shape: &str) -> (Arc<FeedForwardPart>, Tensor) {
    let r = &mut rng(seed);
    let inputs = match shape {
        "gate and up" => vec![projection(r, ff, h, kind), projection(r, ff, h, kind)],
        "fused" => vec![projection(r, 2 * ff, h, kind)],
        _ => vec![projection(r, ff, h, kind)],
    };
    let output = projection(r, h, ff, kind);
    let flat = parameters(r, &[&inputs, std::slice::from_ref(&output)]);
    let weight = (randn(r, &[h], DType::F32) * 0.2).unwrap();
    let norm = match shape {
        "plain" => PartNorm::Layer { weight: (weight + 1.0).unwrap(), bias: randn(r, &[h], DType::F32), eps: 1e-5 },
        _ => PartNorm::Rms { weight, eps: 1e-6, offset: 1.0 },
    };
    let part = FeedForwardPart {
        norm: Some(norm),
        inputs,
        output,
        activation: if shape == "plain" { Activation::GeluTanh } else { Activation::Silu },
        gated: shape != "plain",
        residual: true,
    };
    (Arc::new(part), flat)
}

/// An attention part and its parameters.
pub(crate) fn attend(
    seed: u64,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    kind: Kind,
    is_fused: bool,
    t: usize,
    spec: AttentionSpec,
) -> (Arc<AttentionPart>, Tensor) {
    let r = &mut rng(seed);
    let h = heads * head_dim;
    let kv = kv_heads * head_dim;
    let inputs = if is_fused {
        vec![projection(r, h + 2 * kv, h, kind)]
    } else {
        vec![projection(r, h, h, kind), projection(r, kv, h, PLAIN), projection(r, kv, h, kind)]
    };
    let output = projection(r, h, h, kind);
    let flat = parameters(r, &[&inputs, std::slice::from_ref(&output)]);
    let angles = randn(r, &[1, t, head_dim / 2], DType::F32);
    let part = AttentionPart {
        norm: Some(PartNorm::Rms { weight: (randn(r, &[h], DType::F32) * 0.2).unwrap(), eps: 1e-6, offset: 1.0 }),
        inputs,
        output,
        heads,
        kv_heads,
        head_dim,
        rotary: Some((angles.cos().unwrap(), angles.sin().unwrap())),
        spec: AttentionSpec { scale: 1.0 / (head_dim as f64).sqrt(), ..spec },
        residual: true,
    };
    (Arc::new(part), flat)
}
