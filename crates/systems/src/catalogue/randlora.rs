//! RandLoRA: its sum by definition, its rank, and when full rank pays.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::Lab;
use crate::lab::SEEDS;
use crate::map::{Map, apart, best_fit, draw, method, norm, rank, with_spectrum};

/// The sum over j and k as the paper (or PEFT) writes it, without any reordering of tensors.
fn by_definition(map: &Map, (m, n): (usize, usize), scale: f64, peft: bool) -> Result<Tensor> {
    let of = |name: &str| -> Result<Tensor> { Ok(map.parameter(name)?.to_dtype(DType::F64)?) };
    let (a, b) = (of("randlora_A")?.to_vec3::<f64>()?, of("randlora_B")?.to_vec3::<f64>()?);
    let (l, g) = (of("randlora_lambda")?.to_vec2::<f64>()?, of("randlora_gamma")?.to_vec2::<f64>()?);
    let (r, count, long, short) = (l.len(), g.len(), m.max(n), m.min(n));
    let mut sum = vec![0f64; m * n];
    for (p, of_b) in b.iter().enumerate().take(long) {
        for q in 0..short {
            let mut value = 0.0;
            for t in 0..r * count {
                // The t-th column of B belongs to basis t / r and rank t mod r; PEFT pairs it with the factors of t mod N, t / N.
                let (k, j) = if peft { (t / count, t % count) } else { (t % r, t / r) };
                value += of_b[t / r][t % r] * l[k][j] * a[k][0][q] * g[j][q];
            }
            let at = if n > m { q * n + p } else { p * n + q };
            sum[at] = scale * value;
        }
    }
    Ok(Tensor::from_vec(sum, (m, n), &Device::Cpu)?)
}

/// The checks of the card.
///
/// # Errors
/// If a check cannot be run.
pub fn checks(lab: &mut Lab) -> Result<()> {
    for (m, n) in [(12, 8), (8, 8), (8, 12)] {
        for peft in [false, true] {
            let weight = draw(1, "weight", 0.3, (m, n))?;
            let settings = format!("method = \"randlora\"\nr = 3\nalpha = 6.0\npeft = {peft}");
            let map = Map::new(&weight, method(&settings)?, 1, None)?;
            let name = format!("{m} x {n}{}", if peft { ", as PEFT" } else { "" });
            lab.at_most(&format!("{name}: start"), "dW = 0 at start", norm(&map.acting_delta()?)?, 0.0);
            let (x, g) = (draw(2, "x", 1.0, (5, n))?, draw(3, "g", 1.0, (5, m))?);
            let loss = |y: &Tensor| -> Result<Tensor> { Ok((y * &g)?.sum_all()?) };
            let still = norm(&map.gradient(&x, loss, "randlora_gamma")?)?;
            lab.at_most(&format!("{name}: gradient of g"), "is 0 at start", still, 0.0);
            let moves = norm(&map.gradient(&x, loss, "randlora_lambda")?)?;
            lab.at_least(&format!("{name}: gradient of l"), "is not 0 at start", moves, 1e-6);
            map.scatter(4, 0.3)?;
            let count = 8usize.div_ceil(3);
            let scale = if peft { 2.0 } else { 2.0 / (count as f64).sqrt() };
            let expected = by_definition(&map, (m, n), scale, peft)?;
            let claim = "the product of rank N r is the sum over j and k";
            lab.at_most(&format!("{name}: sum"), claim, apart(&map.acting_delta()?, &expected)?, 1e-5);
            lab.counts(&format!("{name}: rank"), "rank of dW = min(N r, d)", rank(&map.delta()?, 1e-5)?, 8);
        }
    }
    // r = 1 on a square: dW = B diag(l) (g o a) is any matrix.
    let d = 8;
    let map = Map::new(&draw(1, "weight", 0.3, (d, d))?, method("method = \"randlora\"\nr = 1\nalpha = 1.0")?, 1, None)?;
    let wanted = draw(9, "wanted", 1.0, (d, d))?;
    let (a, b) = (map.parameter("randlora_A")?.reshape((1, d))?, map.parameter("randlora_B")?.reshape((d, d))?);
    let (u, s, vt) = espalier_adapters::decomposition::svd(&b)?;
    let inverse: Vec<f32> = s.iter().map(|s| (1.0 / s) as f32).collect();
    let solved = vt.t()?.broadcast_mul(&Tensor::new(inverse, &Device::Cpu)?)?.matmul(&u.t()?.matmul(&wanted)?)?;
    let gamma = (solved.broadcast_div(&a)? * (d as f64).sqrt())?;
    map.set("randlora_lambda", &Tensor::ones((1, d), DType::F32, &Device::Cpu)?)?;
    map.set("randlora_gamma", &gamma)?;
    lab.at_most("r = 1, square", "any matrix is reached", apart(&map.acting_delta()?, &wanted)?, 1e-3);
    // 28 layers of a 3072-wide model with keys of 1024: counted on maps of those shapes.
    let mut parameters = 0;
    for shape in [(3072, 3072), (1024, 3072)] {
        let weight = Tensor::zeros(1, DType::F32, &Device::Cpu)?.broadcast_as(shape)?.contiguous()?;
        let map = Map::new(&weight, method("method = \"randlora\"\nr = 32")?, 1, None)?;
        parameters += 28 * map.parameters.trainable_count();
    }
    lab.counts("parameters", "N (r + d) a layer", parameters, 9_289_728);
    if lab.is_quick() {
        return Ok(());
    }
    let d = 48;
    for (name, full_rank_wins, power) in [("flat spectrum", true, 0.0), ("steep spectrum", false, 1.0)] {
        let (mut ours, mut lora) = (Vec::new(), Vec::new());
        for seed in SEEDS {
            let weight = draw(seed, "weight", 0.3, (d, d))?;
            let target = with_spectrum(seed, (d, d), |i| (1.0 + i as f64).powf(-power))?;
            // 432 and 384 parameters.
            ours.push(best_fit(&weight, "method = \"randlora\"\nr = 6", seed, None, &target, 400)?);
            lora.push(best_fit(&weight, "method = \"lora\"\nr = 4\nalpha = 4.0", seed, None, &target, 400)?);
        }
        let claim = "full rank pays where the change that is needed is not of low rank, and only there";
        if full_rank_wins {
            lab.below(name, claim, &ours, ("LoRA r = 4", &lora));
        } else {
            lab.below(name, claim, &lora, ("RandLoRA r = 6", &ours));
        }
    }
    Ok(())
}
