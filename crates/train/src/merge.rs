//! Merging with a check: the base with what adapters do to it is written from file to file, read back, and compared with the adapted
//! model; nothing is left where the two differ by more than a limit. Neither model is in memory as a whole at any time.

use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use espalier_adapters::formats::atomic;
use espalier_adapters::formats::piecewise::Piecewise;
use espalier_models::claim::claim;
use espalier_models::export::{ExportOptions, Exported, copy_companions};
use espalier_models::{LoadOptions, Model, ModelConfig, Streamed};
use serde::Serialize;

use crate::gain::{Gain, GainOptions};
use crate::resident::{Counter, Peaks};
use crate::run::model_card::ModelCard;
use crate::verify::{Comparison, Probe};
use crate::{Error, Result};

/// How a model is written and held to what it was made from.
#[derive(Debug, Clone)]
pub struct WriteOptions {
    /// Form of the files.
    pub export: ExportOptions,
    /// How the result is read back.
    pub load: LoadOptions,
    /// Folder of the tokenizer, where the base's own has none.
    pub tokenizer: Option<PathBuf>,
    /// Largest difference of scores.
    pub limit: f64,
    /// What is measured of the adapters' gain, where something is.
    pub gain: Option<GainOptions>,
    /// Name of the base, as given.
    pub base: String,
    /// The command, for the card.
    pub command: String,
}

impl WriteOptions {
    /// The dtype that the model is loaded in, and the limit that goes with it.
    pub fn new(load: &LoadOptions) -> Self {
        let export = ExportOptions::default();
        let limit = default_limit(load.dtype, &export);
        let load = LoadOptions { quantization: None, ..load.clone() };
        Self { export, load, tokenizer: None, limit, gain: None, base: String::new(), command: String::new() }
    }
}

/// Largest difference of scores that goes without saying for a model of `dtype`: rounding of f32 sums, or of weights to 16 bits.
pub fn default_limit(dtype: DType, export: &ExportOptions) -> f64 {
    if dtype == DType::F32 && export.dtype.unwrap_or(dtype) == DType::F32 { 1e-3 } else { 0.5 }
}

/// What was written, and what lies between it and the model it was made from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Written {
    /// Tensors.
    pub tensors: usize,
    /// Weight files.
    pub files: usize,
    /// Bytes of the weight files.
    pub bytes: u64,
    /// What the comparison was made on.
    pub probe: String,
    /// Largest difference allowed.
    pub limit: f64,
    /// Most memory that this took, where the system counts it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Peaks>,
    /// The model read back from its files against the one it was made from.
    #[serde(flatten)]
    pub comparison: Comparison,
}

/// What merging did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeReport {
    /// Modules that the adapters act on.
    pub modules: usize,
    /// Whether the output head is no longer the token table.
    pub unties: bool,
    /// Largest difference of scores between base and adapted model; 0 means that the adapter does nothing.
    pub adapter_effect: f64,
    /// What the files, and the files in coarser storage, keep of the adapters' gain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gain: Option<Gain>,
    /// The folder, and what lies between it and the adapted model.
    #[serde(flatten)]
    pub written: Written,
}

/// Largest difference; infinite where one is no number, which the maximum of a tensor passes over.
fn max_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let differences = (a - b)?.abs()?.flatten_all()?.to_vec1::<f32>()?;
    let larger = |m: f64, d: f64| if d >= 0.0 { m.max(d) } else { f64::INFINITY };
    Ok(differences.into_iter().map(f64::from).fold(0.0, larger))
}

/// The scores of a model read back from `folder`, against `reference`; an error where they are further apart than the limit.
fn read_back(
    out: &Path,
    folder: &Path,
    options: &WriteOptions,
    probe: &Probe,
    reference: &[Tensor],
) -> Result<Comparison> {
    let mut again = Streamed::open(folder, &options.load)?;
    let comparison = probe.compare(reference, &probe.sides(&mut again, &Piecewise::new())?.base)?;
    match comparison.fault(options.limit) {
        None => Ok(comparison),
        Some(fault) => {
            Err(Error::run(out, format!("not written: read back from its files, {fault} ({})", probe.about)))
        }
    }
}

fn card(out: &Path, config: &ModelConfig, base_hash: String, method: &str, options: &WriteOptions) -> ModelCard {
    ModelCard {
        title: out.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned()),
        base_model: options.base.clone(),
        relation: "finetune".into(),
        base_hash,
        method: method.to_owned(),
        library_name: "transformers".into(),
        pipeline_tag: if config.labels().is_some() { "text-classification".into() } else { "text-generation".into() },
        command: options.command.clone(),
        ..ModelCard::default()
    }
}

fn written(
    exported: Exported,
    options: &WriteOptions,
    probe: &Probe,
    comparison: Comparison,
    counter: &Counter,
) -> Written {
    let Exported { tensors, files, bytes, .. } = exported;
    let (probe, limit, memory) = (probe.about.clone(), options.limit, counter.peaks());
    Written { tensors, files, bytes, probe, limit, memory, comparison }
}

/// Writes the base of `model` with what `adapters` do to it into `temp`.
fn fill(model: &mut Streamed, adapters: &Piecewise, temp: &Path, options: &WriteOptions) -> Result<Exported> {
    let exported = model.write(temp, &options.export, adapters)?;
    if let Some(tokenizer) = &options.tokenizer {
        copy_companions(tokenizer, temp)?;
    }
    Ok(exported)
}

/// Writes the base of `model` to `out` as a model folder, dense, without a check.
///
/// # Errors
/// If `out` is not free, or a file cannot be written.
pub fn copy_into_folder(model: &mut Streamed, out: &Path, options: &WriteOptions) -> Result<Exported> {
    claim(out, model.provenance().path())?;
    let mut exported = None;
    atomic::replace_folder(out, |temp| -> Result<()> {
        exported = Some(fill(model, &Piecewise::new(), temp, options)?);
        Ok(())
    })?;
    exported.ok_or_else(|| Error::run(out, "nothing was written"))
}

