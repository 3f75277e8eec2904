//! adapters compute what they compute in PEFT.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use espalier_adapters::{Flow, Host, ModuleMut};
use espalier_models::{Model, TokenBatch};

use crate::golden::{self, Case};
use crate::subject::{acting, relative, values};
use crate::{Limit, Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-01",
    title: "Forward parity with PEFT",
    claim: "An adapter that PEFT wrote gives the logits that PEFT computes with it, on the CPU in f32; the error is the \
            largest difference over the largest logit. With the base in bf16, every linear map or table that the adapter \
            changes gives what PEFT gives in f32 from the same bf16 weights and rows, each map by itself (through whole \
            models bf16 differs by more, in PEFT too); the table has beside it how far PEFT's own bf16 is from that, and \
            ours from PEFT's. Every folder of `parity/golden/adapters`; those that are refused are refused with their \
            reason. A row of the table is what a case uses beside linear maps.",
    unit: "largest relative error of logits, f32",
    bar: 1e-5,
    bounded: 37,
    full: 37,
    run,
};

/// Of the outputs of changed maps, with the base in bf16.
const BF16: Limit = Limit { unit: "largest relative error of a changed map's outputs, bf16", bar: 1e-2 };

fn run(_: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    for case in golden::cases()? {
        match &case.refused {
            Some(word) => refused(&case, word, tally)?,
            None => computed(&case, tally).with_context(|| case.name.clone())?,
        }
    }
    Ok(())
}

fn refused(case: &Case, word: &str, tally: &mut Tally) -> Result<()> {
    let error = case.attach(&mut case.model(DType::F32)?).err();
    let said = error.map(|e| e.to_string()).with_context(|| format!("{}: is not refused", case.name))?;
    anyhow::ensure!(said.contains(word), "{}: refused for another reason: {said}", case.name);
    tally.count(format!("refused ({}: {word})", case.name));
    Ok(())
}

fn computed(case: &Case, tally: &mut Tally) -> Result<()> {
    let (expected, uses) = (case.expected()?, case.uses()?);
    let mut model = case.model(DType::F32)?;
    let attached = case.attach(&mut model)?;
    let _set = acting(&mut model, attached)?;
    let ids: Vec<Vec<i64>> = expected.get("ids").context("no ids")?.to_vec2()?;
    let flat = ids.concat().into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
    let batch = TokenBatch::new(flat, ids.len(), ids.first().map_or(0, Vec::len))?;
    let scores = model.forward(&batch, &Flow::eval())?.detach();
    let error = relative(&scores, expected.get("logits").context("no logits")?)?;
    tally.value(case.name.clone(), error);
    tally.cell(uses.clone(), "f32 logits", error);
    in_bf16(case, &uses, &expected, tally)
}

/// Every map that PEFT's file has outputs of.
fn in_bf16(case: &Case, uses: &str, expected: &BTreeMap<String, Tensor>, tally: &mut Tally) -> Result<()> {
    let mut model = case.model(DType::BF16)?;
    let attached = case.attach(&mut model)?;
    let _set = acting(&mut model, attached)?;
    let rows = expected.iter().filter_map(|(key, x)| Some((key.strip_prefix("bf16.")?.strip_suffix(".x")?, x)));
    for (path, x) in rows {
        let get = |key: &str| expected.get(&format!("bf16.{path}.{key}")).with_context(|| format!("{path}: no {key}"));
        let (theirs, exact) = (get("y")?, get("exact")?);
        let (kind, ours) = one_map(&mut model, path, x)?.with_context(|| format!("{path}: no such map"))?;
        let error = relative(&ours, exact)?;
        tally.beside(&BF16, format!("{} at {path}", case.name), error);
        tally.cell(uses, format!("bf16 {kind}"), error);
        tally.cell(uses, "PEFT's own bf16", relative(theirs, exact)?);
        tally.cell(uses, "bf16 against PEFT's", relative(&ours, theirs)?);
        tally.count(format!("changed maps in bf16, {kind}"));
    }
    Ok(())
}

/// What the map at `path` is, under the names of torch, and gives for `x`: rows, or ids of a table.
fn one_map(model: &mut Model, path: &str, x: &Tensor) -> Result<Option<(&'static str, Tensor)>> {
    let mut found = None;
    let ids = values(x)?;
    model.walk(&mut |module| {
        match module {
            ModuleMut::Linear(m) if m.path() == path => {
                let kind = if m.transposed_on_disk() { "Conv1D" } else { "Linear" };
                found = Some((kind, m.forward(x, &Flow::eval())?.detach()));
            }
            ModuleMut::Embedding(m) if m.path() == path => {
                let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
                found = Some(("Embedding", m.forward(&Tensor::new(ids, x.device())?)?.detach()));
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(found)
}
