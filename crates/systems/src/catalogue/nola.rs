//! NOLA: coefficients alone are trained and saved, and the random matrices come back from their seed.

use anyhow::Result;
use candle_core::Tensor;

use crate::Lab;
use crate::lab::SEEDS;
use crate::map::{Map, apart, best_fit, draw, method, norm, rank};

const SETTINGS: &str = "method = \"nola\"\nr = 4\nbases = 32\nalpha = 4.0";

/// The checks of the card.
///
/// # Errors
/// If a check cannot be run.
pub fn checks(lab: &mut Lab) -> Result<()> {
    let (m, n, k) = (40, 56, 32);
    let weight = draw(1, "weight", 0.3, (m, n))?;
    let map = Map::new(&weight, method(SETTINGS)?, 1, None)?;
    lab.counts("tensors", "two are trained", map.parameters.trainable().count(), 2);
    lab.counts("values", "2 k a layer, whatever its width and rank", map.parameters.trainable_count(), 2 * k);
    lab.at_most("start", "dW = 0 at start", norm(&map.acting_delta()?)?, 0.0);
    let (x, g) = (draw(2, "x", 1.0, (5, n))?, draw(3, "g", 1.0, (5, m))?);
    let loss = |y: &Tensor| -> Result<Tensor> { Ok((y * &g)?.sum_all()?) };
    lab.at_most("gradient of a", "is 0 at start", norm(&map.gradient(&x, loss, "nola_alpha")?)?, 0.0);
    lab.at_least("gradient of b", "is not 0 at start", norm(&map.gradient(&x, loss, "nola_beta")?)?, 1e-6);
    // The matrices by setting one coefficient at a time: B_j A_0 first, then B_0 A_i.
    let unit = |i: usize| -> Result<Tensor> {
        let values: Vec<f32> = (0..k).map(|j| if i == j { 1.0 } else { 0.0 }).collect();
        Ok(Tensor::new(values, &candle_core::Device::Cpu)?)
    };
    let zero = Tensor::zeros(k, candle_core::DType::F32, &candle_core::Device::Cpu)?;
    let parts = (0..k)
        .map(|j| {
            map.set("nola_alpha", &zero)?;
            map.set("nola_beta", &unit(j)?)?;
            Ok(map.delta()?)
        })
        .collect::<Result<Vec<Tensor>>>()?;
    map.scatter(4, 0.5)?;
    map.set("nola_alpha", &zero)?;
    let b = map.parameter("nola_beta")?.to_vec1::<f32>()?;
    let mut sum = parts[0].zeros_like()?;
    for (part, b) in parts.iter().zip(&b) {
        sum = (sum + (part * f64::from(*b))?)?;
    }
    lab.at_most("mixture", "B = sum_j b_j B_j", apart(&map.delta()?, &sum)?, 1e-5);
    // The gradient is the inner product with each matrix: by those found one at a time.
    let found = map.gradient(&x, loss, "nola_beta")?.to_vec1::<f32>()?;
    let whole = g.t()?.matmul(&x)?;
    let expected = parts.iter().map(|part| Ok((part * &whole)?.sum_all()?.to_scalar::<f32>()?));
    let expected = Tensor::new(expected.collect::<Result<Vec<f32>>>()?, &candle_core::Device::Cpu)?;
    let found = Tensor::new(found, &candle_core::Device::Cpu)?;
    lab.at_most("gradient", "dL/db_j = <dL/dB, B_j>", apart(&found, &expected)?, 1e-4);
    map.scatter(5, 0.5)?;
    lab.counts("rank", "rank of dW <= r", rank(&map.delta()?, 1e-5)?, 4);
    let again = Map::new(&weight, method(SETTINGS)?, 77, None)?;
    for name in ["nola_alpha", "nola_beta"] {
        again.set(name, &map.parameter(name)?)?;
    }
    let claim = "another run's seed does not matter: the basis seed of the settings gives the matrices bit for bit";
    lab.at_most("regeneration", claim, apart(&again.delta()?, &map.delta()?)?, 0.0);
    let other = Map::new(&weight, method(&format!("{SETTINGS}\nbasis_seed = 1"))?, 1, None)?;
    for name in ["nola_alpha", "nola_beta"] {
        other.set(name, &map.parameter(name)?)?;
    }
    lab.at_least("another seed", "gives other matrices", apart(&other.delta()?, &map.delta()?)?, 0.5);
    if lab.is_quick() {
        return Ok(());
    }
    let (mut ours, mut lora) = (Vec::new(), Vec::new());
    for seed in SEEDS {
        let weight = draw(seed, "weight", 0.3, (m, n))?;
        let target = draw(seed, "left", 0.3, (m, 2))?.matmul(&draw(seed, "right", 0.3, (2, n))?)?;
        // 96 parameters in each.
        ours.push(best_fit(&weight, "method = \"nola\"\nr = 4\nbases = 48\nalpha = 4.0", seed, None, &target, 400)?);
        lora.push(best_fit(&weight, "method = \"lora\"\nr = 1\nalpha = 1.0", seed, None, &target, 400)?);
    }
    // The card's own limit: on a random target quality follows the number of coefficients.
    let claim = "on a random linear target NOLA does not beat LoRA at an equal number of parameters";
    lab.below("change of rank 2 at 96 parameters", claim, &lora, ("NOLA r = 4", &ours));
    Ok(())
}
