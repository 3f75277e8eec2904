//! Bone: what its three operators compute, how much they can express, and how they learn.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::Lab;
use crate::lab::SEEDS;
use crate::map::{Map, apart, best_fit, draw, method, norm, rank};

/// The checks of the card.
///
/// # Errors
/// If a check cannot be run.
pub fn checks(lab: &mut Lab) -> Result<()> {
    let (m, n, b) = (48, 64, 8);
    let weight = draw(1, "weight", 0.3, (m, n))?;
    let mut map = Map::new(&weight, method("method = \"bone\"\nr = 8")?, 1, None)?;
    lab.at_most("affine: start", "dW = 0 at S = 0", norm(&map.acting_delta()?)?, 0.0);
    lab.counts("affine: parameters", "m b", map.parameters.trainable_count(), m * b);
    map.scatter(2, 0.2)?;
    let s = map.parameter("miss_block")?.to_dtype(DType::F64)?.to_vec3::<f64>()?;
    let w = weight.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let looped: Vec<f64> = (0..m * n)
        .map(|at| {
            let (row, column) = (at / n, at % n);
            let (i, j, p, q) = (row / b, column / b, row % b, column % b);
            (0..b).map(|k| w[row][j * b + k] * s[i][k][q]).sum::<f64>() + s[i][p][q]
        })
        .collect();
    let looped = Tensor::from_vec(looped, (m, n), &Device::Cpu)?;
    let acting = map.acting_delta()?;
    lab.at_most("affine: blocks", "dW_ij = W_ij S_i + S_i, by an explicit loop", apart(&map.delta()?, &looped)?, 1e-6);
    lab.at_most("affine: forward", "the forward pass is that of dW", apart(&acting, &looped)?, 1e-5);
    lab.counts("affine: rank", "rank of dW = min(m, n)", rank(&acting, 1e-5)?, m.min(n));
    let x = draw(3, "x", 1.0, (5, n))?;
    let g = draw(4, "g", 1.0, (5, m))?;
    let found = map.gradient(&x, |y| Ok((y * &g)?.sum_all()?), "miss_block")?;
    // dS_i = sum_j W_ij^T G_ij + G_ij, G = g^T x.
    let whole = g.t()?.matmul(&x)?.reshape((m / b, b, n / b, b))?;
    let blocks = weight.reshape((m / b, b, n / b, b))?;
    let mut expected = whole.sum(2)?;
    for j in 0..n / b {
        let (wij, gij) = (blocks.narrow(2, j, 1)?.squeeze(2)?, whole.narrow(2, j, 1)?.squeeze(2)?);
        expected = (expected + wij.transpose(1, 2)?.contiguous()?.matmul(&gij.contiguous()?)?)?;
    }
    lab.at_most("affine: gradient", "dL/dS_i = sum_j W_ij^T G_ij + G_ij", apart(&found, &expected)?, 1e-5);
    let (merged, back) = map.merged()?;
    lab.at_most("affine: merge", "merged = unmerged", apart(&merged, &(&weight + &acting)?)?, 1e-6);
    lab.at_most("affine: unmerge", "the base comes back", apart(&back, &weight)?, 0.0);
    let refused = Map::new(&weight, method("method = \"bone\"\nr = 7")?, 1, None).is_err();
    lab.holds("affine: blocks that do not divide", "are refused", refused);
    for (name, r) in [("shard", 8), ("shard, padded", 7)] {
        let map = Map::new(&weight, method(&format!("method = \"bone\"\nform = \"shard\"\nr = {r}"))?, 1, None)?;
        map.scatter(5, 0.2)?;
        let st = map.parameter("miss_block")?.t()?;
        let columns: Vec<Tensor> = (0..n).map(|q| st.narrow(1, q % r, 1)).collect::<candle_core::Result<_>>()?;
        let expected = Tensor::cat(&columns, 1)?;
        let claim = "LoRA with A = [I I ... I] and B = S^T";
        lab.at_most(&format!("{name}: change"), claim, apart(&map.acting_delta()?, &expected)?, 1e-5);
        lab.counts(&format!("{name}: rank"), "rank of dW <= r", rank(&map.delta()?, 1e-5)?, r);
    }
    if lab.is_quick() {
        return Ok(());
    }
    let (mut affine, mut shard, mut lora) = (Vec::new(), Vec::new(), Vec::new());
    for seed in SEEDS {
        let weight = draw(seed, "weight", 0.3, (m, n))?;
        let planted = Map::new(&weight, method("method = \"bone\"\nr = 8")?, seed, None)?;
        planted.scatter(seed + 10, 0.2)?;
        let target = planted.delta()?;
        let fit = |settings: &str| best_fit(&weight, settings, seed, None, &target, 400);
        affine.push(fit("method = \"bone\"\nr = 8")?);
        shard.push(fit("method = \"bone\"\nform = \"shard\"\nr = 8")?);
        lora.push(fit("method = \"lora\"\nr = 4\nalpha = 4.0")?);
    }
    let claim = "a change of the form W S + S is learned by affine, and not by the others at equal parameters";
    lab.below("planted change: affine against LoRA", claim, &affine, ("LoRA r = 4", &lora));
    lab.below("planted change: affine against shard", claim, &affine, ("shard", &shard));
    Ok(())
}
