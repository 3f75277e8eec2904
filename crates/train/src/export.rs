//! Adapters written and read back: their scores on a probe must be those of the adapter in memory.

use std::path::Path;

use candle_core::DType;
use espalier_adapters::formats::forms::{self, Form};
use espalier_adapters::formats::{atomic, folder};
use espalier_adapters::{AdapterSet, Host};
use espalier_models::Model;

use crate::merge::{WriteOptions, Written};
use crate::run::model_card::ModelCard;
use crate::verify::Probe;
use crate::{Error, Result};

const CARD: &str = "README.md";

/// Writes the adapter `name`, which acts alone, into `out` in the layout `form`, with a card where that is a folder, after it was read back and gave the same scores within
/// the limit. Else `out` stays as it was.
///
/// # Errors
/// If `out` holds an adapter of another tool, a file cannot be written, or scores differ.
pub fn adapter_verified(
    model: &mut Model,
    adapters: &mut AdapterSet,
    (name, form): (&str, Form),
    out: &Path,
    options: &WriteOptions,
    probe: &Probe,
) -> Result<Written> {
    forms::claim(form, out, model.provenance().path())?;
    adapters.activate(model, &[(name, 1.0)])?;
    let reference = probe.scores(model)?;
    let (device, base_hash) = (model.device().clone(), model.base_hash()?);
    let mut written = None;
    // A layout of one file has no folder for a card.
    let file = if form.names().is_empty() { out.file_name().map(|n| n.to_string_lossy().into_owned()) } else { None };
    let (folder, names): (&Path, Vec<&str>) = match &file {
        Some(name) => (out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")), vec![name]),
        None => (out, form.names().iter().copied().chain([CARD]).collect()),
    };
    atomic::replace_files(folder, &names, |temp| -> Result<()> {
        let temp = &file.as_ref().map_or_else(|| temp.to_owned(), |name| temp.join(name));
        let saved = forms::save(form, model, adapters.get(name)?, temp)?;
        let again = folder::load(model, forms::read(temp, None)?, false, DType::F32, &device)?;
        let (method, config) = (again.config.method.name(), again.config.clone());
        let mut set = AdapterSet::new();
        set.add("again", again)?;
        set.activate(model, &[("again", 1.0)])?;
        let comparison = probe.compare(&reference, &probe.scores(model)?)?;
        if let Some(fault) = comparison.fault(options.limit) {
            return Err(Error::run(out, format!("not written: read back from its files, {fault} ({})", probe.about)));
        }
        let card = ModelCard {
            title: out.file_name().map_or_else(|| "adapter".into(), |n| n.to_string_lossy().into_owned()),
            base_model: config.base.clone().unwrap_or_else(|| options.base.clone()),
            base_hash: base_hash.clone(),
            method: method.to_owned(),
            library_name: match form {
                Form::Mlx => "mlx".into(),
                _ if config.method.to_peft().is_some() => "peft".into(),
                _ => "espalier".into(),
            },
            facts: comparison.facts(probe, options.limit),
            command: options.command.clone(),
            ..ModelCard::default()
        };
        if file.is_none() {
            card.write(temp.join(CARD))?;
        }
        let (probe, limit) = (probe.about.clone(), options.limit);
        written = Some(Written { tensors: saved.tensors, files: 1, bytes: saved.bytes, probe, limit, comparison });
        Ok(())
    })?;
    adapters.activate(model, &[(name, 1.0)])?;
    written.ok_or_else(|| Error::run(out, "nothing was written"))
}
