//! Block-LoRA: what sharing the down-projection leaves of LoRA.

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::Lab;
use crate::map::{Map, apart, draw, method, norm, rank};

/// The checks of the card.
///
/// # Errors
/// If a check cannot be run.
pub fn checks(lab: &mut Lab) -> Result<()> {
    let (m, n, r, blocks) = (24, 24, 8, 4);
    let q = r / blocks;
    let weight = draw(1, "weight", 0.3, (m, n))?;
    let settings = format!("method = \"block-lora\"\nr = {r}\nblocks = {blocks}\nalpha = 8.0");
    let map = Map::new(&weight, method(&settings)?, 1, None)?;
    lab.at_most("start", "dW = 0 at start", norm(&map.acting_delta()?)?, 0.0);
    lab.counts("parameters", "q d_in + r d_out", map.parameters.trainable_count(), q * n + r * m);
    let (x, g) = (draw(2, "x", 1.0, (5, n))?, draw(3, "g", 1.0, (5, m))?);
    map.scatter(4, 0.2)?;
    let gradient = map.gradient(&x, |y| Ok((y * &g)?.sum_all()?), "block_B")?;
    let first = gradient.narrow(0, 0, 1)?;
    let mut largest = 0f64;
    for i in 1..blocks {
        largest = largest.max(apart(&gradient.narrow(0, i, 1)?, &first)?);
    }
    lab.at_most("arms", "all up-projections have one gradient", largest, 0.0);
    let (a, b) = (map.parameter("block_A")?, map.parameter("block_B")?);
    let mut sum = Tensor::zeros((m, n), candle_core::DType::F32, &Device::Cpu)?;
    for i in 0..blocks {
        sum = (sum + b.narrow(0, i, 1)?.squeeze(0)?.matmul(&a)?)?;
    }
    lab.at_most("change", "dW = s sum_i B_i A", apart(&map.acting_delta()?, &sum)?, 1e-5);
    lab.counts("rank", "rank of dW <= r / n", rank(&map.delta()?, 1e-5)?, q);
    // Plain LoRA of rank q with the sum of the arms is the same function.
    let lora = Map::new(&weight, method(&format!("method = \"lora\"\nr = {q}\nalpha = {q}.0"))?, 1, None)?;
    lora.set("lora_A.weight", &a)?;
    lora.set("lora_B.weight", &b.sum(0)?)?;
    lab.at_most("collapse", "LoRA of rank r / n with B = sum_i B_i", apart(&lora.acting_delta()?, &map.acting_delta()?)?, 1e-6);
    Ok(())
}
