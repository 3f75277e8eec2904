//! What commands that run a model have in common: the model, its tokenizer, adapters.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::DType;
use clap::Args;
use espalier_adapters::AdapterSet;
use espalier_adapters::formats::piecewise::{Piece, Piecewise};
use espalier_adapters::formats::{folder, forms};
use espalier_data::TextCodec;
use espalier_models::{LoadOptions, Model, Streamed};
use espalier_train::{Recipe, setup};

use crate::output::Output;

/// A model, with adapters.
#[derive(Debug, Clone, Args)]
pub(crate) struct ModelArgs {
    /// Model folder, .gguf file or hub id; the embedded seedling if absent.
    #[arg(long, default_value = "")]
    pub(crate) model: String,
    /// Adapter folder, or NAME=DIR, or NAME=DIR@WEIGHT; several act together as a weighted sum.
    #[arg(long)]
    pub(crate) adapter: Vec<String>,
    /// Folder of the tokenizer, where the model's own folder has none.
    #[arg(long)]
    pub(crate) tokenizer: Option<String>,
    /// Revision of a hub model.
    #[arg(long)]
    pub(crate) revision: Option<String>,
    /// Device: auto, cpu, or cuda:N.
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// Dtype of activations and frozen weights: auto, f32, bf16, f16.
    #[arg(long, default_value = "auto")]
    pub(crate) dtype: String,
    /// Quantisation of the frozen matrices at load: none, nf4, nf4-double, int8, or a GGUF block type (q8_0, q6_k, q5_0,
    /// q4_0, q4_k).
    #[arg(long, default_value = "none")]
    pub(crate) quantization: String,
    /// Use an adapter although it was made for another base.
    #[arg(long)]
    pub(crate) allow_base: bool,
    /// Scaling numerator of an adapter whose files hold none (loralib).
    #[arg(long, value_name = "ALPHA")]
    pub(crate) adapter_alpha: Option<f64>,
}

/// A model whose weights stay in their files, and adapters that stay in theirs.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) model: Streamed,
    pub(crate) codec: TextCodec,
    pub(crate) adapters: Piecewise,
    /// How the model is read.
    pub(crate) options: LoadOptions,
}

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) model: Model,
    pub(crate) codec: TextCodec,
    pub(crate) adapters: AdapterSet,
}

/// One `--adapter`.
fn parse(text: &str, index: usize) -> Result<(String, PathBuf, f64)> {
    let (name, rest) = match text.split_once('=') {
        Some((name, rest)) if !Path::new(text).exists() => (name.to_owned(), rest),
        _ => (format!("adapter-{index}"), text),
    };
    match rest.rsplit_once('@') {
        Some((path, weight)) if !Path::new(rest).exists() => {
            let weight = weight.parse().with_context(|| format!("--adapter {text}: `{weight}` is not a weight"))?;
            Ok((name, PathBuf::from(path), weight))
        }
        _ => Ok((name, PathBuf::from(rest), 1.0)),
    }
}

impl ModelArgs {
    /// One adapter on a base, everything else by default.
    pub(crate) fn of(model: &str, adapter: &str, alpha: Option<f64>, allow_base: bool) -> Self {
        Self {
            model: model.to_owned(),
            adapter: vec![adapter.to_owned()],
            tokenizer: None,
            revision: None,
            device: "auto".into(),
            dtype: "auto".into(),
            quantization: "none".into(),
            allow_base,
            adapter_alpha: alpha,
        }
    }

    /// The base's name for cards: as given, else its folder.
    pub(crate) fn base_name(&self, path: Option<&Path>) -> String {
        match self.model.is_empty() {
            true => path.map_or_else(String::new, |p| p.display().to_string()),
            false => self.model.clone(),
        }
    }

    /// Where the model is, and how it is read.
    fn place(&self) -> Result<(PathBuf, LoadOptions)> {
        let recipe = Recipe {
            model: self.model.clone(),
            revision: self.revision.clone(),
            device: self.device.clone(),
            dtype: self.dtype.clone(),
            quantization: self.quantization.clone(),
            ..Recipe::default()
        };
        Ok((setup::model_path(&self.model, self.revision.as_deref())?, setup::load_options(&recipe)?))
    }

    /// Opens the model, its tokenizer and the adapters, and reads no weights.
    pub(crate) fn open(&self, out: Output) -> Result<Opened> {
        let (path, mut options) = self.place()?;
        let mut model = Streamed::open(&path, &options)?;
        let open = |model: &mut Streamed| -> Result<Piecewise> {
            let mut adapters = Piecewise::new();
            for (i, text) in self.adapter.iter().enumerate() {
                let (name, folder, weight) = parse(text, i)?;
                adapters.add(Piece::open(
                    model.host(),
                    (&name, &folder, weight),
                    self.adapter_alpha,
                    self.allow_base,
                )?)?;
            }
            Ok(adapters)
        };
        let mut adapters = open(&mut model)?;
        options.labels = labels(&path, head_rows(|name| adapters.rows_of(name)));
        if options.labels.is_some() {
            model = Streamed::open(&path, &options)?;
            adapters = open(&mut model)?;
        }
        for piece in adapters.iter() {
            let base = (piece.base, piece.config());
            if let Some(note) = setup::base_note(base, model.config(), model.provenance().path(), &self.model) {
                out.note(format!("adapter {}: {note}", piece.name));
            }
        }
        let codec = setup::codec(&path, self.tokenizer.as_deref(), model.config())?;
        Ok(Opened { model, codec, adapters, options })
    }

    /// Loads the model and its tokenizer, and puts the adapters into the slots.
    pub(crate) fn load(&self, out: Output) -> Result<Loaded> {
        let files = self
            .adapter
            .iter()
            .enumerate()
            .map(|(i, text)| {
                let (name, path, weight) = parse(text, i)?;
                Ok((name, weight, forms::read(&path, self.adapter_alpha)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let (path, mut options) = self.place()?;
        options.labels =
            labels(&path, files.iter().find_map(|(.., f)| head_rows(|name| f.tensors.get(name)?.dim(0).ok())));
        let mut model = Model::load(&path, &options)?;
        let codec = setup::codec(&path, self.tokenizer.as_deref(), model.config())?;
        let mut adapters = AdapterSet::new();
        let mut active = Vec::new();
        for (name, weight, files) in files {
            let device = model.device().clone();
            let attached = folder::load(&mut model, files, self.allow_base, DType::F32, &device)?;
            let base = (attached.base, &attached.config);
            if let Some(note) = setup::base_note(base, model.config(), model.provenance().path(), &self.model) {
                out.note(format!("adapter {name}: {note}"));
            }
            adapters.add(&name, attached)?;
            active.push((name, weight));
        }
        let wanted: Vec<(&str, f64)> = active.iter().map(|(n, w)| (n.as_str(), *w)).collect();
        adapters.activate(&mut model, &wanted)?;
        Ok(Loaded { model, codec, adapters })
    }
}

/// Rows of the classification head in an adapter's files, by the rows of each tensor.
fn head_rows(rows: impl Fn(&str) -> Option<usize>) -> Option<usize> {
    ["classifier.weight", "classifier.out_proj.weight"].into_iter().find_map(rows)
}

/// Labels of the model at `path` where an adapter brings a head with `found` of them, and they are not the model's own.
fn labels(path: &Path, found: Option<usize>) -> Option<usize> {
    let own = espalier_models::ModelConfig::read(path).ok().and_then(|c| c.labels());
    found.filter(|_| own.is_some() && own != found)
}
