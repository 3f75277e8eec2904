//! DyLoRA: first components of a product that work by themselves, and a plain LoRA at any rank.

use anyhow::Result;
use candle_core::Tensor;

use crate::Lab;
use crate::map::{Map, apart, draw, method, norm, rank};

/// The checks of the card that need no training.
///
/// # Errors
/// If a check cannot be run.
pub fn checks(lab: &mut Lab) -> Result<()> {
    let (m, n, r) = (20, 28, 6);
    let weight = draw(1, "weight", 0.3, (m, n))?;
    let whole = Map::new(&weight, method("method = \"dylora\"\nr = 6\nalpha = 6.0")?, 1, None)?;
    lab.at_most("start", "dW = 0 at start", norm(&whole.acting_delta()?)?, 0.0);
    lab.counts("parameters", "r (d_in + d_out), as LoRA", whole.parameters.trainable_count(), r * (m + n));
    whole.scatter(2, 0.2)?;
    let (a, b) = (whole.parameter("lora_A.weight")?, whole.parameter("lora_B.weight")?);
    for (scale, over) in [("used", true), ("constant", false)] {
        for cut in 1..=r {
            let settings =
                format!("method = \"dylora\"\nr = 6\nalpha = 6.0\nscale = \"{scale}\"\nrank = {cut}");
            let map = Map::new(&weight, method(&settings)?, 1, None)?;
            map.set("lora_A.weight", &a)?;
            map.set("lora_B.weight", &b)?;
            let factor = if over { 6.0 / cut as f64 } else { 1.0 };
            let expected: Tensor =
                (b.narrow(1, 0, cut)?.contiguous()?.matmul(&a.narrow(0, 0, cut)?.contiguous()?)? * factor)?;
            let name = format!("rank {cut} of 6, alpha over the {scale} rank");
            lab.at_most(&name, "dW = s B[:, :b] A[:b, :]", apart(&map.acting_delta()?, &expected)?, 1e-5);
            lab.counts(&format!("{name}: rank"), "rank of dW <= b", rank(&map.delta()?, 1e-5)?, cut);
        }
    }
    let full = Map::new(&weight, method("method = \"lora\"\nr = 6\nalpha = 6.0")?, 1, None)?;
    full.set("lora_A.weight", &a)?;
    full.set("lora_B.weight", &b)?;
    let claim = "at the whole rank it is LoRA";
    lab.at_most("whole rank", claim, apart(&whole.acting_delta()?, &full.acting_delta()?)?, 1e-6);
    Ok(())
}