/// As [`copy_into_folder`], with a card, and read back: what was written scores as the base does, within the limit. Else nothing is
/// left.
///
/// # Errors
/// If `out` is not free, a file cannot be written, or scores differ.
pub fn copy_verified(model: &mut Streamed, out: &Path, options: &WriteOptions, probe: &Probe) -> Result<Written> {
    claim(out, model.provenance().path())?;
    let mut counter = Counter::begin();
    let reference = probe.sides(model, &Piecewise::new())?.base;
    counter.end(|peaks| &mut peaks.verification);
    let mut result = None;
    atomic::replace_folder(out, |temp| -> Result<()> {
        let exported = fill(model, &Piecewise::new(), temp, options)?;
        counter.end(|peaks| &mut peaks.write);
        let comparison = read_back(out, temp, options, probe, &reference)?;
        counter.end(|peaks| &mut peaks.verification);
        let mut card = card(out, model.config(), model.provenance().hash()?, "copy", options);
        card.facts = comparison.facts(probe, options.limit);
        card.facts.extend(counter.peaks().map(|peaks| peaks.fact()));
        card.write(temp.join("README.md"))?;
        result = Some(written(exported, options, probe, comparison, &counter));
        Ok(())
    })?;
    result.ok_or_else(|| Error::run(out, "nothing was written"))
}

/// Writes a model that is in memory, with what acts on it, to `out`, and reads it back: the files' scores must be those of the model,
/// within the limit. Else nothing is left.
///
/// # Errors
/// If `out` is not free, a file cannot be written, or scores differ.
pub fn model_verified(model: &mut Model, out: &Path, options: &WriteOptions, probe: &Probe) -> Result<Written> {
    claim(out, model.provenance().path())?;
    let mut counter = Counter::begin();
    let reference = probe.scores(model)?;
    counter.end(|peaks| &mut peaks.verification);
    let mut result = None;
    atomic::replace_folder(out, |temp| -> Result<()> {
        let exported = model.write(temp, &options.export)?;
        if let Some(tokenizer) = &options.tokenizer {
            copy_companions(tokenizer, temp)?;
        }
        counter.end(|peaks| &mut peaks.write);
        let comparison = read_back(out, temp, options, probe, &reference)?;
        counter.end(|peaks| &mut peaks.verification);
        result = Some(written(exported, options, probe, comparison, &counter));
        Ok(())
    })?;
    result.ok_or_else(|| Error::run(out, "nothing was written"))
}

/// Merges `adapters` into the base of `model` and writes the result to `out`; what was written scores as the adapted model, within
/// the limit. Else nothing is written.
///
/// # Errors
/// If `out` is not free, the adapters cannot be merged or change nothing, a file cannot be written, scores differ, or less of the
/// adapters' gain is kept than is asked for.
pub fn merge_into_folder(
    model: &mut Streamed,
    adapters: &Piecewise,
    out: &Path,
    options: &WriteOptions,
    probe: &Probe,
) -> Result<MergeReport> {
    claim(out, model.provenance().path())?;
    let mut counter = Counter::begin();
    let sides = probe.sides(model, adapters)?;
    counter.end(|peaks| &mut peaks.verification);
    let differences = sides.base.iter().zip(&sides.adapted).map(|(a, b)| max_difference(a, b));
    let adapter_effect = differences.collect::<Result<Vec<f64>>>()?.into_iter().fold(0.0, f64::max);
    if sides.adapted.is_empty() || adapter_effect == 0.0 {
        let what = format!("the adapter changes nothing: its scores equal the base's ({})", probe.about);
        return Err(Error::recipe("merge", what));
    }
    let base_loss = probe.loss(&sides.base)?;
    let adapted = sides.adapted;
    drop(sides.base);
    let modules = adapters.modules().len();
    let names: Vec<String> = adapters.iter().map(|piece| format!("{} ({})", piece.name, piece.weight)).collect();
    let mut result = None;
    atomic::replace_folder(out, |temp| -> Result<()> {
        let exported = fill(model, adapters, temp, options)?;
        counter.end(|peaks| &mut peaks.write);
        let comparison = read_back(out, temp, options, probe, &adapted)?;
        let gain = match &options.gain {
            None => None,
            Some(wanted) => Some(wanted.measure(temp, &options.load, probe, base_loss, &adapted, &comparison)?),
        };
        if let (Some(wanted), Some(gain)) = (&options.gain, &gain)
            && let Some(fault) = wanted.fault(gain)
        {
            return Err(Error::run(out, format!("not written: {fault} ({})", probe.about)));
        }
        let mut card = card(out, model.config(), model.provenance().hash()?, "merged adapter", options);
        card.facts = vec![
            ("Merged adapters".to_owned(), names.join(", ")),
            ("Changed modules".to_owned(), modules.to_string()),
            ("Effect of the adapters".to_owned(), format!("scores move by up to {adapter_effect:.3e}")),
        ];
        card.facts.extend(comparison.facts(probe, options.limit));
        card.facts.extend(gain.iter().flat_map(Gain::facts));
        counter.end(|peaks| &mut peaks.verification);
        card.facts.extend(counter.peaks().map(|peaks| peaks.fact()));
        card.write(temp.join("README.md"))?;
        let unties = exported.unties;
        let written = written(exported, options, probe, comparison, &counter);
        result = Some(MergeReport { modules, unties, adapter_effect, gain, written });
        Ok(())
    })?;
    result.ok_or_else(|| Error::run(out, "nothing was written"))
}
