//! taking a merge back gives the base back.

use candle_core::DType;
use espalier_models::LoadOptions;
use espalier_models::source::Quantization;

use crate::subject::{self, acting, live_weights, refuses_merge};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-10",
    title: "Unmerging",
    claim: "Merging and taking the merge back leaves every weight and bias that the model computes with as it was, byte for \
            byte: f32, bf16, NF4 and int8 bases on the CPU. Every golden adapter of PEFT, and every method in each of its \
            examples, where the storage takes them.",
    unit: "cases with another byte",
    bar: 0.0,
    bounded: 240,
    full: 240,
    run,
};

fn run(_: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    let storages = [
        ("f32", LoadOptions::cpu()),
        ("bf16", LoadOptions { dtype: DType::BF16, ..LoadOptions::cpu() }),
        ("nf4", LoadOptions { quantization: Some(Quantization::Nf4 { double: true }), ..LoadOptions::cpu() }),
        ("int8", LoadOptions { quantization: Some(Quantization::Int8), ..LoadOptions::cpu() }),
    ];
    for subject in subject::all()? {
        for (storage, options) in &storages {
            let mut model = subject.model(options)?;
            let attached = match subject.attach(&mut model) {
                Ok(attached) => attached,
                // A refusal is said, and is none of this trial's business; f32 takes everything.
                Err(e) if *storage == "f32" => return Err(e),
                Err(_) => {
                    tally.count(format!("refused on {storage}"));
                    continue;
                }
            };
            let before = live_weights(&mut model)?;
            let mut set = acting(&mut model, attached)?;
            if refuses_merge(&mut set, &mut model, options.dtype)?.is_some() {
                tally.count("no change of weights: refused with the reason");
                continue;
            }
            let merged = set.merge(&mut model, options.dtype)?;
            let name = format!("{} on {storage}", subject.name);
            anyhow::ensure!(live_weights(&mut model)? != before, "{name}: nothing was merged");
            set.unmerge(&mut model, merged)?;
            tally.held(name, live_weights(&mut model)? == before);
            tally.count(*storage);
        }
    }
    Ok(())
}
