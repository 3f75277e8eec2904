//! LoRA-SB: the start is the first step of full fine-tuning, cut to rank r, and the gradient of R is its best projection.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::Lab;
use crate::lab::SEEDS;
use crate::map::{Map, apart, best_fit, draw, method, norm, with_spectrum};

fn settings(alpha: f64) -> String {
    format!("method = \"lora-xs\"\nr = 6\nalpha = {alpha:?}\nstart = \"gradient\"\nstart_lr = 0.01")
}

/// The checks of the card.
///
/// # Errors
/// If a check cannot be run.
pub fn checks(lab: &mut Lab) -> Result<()> {
    let (m, n, r) = (20, 28, 6);
    let weight = draw(1, "weight", 0.3, (m, n))?;
    let gradient = draw(2, "gradient", 1.0, (m, n))?;
    let map = Map::new(&weight, method(&settings(6.0))?, 1, Some(&gradient))?;
    let (a, b) = (map.parameter("lora_A.weight")?, map.parameter("lora_B.weight")?);
    let eye = Tensor::eye(r, DType::F32, &Device::Cpu)?;
    lab.counts("parameters", "r^2 a layer", map.parameters.trainable_count(), r * r);
    lab.at_most("A", "A A^T = I", apart(&a.matmul(&a.t()?)?, &eye)?, 1e-5);
    lab.at_most("B", "B^T B = I", apart(&b.t()?.matmul(&b)?, &eye)?, 1e-5);
    let update = (gradient.sign()? * -0.01)?;
    let (_, s, _) = espalier_adapters::decomposition::svd(&update)?;
    let left: f64 = s[r..].iter().map(|s| s * s).sum();
    let start = map.acting_delta()?;
    let residual = norm(&(&start - &update)?)?.powi(2);
    let claim = "the start is the best approximation of -lr sign(G) of rank r";
    lab.at_most("start", claim, (residual - left).abs() / left, 1e-4);
    let descent = (&start * &gradient)?.sum_all()?.to_scalar::<f32>()?;
    lab.at_most("direction", "the loss falls along the start, to first order", f64::from(descent), 0.0);
    // One step of gradient descent on R moves the weight by -lr P_B G P_A.
    let (x, g) = (draw(3, "x", 1.0, (9, n))?, draw(4, "g", 1.0, (9, m))?);
    let whole = g.t()?.matmul(&x)?;
    let projected = b.matmul(&b.t()?.matmul(&whole)?.matmul(&a.t()?)?)?.matmul(&a)?;
    let name = "lora_latent_mapping.weight";
    let mut steps = Vec::new();
    for alpha in [6.0, 60.0] {
        let map = Map::new(&weight, method(&settings(alpha))?, 1, Some(&gradient))?;
        let before = map.acting_delta()?;
        lab.at_most(&format!("start at scale {}", alpha / 6.0), "does not depend on the scale", apart(&before, &start)?, 1e-5);
        let gradient = map.gradient(&x, |y| Ok((y * &g)?.sum_all()?), name)?;
        // With the correction 1 / s^2 of a scale that is not 1.
        let scale = alpha / 6.0;
        let step = (gradient * (-0.1 / (scale * scale)))?;
        map.set(name, &(map.parameter(name)? + step)?)?;
        steps.push((map.acting_delta()? - before)?);
    }
    let claim = "a step on R moves W by -lr P_B G P_A";
    lab.at_most("step", claim, apart(&steps[0], &(projected * -0.1)?)?, 1e-3);
    lab.at_most("step at scale 10", "the corrected step does not depend on the scale", apart(&steps[1], &steps[0])?, 1e-3);
    if lab.is_quick() {
        return Ok(());
    }
    let (m, n) = (48, 64);
    for (name, power) in [("steep spectrum", 1.0), ("flat spectrum", 0.0)] {
        let (mut ours, mut raw, mut xs) = (Vec::new(), Vec::new(), Vec::new());
        for seed in SEEDS {
            let weight = draw(seed, "weight", 0.3, (m, n))?;
            let target = with_spectrum(seed, (m, n), |i| (1.0 + i as f64).powf(-power))?;
            let gradient = target.neg()?;
            let sb = "method = \"lora-xs\"\nr = 16\nalpha = 16.0\nstart = \"gradient\"\nstart_lr = 0.001";
            ours.push(best_fit(&weight, sb, seed, Some(&gradient), &target, 400)?);
            let of_raw = format!("{sb}\nupdate = \"raw\"\nkeep_first_step = false");
            raw.push(best_fit(&weight, &of_raw, seed, Some(&gradient), &target, 400)?);
            xs.push(best_fit(&weight, "method = \"lora-xs\"\nr = 16\nalpha = 16.0", seed, None, &target, 400)?);
        }
        lab.below(&format!("{name}: against LoRA-XS"), "far better than the base's own vectors", &ours, ("LoRA-XS", &xs));
        // What the card's author found: the sign flattens the spectrum that the start is taken from.
        let claim = "a finding: the raw gradient's own vectors, with R = 0, do better than those of its sign";
        lab.below(&format!("{name}: raw gradient"), claim, &raw, ("sign", &ours));
    }
    Ok(())
}
