//! LoRA-GA: nothing changes at the start, and the first step is the best one that two products of rank r can take.

use anyhow::Result;
use candle_core::Tensor;

use crate::Lab;
use crate::lab::SEEDS;
use crate::map::{Map, best_fit, draw, method, norm};

fn settings(rest: &str) -> String {
    format!("method = \"lora\"\nr = 4\nalpha = 16.0\nrslora = true\ninit = {{ name = \"lora-ga\"{rest} }}")
}

/// The checks of the card.
///
/// # Errors
/// If a check cannot be run.
pub fn checks(lab: &mut Lab) -> Result<()> {
    let (m, n, r) = (20, 28, 4);
    let weight = draw(1, "weight", 0.3, (m, n))?;
    let gradient = draw(2, "gradient", 1.0, (m, n))?;
    let (_, s, _) = espalier_adapters::decomposition::svd(&gradient)?;
    let eta = 16.0 / (r as f64).sqrt();
    let gamma = 16.0;
    let map = Map::new(&weight, method(&settings(""))?, 1, Some(&gradient))?;
    lab.at_most("start", "the function is the base's", norm(&map.acting_delta()?)? / norm(&weight)?, 1e-5);
    let (a, b) = (map.parameter("lora_A.weight")?, map.parameter("lora_B.weight")?);
    // One step of gradient descent of size 1 moves the weight by eta^2 (B B^T G + G A^T A).
    let step = (b.matmul(&b.t()?.matmul(&gradient)?)? + gradient.matmul(&a.t()?)?.matmul(&a)?)?;
    let step = (step * (eta * eta))?;
    let zeta = 16.0 * 16.0 * (m as f64).sqrt() / (r as f64 * gamma);
    let residual = norm(&(step - (&gradient * zeta)?)?)?.powi(2) / (zeta * zeta);
    let least: f64 = s[2 * r..].iter().map(|s| s * s).sum();
    let claim = "|eta^2 (B B^T G + G A^T A) - zeta G|^2 = zeta^2 sum_{i > 2r} s_i^2, the least that is possible";
    lab.at_most("first step", claim, (residual - least).abs() / least, 1e-4);
    let scale = (m as f64).powf(0.25) / gamma.sqrt();
    let rows = a.sqr()?.sum(1)?.to_vec1::<f32>()?;
    let off = rows.iter().map(|v| (f64::from(*v).sqrt() / scale - 1.0).abs()).fold(0.0, f64::max);
    lab.at_most("scale", "rows of A are d_out^(1/4) / sqrt(gamma) long", off, 1e-5);
    for (name, rest) in [("A2rBr", ", direction = \"A2rBr\""), ("ArBr", ", direction = \"ArBr\""), ("random", ", direction = \"random\"")] {
        let map = Map::new(&weight, method(&settings(rest))?, 1, Some(&gradient))?;
        let (a, b) = (map.parameter("lora_A.weight")?, map.parameter("lora_B.weight")?);
        let step = (b.matmul(&b.t()?.matmul(&gradient)?)? + gradient.matmul(&a.t()?)?.matmul(&a)?)?;
        let residual = norm(&((step * (eta * eta))? - (&gradient * zeta)?)?)?.powi(2) / (zeta * zeta);
        let claim = "any split of the first 2r singular vectors does as well";
        lab.at_most(&format!("direction {name}"), claim, (residual - least).abs() / least, 1e-4);
    }
    let dead = Map::new(&weight, method(&settings(""))?, 1, Some(&gradient.zeros_like()?))?;
    lab.at_most("no gradient", "plain LoRA's start", norm(&dead.parameter("lora_B.weight")?)?, 0.0);
    if lab.is_quick() {
        return Ok(());
    }
    let (mut ours, mut lora) = (Vec::new(), Vec::new());
    for seed in SEEDS {
        let weight = draw(seed, "weight", 0.3, (m, n))?;
        let target = crate::map::with_spectrum(seed, (m, n), |i| (1.0 + i as f64).powi(-1))?;
        // The gradient of |dW - target|^2 at dW = 0.
        let gradient: Tensor = target.neg()?;
        ours.push(best_fit(&weight, &settings(""), seed, Some(&gradient), &target, 40)?);
        lora.push(best_fit(&weight, "method = \"lora\"\nr = 4\nalpha = 16.0\nrslora = true", seed, None, &target, 40)?);
    }
    let claim = "few steps bring the loss lower than from a random A, each with its best learning rate";
    lab.below("40 steps", claim, &ours, ("LoRA", &lora));
    Ok(())
}
