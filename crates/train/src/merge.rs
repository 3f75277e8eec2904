//! Merging with a check: the merged model is written, read back from its files and compared with the adapted one, and nothing is
//! left where the two differ by more than a limit.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use espalier_adapters::formats::atomic;
use espalier_adapters::{AdapterSet, Host};
use espalier_models::claim::claim;
use espalier_models::export::{ExportOptions, Exported, copy_companions};
use espalier_models::{LoadOptions, Model};
use serde::Serialize;

use crate::run::model_card::ModelCard;
use crate::verify::{Comparison, Probe};
use crate::{Error, Result};

/// How a model is written and held to what it was made from.
#[derive(Debug, Clone)]
pub struct WriteOptions {
    /// Form of the files.
    pub export: ExportOptions,
    /// Folder of the tokenizer, where the base's own has none.
    pub tokenizer: Option<PathBuf>,
    /// Largest difference of scores.
    pub limit: f64,
    /// Name of the base, as given.
    pub base: String,
    /// The command, for the card.
    pub command: String,
}

impl WriteOptions {
    /// The model's own dtype, and the limit that goes with it.
    pub fn new(model: &Model) -> Self {
        let export = ExportOptions::default();
        let limit = default_limit(model, &export);
        Self { export, tokenizer: None, limit, base: String::new(), command: String::new() }
    }
}

/// Largest difference of scores that goes without saying: rounding of f32 sums, or of weights to 16 bits.
pub fn default_limit(model: &Model, export: &ExportOptions) -> f64 {
    let wide = |dtype: candle_core::DType| dtype == candle_core::DType::F32;
    if wide(model.dtype()) && wide(export.dtype.unwrap_or(model.dtype())) { 1e-3 } else { 0.5 }
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
    /// The model read back from its files against the one in memory.
    #[serde(flatten)]
    pub comparison: Comparison,
}

/// What merging did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeReport {
    /// Modules whose weights changed.
    pub modules: usize,
    /// Whether the output head is no longer the token table.
    pub unties: bool,
    /// Largest difference of scores between base and adapted model; 0 means that the adapter does nothing.
    pub adapter_effect: f64,
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

/// Writes `model` to `out` as a model folder with a card, and reads it back: its scores must be those of `reference` within the
/// limit, else nothing is left.
///
/// # Errors
/// If `out` is not free, a file cannot be written, or scores differ.
pub fn write_verified(
    model: &mut Model,
    out: &Path,
    options: &WriteOptions,
    probe: &Probe,
    reference: &[Tensor],
    title: &str,
    facts: Vec<(String, String)>,
) -> Result<Written> {
    claim(out, model.provenance().path())?;
    let base_hash = model.base_hash()?;
    let mut result = None;
    atomic::replace_folder(out, |temp| -> Result<()> {
        let Exported { tensors, files, bytes } = model.write(temp, &options.export)?;
        if let Some(tokenizer) = &options.tokenizer {
            copy_companions(tokenizer, temp)?;
        }
        let load = LoadOptions { dtype: model.dtype(), device: model.device().clone(), ..LoadOptions::cpu() };
        let comparison = probe.compare(reference, &probe.scores(&Model::load(temp, &load)?)?)?;
        if let Some(fault) = comparison.fault(options.limit) {
            return Err(Error::run(out, format!("not written: read back from its files, {fault} ({})", probe.about)));
        }
        let classifier = model.config().labels().is_some();
        ModelCard {
            title: out.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned()),
            base_model: options.base.clone(),
            relation: "finetune".into(),
            base_hash: base_hash.clone(),
            method: title.to_owned(),
            library_name: "transformers".into(),
            pipeline_tag: if classifier { "text-classification".into() } else { "text-generation".into() },
            facts: facts.into_iter().chain(comparison.facts(probe, options.limit)).collect(),
            command: options.command.clone(),
            ..ModelCard::default()
        }
        .write(temp.join("README.md"))?;
        let (probe, limit) = (probe.about.clone(), options.limit);
        result = Some(Written { tensors, files, bytes, probe, limit, comparison });
        Ok(())
    })?;
    result.ok_or_else(|| Error::run(out, "nothing was written"))
}

/// Merges the adapters that act into the base and writes the result to `out`; what was written scores as the adapted model, within
/// the limit. Else the base is put back and nothing is written.
///
/// # Errors
/// If `out` is not free, the adapters cannot be merged or change nothing, a file cannot be written, or scores differ.
pub fn merge_into_folder(
    model: &mut Model,
    adapters: &mut AdapterSet,
    out: &Path,
    options: &WriteOptions,
    probe: &Probe,
) -> Result<MergeReport> {
    claim(out, model.provenance().path())?;
    let active: Vec<(String, f64)> = adapters.active().to_vec();
    let wanted: Vec<(&str, f64)> = active.iter().map(|(n, w)| (n.as_str(), *w)).collect();
    let adapted = probe.scores(model)?;
    adapters.disable(model)?;
    let base = probe.scores(model)?;
    adapters.activate(model, &wanted)?;
    let differences = base.iter().zip(&adapted).map(|(a, b)| max_difference(a, b)).collect::<Result<Vec<f64>>>()?;
    let adapter_effect = differences.into_iter().fold(0.0, f64::max);
    drop(base);
    if adapter_effect == 0.0 {
        let what = format!("the adapter changes nothing: its scores equal the base's ({})", probe.about);
        return Err(Error::recipe("merge", what));
    }
    let dtype = model.dtype();
    let merged = adapters.merge(model, dtype)?;
    let (modules, unties) = (merged.modules, merged.unties);
    let names: Vec<String> = active.iter().map(|(n, w)| format!("{n} ({w})")).collect();
    let facts = vec![
        ("Merged adapters".to_owned(), names.join(", ")),
        ("Changed modules".to_owned(), modules.to_string()),
        ("Effect of the adapters".to_owned(), format!("scores move by up to {adapter_effect:.3e}")),
    ];
    match write_verified(model, out, options, probe, &adapted, "merged adapter", facts) {
        Ok(written) => Ok(MergeReport { modules, unties, adapter_effect, written }),
        Err(error) => {
            adapters.unmerge(model, merged)?;
            adapters.activate(model, &wanted)?;
            Err(error)
        }
    }
}
