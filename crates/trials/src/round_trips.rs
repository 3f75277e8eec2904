//! what is saved is what is read.

use candle_core::{DType, Device};
use espalier_adapters::formats::folder;
use espalier_models::LoadOptions;

use crate::subject::{self, Subject, acting, difference, scores};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-04",
    title: "Round trips of adapter files",
    claim: "An adapter saved and read back acts the same on the CPU in f32; the files of a second round are the first ones \
            byte for byte, and a file of PEFT keeps the values of every tensor. Every golden adapter of PEFT, and every \
            method in each of its examples. Files go from PEFT to us and through two rounds of ours; PEFT does not read \
            them back here.",
    unit: "largest |difference of logits|",
    bar: 1e-4,
    bounded: 60,
    full: 60,
    run,
};

fn run(scope: &Scope<'_>, tally: &mut Tally) -> anyhow::Result<()> {
    for name in subject::refused()? {
        tally.count(format!("refused with a reason ({name})"));
    }
    for (i, subject) in subject::all()?.iter().enumerate() {
        let d = once(subject, &scope.scratch.join(i.to_string()), tally)?;
        tally.value(subject.name.clone(), d);
    }
    Ok(())
}

/// Difference of the logits; infinite where files or tensors are not the same.
fn once(subject: &Subject, scratch: &std::path::Path, tally: &mut Tally) -> anyhow::Result<f64> {
    let cpu = LoadOptions::cpu();
    let (first, second) = (scratch.join("first"), scratch.join("second"));
    let (mut model, mut other) = (subject.model(&cpu)?, subject.model(&cpu)?);
    let attached = subject.attach(&mut model)?;
    folder::save(&mut model, &attached, &first)?;
    let files = folder::read(&first)?;
    let mut same = true;
    if let Some(golden) = subject.golden()
        && !subject.moves_base()?
    {
        let theirs = folder::read(golden)?.tensors;
        same &= theirs.keys().eq(files.tensors.keys());
        for (key, tensor) in &theirs {
            same &= files.tensors.get(key).is_some_and(|ours| matches!(difference(ours, tensor), Ok(0.0)));
        }
        tally.count("files of PEFT with every tensor kept");
    }
    let read = folder::load(&mut other, files, false, DType::F32, &Device::Cpu)?;
    folder::save(&mut other, &read, &second)?;
    for file in [folder::CONFIG_FILE, folder::WEIGHTS_FILE] {
        same &= std::fs::read(first.join(file))? == std::fs::read(second.join(file))?;
    }
    acting(&mut model, attached)?;
    acting(&mut other, read)?;
    let d = difference(&scores(&model)?, &scores(&other)?)?;
    if d == 0.0 {
        tally.count("logits equal bit for bit");
    }
    if !same {
        tally.name(format!("{}: files differ", subject.name));
    }
    Ok(if same { d } else { f64::INFINITY })
}
