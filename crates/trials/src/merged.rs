//! a merged adapter acts as the adapter did.

use candle_core::DType;
use espalier_models::LoadOptions;

use crate::subject::{self, acting, difference, refuses_merge, scores};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-09",
    title: "Merged against unmerged",
    claim: "Merging an adapter into its base changes no logit by more than rounding, in f32 on the CPU; the merge changes \
            the base in every case. Every golden adapter of PEFT, and every method in each of its examples. Methods \
            that are no change of weights refuse with the reason, and change nothing. Merges into quantised storage are not \
            part of this figure.",
    unit: "largest |difference of logits|",
    bar: 1e-4,
    bounded: 60,
    full: 60,
    run,
};

fn run(_: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    for subject in subject::all()? {
        let mut model = subject.model(&LoadOptions::cpu())?;
        let base = scores(&model)?;
        let attached = subject.attach(&mut model)?;
        let mut set = acting(&mut model, attached)?;
        let unmerged = scores(&model)?;
        anyhow::ensure!(difference(&unmerged, &base)? > 1e-3, "{}: the adapter changes nothing", subject.name);
        if refuses_merge(&mut set, &mut model, DType::F32)? {
            tally.count("no change of weights: refused with the reason");
            continue;
        }
        let _ = set.merge(&mut model, DType::F32)?;
        anyhow::ensure!(set.active().is_empty(), "{}: still acting", subject.name);
        tally.value(subject.name, difference(&scores(&model)?, &unmerged)?);
    }
    Ok(())
}
