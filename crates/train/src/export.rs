//! Adapters, and weighted sums of several, written and read back: their scores on a probe must be those of the adapter they were made from.

use std::path::Path;

use espalier_adapters::formats::folder::Saved;
use espalier_adapters::formats::forms::{self, Form};
use espalier_adapters::formats::piecewise::{Piece, Piecewise};
use espalier_adapters::formats::{atomic, sum};
use espalier_models::Streamed;

use crate::merge::{WriteOptions, Written};
use crate::run::model_card::ModelCard;
use crate::verify::Probe;
use crate::{Error, Result};

const CARD: &str = "README.md";

/// Writes what `adapters` do together as one adapter into `out` in the layout `form`, without a check: one at weight 1 as it is,
/// else their weighted sum. The weights of the base are read only where a part of them is in an adapter's start.
///
/// # Errors
/// If there is none, the layout cannot hold them, `out` holds an adapter of another tool, or a file cannot be written.
pub fn adapter(model: &mut Streamed, adapters: &Piecewise, form: Form, out: &Path) -> Result<Saved> {
    forms::claim(form, out, model.provenance().path())?;
    save(model, adapters, form, out)
}

fn save(model: &mut Streamed, adapters: &Piecewise, form: Form, out: &Path) -> Result<Saved> {
    if adapters.is_empty() {
        return Err(Error::recipe("adapter", "no adapter was given, so there is none to write"));
    }
    Ok(model.attached(adapters, |host, parts| match parts {
        [(one, weight)] if *weight == 1.0 => forms::save(form, host, one, out),
        several => {
            let joined = sum::of(host, several)?;
            forms::save(form, host, &joined, out)
        }
    })?)
}

/// As [`adapter`], with a card where the layout is a folder, after it was read back and gave the same scores within the limit. Else
/// `out` stays as it was.
///
/// # Errors
/// As [`adapter`], and if scores differ.
pub fn adapter_verified(
    model: &mut Streamed,
    adapters: &Piecewise,
    form: Form,
    out: &Path,
    options: &WriteOptions,
    probe: &Probe,
) -> Result<Written> {
    forms::claim(form, out, model.provenance().path())?;
    if adapters.is_empty() {
        return Err(Error::recipe("adapter", "no adapter was given, so there is none to write"));
    }
    let reference = probe.sides(model, adapters)?.adapted;
    let base_hash = model.provenance().hash()?;
    let mut written = None;
    // A layout of one file has no folder for a card.
    let file = if form.names().is_empty() { out.file_name().map(|n| n.to_string_lossy().into_owned()) } else { None };
    let (folder, names): (&Path, Vec<&str>) = match &file {
        Some(name) => (out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")), vec![name]),
        None => (out, form.names().iter().copied().chain([CARD]).collect()),
    };
    atomic::replace_files(folder, &names, |temp| -> Result<()> {
        let temp = &file.as_ref().map_or_else(|| temp.to_owned(), |name| temp.join(name));
        let saved = save(model, adapters, form, temp)?;
        let again = Piece::open(model.host(), ("again", temp, 1.0), None, false)?;
        let config = again.config().clone();
        let mut set = Piecewise::new();
        set.add(again)?;
        let comparison = probe.compare(&reference, &probe.sides(model, &set)?.adapted)?;
        if let Some(fault) = comparison.fault(options.limit) {
            return Err(Error::run(out, format!("not written: read back from its files, {fault} ({})", probe.about)));
        }
        let card = ModelCard {
            title: out.file_name().map_or_else(|| "adapter".into(), |n| n.to_string_lossy().into_owned()),
            base_model: config.base.clone().unwrap_or_else(|| options.base.clone()),
            base_hash: base_hash.clone(),
            method: config.method.name().to_owned(),
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
        let (probe, limit, memory) = (probe.about.clone(), options.limit, None);
        written =
            Some(Written { tensors: saved.tensors, files: 1, bytes: saved.bytes, probe, limit, memory, comparison });
        Ok(())
    })?;
    written.ok_or_else(|| Error::run(out, "nothing was written"))
}
