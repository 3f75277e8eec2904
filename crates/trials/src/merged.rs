//! a merged adapter acts as the adapter did, and what is left of it where the merge goes into quantised storage.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};
use espalier_adapters::formats::folder;
use espalier_adapters::formats::piecewise::{Piece, Piecewise};
use espalier_models::export::ExportOptions;
use espalier_models::{LoadOptions, Model, Quantization, Streamed};
use espalier_train::gain::GainOptions;
use espalier_train::merge::{self, MergeReport, WriteOptions};
use espalier_train::quickstart::{self, Size};
use espalier_train::session::{self, SessionOptions};
use espalier_train::trainer::Scope as Trained;
use espalier_train::verify::Probe;
use espalier_train::{Run, Silent};

use crate::subject::{self, Subject, acting, difference, refuses_merge, scores};
use crate::{Bar, Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-09",
    title: "Merged against unmerged",
    claim: "Merging an adapter into its base changes no logit by more than rounding, for bases in f32, NF4, int8, Q8_0 and \
            Q4_0 whose merge is kept dense, in f32 on the CPU: in memory, and from the adapter's files and the base's to a \
            model folder; the merge changes the base in every case. Every golden adapter \
            of PEFT, and every method in each of its examples, where the storage takes them; methods that are no change of weights refuse both \
            with the reason, and change nothing. Further figures: the same in \
            bf16, relative to the largest logit; and of a LoRA that learnt the quickstart's skill, what merges keep of its \
            gain (loss of the base less loss of the adapted model, on unseen rows): dense merges of every base, and merges of \
            the f32 base that are loaded in quantised storage again, which are stated.",
    unit: "largest |difference of logits|",
    bar: 1e-4,
    bounded: 500,
    full: 500,
    run,
};

/// Largest relative difference of logits where the merge is rounded to bf16.
const BF16: f64 = 6e-2;
/// Share of the gain that a dense merge keeps.
const KEPT: f64 = 0.98;

/// Storages of a base, by name.
fn storages() -> Vec<(&'static str, Quantization)> {
    vec![
        ("nf4", Quantization::Nf4 { double: true }),
        ("int8", Quantization::Int8),
        ("q8_0", Quantization::Gguf(GgmlDType::Q8_0)),
        ("q4_0", Quantization::Gguf(GgmlDType::Q4_0)),
    ]
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    every_method(scope, tally)?;
    gain(scope, tally)
}

fn every_method(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let mut bases = vec![
        ("f32", LoadOptions::cpu()),
        ("bf16", LoadOptions { dtype: DType::BF16, ..LoadOptions::cpu() }),
    ];
    bases.extend(
        storages().into_iter().map(|(name, q)| (name, LoadOptions { quantization: Some(q), ..LoadOptions::cpu() })),
    );
    let mut rounded: f64 = 0.0;
    for subject in subject::all()? {
        for (storage, options) in &bases {
            let made = subject.model(options).and_then(|mut model| {
                let attached = subject.attach(&mut model)?;
                Ok((model, attached))
            });
            let (mut model, attached) = match made {
                Ok(made) => made,
                Err(e) if *storage == "f32" => return Err(e),
                // A refusal is said, and is none of this trial's business; f32 takes everything.
                Err(_) => {
                    tally.count(format!("refused on {storage}"));
                    continue;
                }
            };
            let base = scores(&model)?;
            let files = match subject.golden() {
                Some(golden) => golden.to_owned(),
                None => {
                    let files = scope.scratch.join("adapter");
                    folder::save(&mut model, &attached, &files)?;
                    files
                }
            };
            let mut set = acting(&mut model, attached)?;
            let unmerged = scores(&model)?;
            let name = format!("{} on {storage}", subject.name);
            ensure!(difference(&unmerged, &base)? > 1e-3, "{name}: the adapter changes nothing");
            if let Some(reason) = refuses_merge(&mut set, &mut model, options.dtype)? {
                let streamed = from_file_to_file(&subject, &files, options, scope).err().map(|e| format!("{e:#}"));
                ensure!(streamed.is_some_and(|e| e.contains(reason)), "{name}: its files are merged");
                tally.count("no change of weights: refused with the reason");
                continue;
            }
            let _ = set.merge(&mut model, options.dtype)?;
            ensure!(set.active().is_empty(), "{name}: still acting");
            let found = difference(&scores(&model)?, &unmerged)?;
            tally.count(*storage);
            if options.dtype == DType::F32 {
                tally.value(&name, found);
                let found = difference(&from_file_to_file(&subject, &files, options, scope)?, &unmerged)?;
                tally.count(format!("{storage}, from file to file"));
                tally.value(format!("{name}, from file to file"), found);
            } else {
                let largest = difference(&unmerged, &unmerged.zeros_like()?)?.max(1.0);
                rounded = if found >= 0.0 { rounded.max(found / largest) } else { f64::INFINITY };
            }
        }
    }
    tally.figure("largest relative |difference of logits|, bf16", rounded, Some(Bar::AtMost(BF16)));
    Ok(())
}

