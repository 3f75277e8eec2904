//! CoDyRA: gated ranks; identity at the start, plain LoRA with gates of one, and gates of zero that can be cut away.

use anyhow::Result;
use candle_core::Tensor;

use crate::Lab;
use crate::map::{Map, apart, draw, method, norm, rank};

/// The checks of the card that need no stream of tasks.
///
/// # Errors
/// If a check cannot be run.
pub fn checks(lab: &mut Lab) -> Result<()> {
    let (m, n, r) = (20, 28, 6);
    let weight = draw(1, "weight", 0.3, (m, n))?;
    let map = Map::new(&weight, method("method = \"codyra\"\nr = 6")?, 1, None)?;
    lab.at_most("start", "dW = 0 for any gates", norm(&map.acting_delta()?)?, 0.0);
    lab.counts("parameters", "r (d_in + d_out) + r", map.parameters.trainable_count(), r * (m + n) + r);
    map.scatter(2, 0.2)?;
    let ones = Map::new(&weight, method("method = \"codyra\"\nr = 6\ngates = \"ones\"")?, 1, None)?;
    let lora = Map::new(&weight, method("method = \"lora\"\nr = 6\nalpha = 6.0")?, 1, None)?;
    let (a, b) = (map.parameter("codyra_A")?, map.parameter("codyra_B")?);
    for (name, of_ones, of_lora) in [("A", "codyra_A", "lora_A.weight"), ("B", "codyra_B", "lora_B.weight")] {
        let values = if name == "A" { &a } else { &b };
        ones.set(of_ones, values)?;
        lora.set(of_lora, values)?;
    }
    let claim = "gates of one are LoRA with a scale of 1";
    lab.at_most("gates of one: change", claim, apart(&ones.acting_delta()?, &lora.acting_delta()?)?, 1e-6);
    let (x, g) = (draw(3, "x", 1.0, (5, n))?, draw(4, "g", 1.0, (5, m))?);
    for (of_ones, of_lora) in [("codyra_A", "lora_A.weight"), ("codyra_B", "lora_B.weight")] {
        let loss = |y: &Tensor| -> Result<Tensor> { Ok((y * &g)?.sum_all()?) };
        let (found, expected) = (ones.gradient(&x, loss, of_ones)?, lora.gradient(&x, loss, of_lora)?);
        lab.at_most(&format!("gates of one: gradient of {of_ones}"), claim, apart(&found, &expected)?, 1e-5);
    }
    let gates = map.parameter("codyra_gate")?.to_vec1::<f32>()?;
    let kept: Vec<f32> = gates.iter().enumerate().map(|(i, w)| if i % 2 == 0 { *w } else { 0.0 }).collect();
    map.set("codyra_gate", &Tensor::new(kept.clone(), &candle_core::Device::Cpu)?)?;
    lab.counts("gates of zero: rank", "rank of dW = number of gates that are not 0", rank(&map.delta()?, 1e-5)?, r / 2);
    let places = Tensor::new(vec![0u32, 2, 4], &candle_core::Device::Cpu)?;
    let few: Vec<f32> = kept.iter().copied().step_by(2).collect();
    let cut_b = b.index_select(&places, 1)?.broadcast_mul(&Tensor::new(few, &candle_core::Device::Cpu)?)?;
    let cut = cut_b.matmul(&a.index_select(&places, 0)?)?;
    lab.at_most("gates of zero: cut", "what is left out changes nothing", apart(&cut, &map.acting_delta()?)?, 1e-5);
    Ok(())
}
