//! every trainable tensor is trained, or said to stand still and why.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;

use espalier_adapters::MethodConfig;
use espalier_adapters::formats::safetensors;
use espalier_train::{Error, Recipe, Run, Silent};

use crate::{Scope, Tally, Trial, runs};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-19",
    title: "Every trainable tensor moves",
    claim: "In the first three steps of a run every trainable tensor gets other values, or the run names it among those that \
            stand still, with the reason: every golden model of every family, each with every method in each of its \
            examples, through the trainer itself. What moved is compared by value here, whatever the run says. A run that \
            finds a tensor without gradient or movement and without a reason ends with an error; none may.",
    unit: "tensors that stand still unexplained, and runs that end",
    bar: 0.0,
    bounded: 300,
    full: 5000,
    run,
};

fn run(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    let examples = MethodConfig::examples();
    for (i, (family, path)) in runs::families()?.into_iter().enumerate() {
        let folder = scope.scratch.join(&family);
        std::fs::create_dir_all(&folder)?;
        let recipe = runs::on_model(&folder, &path)?;
        let all = examples.iter().enumerate();
        // The bounded form takes each example with a few of the families.
        for (_, (name, method)) in all.filter(|(j, _)| scope.is_full() || (i + j) % 8 == 0) {
            let recipe = Recipe { adapter: runs::table(method)?, ..recipe.clone() };
            one(&format!("{name} on {family}"), recipe, tally)?;
        }
    }
    Ok(())
}

/// The bytes of every trainable tensor.
fn values(run: &Run) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    run.parameters.trainable().map(|p| Ok((p.name.clone(), safetensors::bytes_of(&p.tensor.detach())?))).collect()
}

fn one(name: &str, recipe: Recipe, tally: &mut Tally) -> anyhow::Result<()> {
    let mut run = Run::prepare(recipe)?;
    let before = values(&run)?;
    let outcome = match run.train(None, false, &mut Silent, &AtomicBool::new(false)) {
        Ok(outcome) => outcome,
        Err(e @ Error::NotTrained { .. }) => {
            tally.held(format!("{name}: {e}"), false);
            return Ok(());
        }
        Err(e) => anyhow::bail!("{name}: {e}"),
    };
    let live = outcome.live.ok_or_else(|| anyhow::anyhow!("{name}: nothing was watched"))?;
    let explained: BTreeSet<&str> = live.still.iter().flat_map(|s| s.tensors.iter().map(String::as_str)).collect();
    let after = values(&run)?;
    for (tensor, values) in &before {
        let moved = after.get(tensor).is_some_and(|now| now != values);
        tally.held(format!("{name}: {tensor} stands still"), moved || explained.contains(tensor.as_str()));
    }
    tally.count("runs");
    for still in &live.still {
        still.tensors.iter().for_each(|_| tally.count(format!("still: {}", still.reason)));
    }
    Ok(())
}