/// Scores of the folder that a merge of the adapter in `files` into its base's files writes.
fn from_file_to_file(subject: &Subject, files: &Path, options: &LoadOptions, scope: &Scope<'_>) -> Result<Tensor> {
    let out = scope.scratch.join("merged");
    std::fs::create_dir_all(&out)?;
    let mut base = Streamed::open(&subject.base, options)?;
    let mut adapters = Piecewise::new();
    adapters.add(Piece::open(base.host(), ("a", files, 1.0), None, false)?)?;
    base.write(&out, &ExportOptions::default(), &adapters)?;
    scores(&Model::load(&out, &LoadOptions::cpu())?)
}

/// Trains the quickstart's adapter; gives its folder and unseen rows.
fn trained(scope: &Scope<'_>) -> Result<(std::path::PathBuf, Probe)> {
    let size = match scope.is_full() {
        true => Size::default(),
        false => Size { rows: 320, test_rows: 8, steps: 20 },
    };
    let mut run: Run = quickstart::prepare(&scope.scratch.join("run"), size)?;
    let plan = run.plan(0)?;
    let options =
        SessionOptions {
            scope: Trained::Adapter,
            resume: false,
            overwrite: true,
            allow_memory: true,
            command: "trial R-09".into(),
        };
    let ended = session::run(&mut run, &plan, &options, &mut Silent, &AtomicBool::new(false))?;
    Ok((ended.adapter.context("no adapter was written")?, quickstart::probe(&run, size.test_rows)?))
}

/// Merges into a base loaded in `quantization`; what of the gain is kept dense, and in each of `stored`.
fn merged(
    adapter: &Path,
    probe: &Probe,
    quantization: Option<Quantization>,
    stored: Vec<(String, Quantization)>,
    out: &Path,
) -> Result<MergeReport> {
    let load = LoadOptions { quantization, ..LoadOptions::cpu() };
    let mut base = Streamed::open(&espalier_models::seedling::folder()?, &load)?;
    let mut adapters = Piecewise::new();
    adapters.add(Piece::open(base.host(), ("a", adapter, 1.0), None, false)?)?;
    let gain = GainOptions { storages: stored, least: 0.0, accept: true };
    let options = WriteOptions { gain: Some(gain), ..WriteOptions::new(&load) };
    Ok(merge::merge_into_folder(&mut base, &adapters, out, &options, probe)?)
}

fn gain(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let (adapter, probe) = trained(scope)?;
    let mut again: Vec<(String, Quantization)> = storages().into_iter().map(|(n, q)| (n.to_owned(), q)).collect();
    again.push(("q4_k".into(), Quantization::Gguf(GgmlDType::Q4K)));
    let bases = [("f32", None, again)].into_iter();
    for (name, quantization, stored) in bases.chain(storages().into_iter().map(|(n, q)| (n, Some(q), Vec::new()))) {
        let report = merged(&adapter, &probe, quantization, stored, &scope.scratch.join(format!("merged-{name}")))?;
        let found = report.gain.context("no gain was measured")?;
        ensure!(found.note.is_none(), "{name}: {}", found.note.unwrap_or_default());
        if name == "f32" {
            tally.figure("gain of the adapter on f32, in nats", found.gain, None);
        }
        for stored in found.stored {
            let kept = stored.gain_kept.unwrap_or(f64::NAN);
            match stored.storage.as_str() {
                "written" => {
                    tally.figure(format!("gain kept by a dense merge of {name}"), kept, Some(Bar::AtLeast(KEPT)));
                }
                storage => tally.figure(format!("gain kept by a merge stored as {storage}"), kept, None),
            }
        }
    }
    Ok(())
}
