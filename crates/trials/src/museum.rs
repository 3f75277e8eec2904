//! adapters as tools of different ages write them.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use espalier_adapters::Flow;
use espalier_adapters::formats::{folder, forms};
use espalier_models::{LoadOptions, Model, TokenBatch};
use serde::Deserialize;

use crate::golden::{self, listed, name_of};
use crate::subject::{acting, relative};
use crate::{Limit, Scope, Tally, Trial, root};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-05",
    title: "Museum of adapter files",
    claim: "An adapter file of another tool is read, and then gives the logits that the tool itself computed (within 1e-4 of \
            the largest logit), or is refused with a reason: none is read halfway. Every folder of `parity/museum`: PEFT \
            from 0.4 on, settings of Unsloth and LLaMA-Factory through PEFT, mlx-lm on the CPU, loralib, llama.cpp's \
            converter; image models of diffusers and the names of kohya's scripts, Musubi, XLabs and ComfyUI, which are \
            refused. `exhibit.json` beside each says how it was made and whether it must be read.",
    unit: "silently wrong, or refused where it must be read",
    bar: 0.0,
    bounded: 114,
    full: 114,
    run,
};

const LOGITS: Limit = Limit { unit: "largest relative error of the logits of what was read", bar: 1e-4 };

/// What is known of a file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exhibit {
    base: String,
    /// How it was made.
    #[serde(rename = "how")]
    _how: String,
    must_load: bool,
    /// The adapter's own file, where it is no folder.
    file: Option<String>,
    /// Scaling numerator that the file does not hold.
    alpha: Option<f64>,
    /// A word of the reason for a refusal.
    reason: Option<String>,
}

fn run(_: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    for tool in listed(&root().join("parity/museum"))? {
        for case in listed(&tool)? {
            let name = format!("{} of {}", name_of(&case), name_of(&tool));
            one(&name_of(&tool), &case, &name, tally).with_context(|| name.clone())?;
        }
    }
    Ok(())
}

fn one(tool: &str, case: &Path, name: &str, tally: &mut Tally) -> Result<()> {
    let exhibit: Exhibit = serde_json::from_str(&std::fs::read_to_string(case.join("exhibit.json"))?)?;
    let mut model = Model::load(&golden::folder().join(&exhibit.base), &LoadOptions::cpu())?;
    let path = exhibit.file.as_ref().map_or_else(|| case.to_owned(), |file| case.join(file));
    let read = forms::read(&path, exhibit.alpha);
    let attached = read.and_then(|files| folder::load(&mut model, files, false, DType::F32, &Device::Cpu));
    let attached = match attached {
        Ok(attached) => attached,
        Err(error) => {
            let error = error.to_string();
            let expected = exhibit.reason.as_ref().is_none_or(|word| error.contains(word.as_str()));
            tally.count(format!("refused with a reason ({tool})"));
            tally.held(format!("{name}: refused: {error}"), !exhibit.must_load && expected && !error.is_empty());
            return Ok(());
        }
    };
    let _set = acting(&mut model, attached)?;
    let expected = golden::tensors(&case.join("expected.safetensors"))?;
    let ids: Vec<Vec<i64>> = expected.get("ids").context("no ids")?.to_vec2()?;
    let flat = ids.concat().into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
    let batch = TokenBatch::new(flat, ids.len(), ids.first().map_or(0, Vec::len))?;
    let scores = model.forward(&batch, &Flow::eval())?.detach();
    let logits = expected.get("logits").context("no logits")?;
    // PEFT gives scores of virtual tokens as well.
    let (all, own) = (logits.dim(1)?, scores.dim(1)?);
    let error = relative(&scores, &logits.narrow(1, all.saturating_sub(own), own)?)?;
    tally.count(format!("read ({tool})"));
    tally.beside(&LOGITS, name, error);
    tally.cell(tool, "error of logits", error);
    tally.held(format!("{name}: logits differ by {error:e}"), error <= LOGITS.bar);
    Ok(())
}
