//! From a recipe to everything a run needs: device, model, tokenizer, data, adapter.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_adapters::attach::{Attached, BaseCheck, Origin, attach};
use espalier_adapters::config::TaskType;
use espalier_adapters::formats::folder;
use espalier_adapters::{AdapterConfig, Host};
use espalier_data::{
    BatchOptions, Batcher, ChatTemplate, DataOptions, EncodeOptions, Mixture, Packing, Part, Report, Source, SplitSize,
    TextCodec, TextUnit, TokenStore, Truncation, split,
};
use espalier_models::{LoadOptions, Model, ModelConfig};

pub use crate::named::{QUANTIZATIONS, device, dtype, model_path, quantization};
use crate::objective::{Objective, causal::Causal, classification::Classification};
use crate::recipe::Recipe;
use crate::recipe::values::DataList;
use crate::{Error, Result};

/// How a recipe wants a model loaded.
///
/// # Errors
/// If device, dtype or quantisation are not valid.
pub fn load_options(recipe: &Recipe) -> Result<LoadOptions> {
    let device = device(&recipe.device)?;
    Ok(LoadOptions {
        dtype: dtype(&recipe.dtype, &device)?,
        device,
        quantization: quantization(&recipe.quantization)?,
        labels: recipe.labels,
        seed: recipe.seed,
    })
}

/// Loads the recipe's model.
///
/// # Errors
/// If the model cannot be found or read.
pub fn model(recipe: &Recipe) -> Result<Model> {
    let path = model_path(&recipe.model, recipe.revision.as_deref())?;
    Ok(Model::load(&path, &load_options(recipe)?)?)
}

/// A model with random weights, of the recipe's architecture.
///
/// # Errors
/// If the recipe names none, or it is not supported.
pub fn new_model(recipe: &Recipe) -> Result<Model> {
    let file = recipe
        .architecture
        .as_deref()
        .ok_or_else(|| Error::recipe("architecture", "pre-training needs the config.json of an architecture"))?;
    let path = Path::new(file);
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let json = serde_json::from_str(&text).map_err(|e| Error::recipe(file, e.to_string()))?;
    Ok(Model::random(ModelConfig::from_json(path, json)?, &load_options(recipe)?)?)
}

/// The tokenizer that belongs to a model at `path`, from its folder or from the folder named apart; a codec for token ids
/// alone where there is neither.
///
/// # Errors
/// If a tokenizer is there but malformed, or knows more tokens than the model.
pub fn codec(path: &Path, apart: Option<&str>, config: &ModelConfig) -> Result<TextCodec> {
    let folder = apart.map_or_else(|| path.to_owned(), PathBuf::from);
    let present = ["tokenizer.json", "vocab.json"].iter().any(|f| folder.join(f).is_file());
    if !present && apart.is_none() {
        return Ok(TextCodec::ids_only(config.vocab));
    }
    let codec = TextCodec::from_folder(&folder)?;
    if codec.vocab_size() > config.vocab {
        return Err(Error::recipe(
            "tokenizer",
            format!(
                "{}: the tokenizer knows {} tokens, the model {}; it belongs to another model",
                folder.display(),
                codec.vocab_size(),
                config.vocab
            ),
        ));
    }
    Ok(codec.with_vocab_size(config.vocab))
}

/// The data of a run, tokenised.
#[derive(Debug)]
pub struct Data {
    /// Training batches.
    pub train: Batcher,
    /// Evaluation batches.
    pub eval: Option<Batcher>,
    /// What became of the training rows, by source.
    pub reports: Vec<(String, Report)>,
    /// What became of the evaluation rows.
    pub eval_reports: Vec<(String, Report)>,
    /// Content key of all of it.
    pub key: String,
    /// The training stores, for a look at single rows.
    pub stores: Vec<Arc<TokenStore>>,
}

fn data_options(recipe: &Recipe) -> DataOptions {
    DataOptions {
        text_column: recipe.text_column.clone(),
        prompt_column: recipe.prompt_column.clone(),
        completion_column: recipe.completion_column.clone(),
        label_column: recipe.label_column.clone(),
        text_unit: match recipe.text_unit.as_str() {
            "paragraph" => TextUnit::Paragraph,
            "file" => TextUnit::File,
            _ => TextUnit::Line,
        },
        skip_bad_rows: recipe.skip_bad_rows,
        limit: (recipe.limit_rows > 0).then_some(recipe.limit_rows),
        ..DataOptions::default()
    }
}

/// How many tokens the recipe's adapter puts before each sequence: known before it is made, for it may start from the data.
///
/// # Errors
/// If the adapter's settings are not valid.
pub fn virtual_tokens(recipe: &Recipe) -> Result<usize> {
    let config = match &recipe.init_adapter {
        Some(path) => folder::read_config(Path::new(path))?,
        None => recipe.adapter_config()?,
    };
    Ok(config.method.virtual_tokens())
}

/// Longest row a run may use; what stands before the sequences takes a part of the positions.
pub fn max_length(recipe: &Recipe, config: &ModelConfig, virtual_tokens: usize) -> usize {
    let most = config.max_positions.saturating_sub(virtual_tokens);
    match recipe.max_length {
        0 => most,
        given => given.min(most),
    }
}

/// The codec with the recipe's way of encoding rows before which stand `virtual_tokens`, and its chat template where it names one.
///
/// # Errors
/// If the chat template cannot be read.
pub fn encoding(recipe: &Recipe, codec: TextCodec, config: &ModelConfig, virtual_tokens: usize) -> Result<TextCodec> {
    let label_names = config.label_names();
    let codec = with_template(codec, recipe.chat_template.as_deref())?;
    Ok(codec.with_options(EncodeOptions {
        max_length: Some(max_length(recipe, config, virtual_tokens)),
        completion_only: recipe.completion_only,
        truncation: match recipe.truncation.as_str() {
            "left" => Truncation::Left,
            "drop" => Truncation::Drop,
            "error" => Truncation::Error,
            _ => Truncation::Right,
        },
        label_names,
        allow_no_stop: recipe.allow_no_stop,
        ..EncodeOptions::default()
    }))
}

/// The codec with another chat template: a file, or a shipped one by its name.
///
/// # Errors
/// If there is none of that name, or it cannot be read.
pub fn with_template(codec: TextCodec, name: Option<&str>) -> Result<TextCodec> {
    let Some(name) = name else { return Ok(codec) };
    let template = ChatTemplate::named(name, codec.specials().named.clone())?;
    Ok(codec.with_template(template))
}

type Stores = (Vec<Arc<TokenStore>>, Vec<(String, Report)>, Vec<String>);

fn stores(recipe: &Recipe, list: &DataList, codec: &TextCodec) -> Result<Stores> {
    let options = data_options(recipe);
    let cache = recipe.cache_dir.as_ref().map(PathBuf::from);
    let mut out: Stores = Default::default();
    for source in &list.0 {
        let opened = Source::open(&source.path, options.clone())?;
        let store = TokenStore::build(&opened, codec, cache.as_deref())?;
        out.1.push((source.path.clone(), store.report().clone()));
        out.2.push(store.key().to_owned());
        out.0.push(Arc::new(store));
    }
    Ok(out)
}

/// Reads and tokenises a recipe's data.
///
/// # Errors
/// If there is none, a file cannot be read, or a row is bad and bad rows are not to be skipped.
pub fn data(recipe: &Recipe, codec: &TextCodec, config: &ModelConfig, virtual_tokens: usize) -> Result<Data> {
    if recipe.data.0.is_empty() {
        return Err(Error::recipe("data", "no training data given"));
    }
    let (all, reports, mut keys) = stores(recipe, &recipe.data, codec)?;
    for (store, source) in all.iter().zip(&recipe.data.0) {
        if store.is_empty() {
            return Err(Error::recipe("data", format!("{}: no row of it can be used", source.path)));
        }
    }
    let pad_id = codec.pad_id();
    let options = BatchOptions {
        batch_size: recipe.batch_size,
        shuffle: recipe.shuffle,
        seed: recipe.seed,
        packing: if recipe.packing { Packing::BestFit } else { Packing::Off },
        max_length: Some(max_length(recipe, config, virtual_tokens)),
        pad_id,
        ..BatchOptions::default()
    };
    let eval_rows = if recipe.eval_batch_size == 0 { recipe.batch_size } else { recipe.eval_batch_size };
    let eval_options = BatchOptions { batch_size: eval_rows, shuffle: false, packing: Packing::Off, ..options.clone() };
    let weighted = recipe.data.0.iter().any(|s| s.weight.is_some());
    let mut train_parts = Vec::new();
    let mut eval_parts = Vec::new();
    for (store, source) in all.iter().zip(&recipe.data.0) {
        let mut part = Part::new(store.clone());
        if recipe.validation_split > 0.0 {
            let size = if recipe.validation_split < 1.0 {
                SplitSize::Fraction(recipe.validation_split)
            } else {
                SplitSize::Count(recipe.validation_split as usize)
            };
            let (kept, held) = split(store.len(), size, recipe.seed)?;
            part = part.subset(kept);
            eval_parts.push(Part::new(store.clone()).subset(held));
        }
        let rows = part.len() as f64;
        train_parts.push(part.weight(if weighted { source.weight.unwrap_or(1.0) } else { rows }));
    }
    let train = Batcher::new(Mixture::new(train_parts, None)?, options)?;
    let (eval_stores, eval_reports, eval_keys) = stores(recipe, &recipe.eval_data, codec)?;
    keys.extend(eval_keys);
    eval_parts.extend(eval_stores.into_iter().map(Part::new));
    let eval_parts: Vec<Part> = eval_parts
        .into_iter()
        .map(|p| {
            let rows = p.len() as f64;
            p.weight(rows)
        })
        .filter(|p| !p.is_empty())
        .collect();
    let eval =
        if eval_parts.is_empty() { None } else { Some(Batcher::new(Mixture::new(eval_parts, None)?, eval_options)?) };
    let key = espalier_adapters::formats::hash::of_parts(keys.iter().map(String::as_bytes));
    Ok(Data { train, eval, reports, eval_reports, key, stores: all })
}

/// The adapter of a recipe on a model: a saved one to go on from, or a new one, with the tensors that it starts with where
/// `starts` made some from the data.
///
/// # Errors
/// If a target matches nothing, or a saved adapter does not fit.
pub fn adapter(
    recipe: &Recipe,
    model: &mut Model,
    starts: impl FnOnce(&mut Model, &AdapterConfig) -> Result<BTreeMap<String, Tensor>>,
) -> Result<(Attached, BTreeMap<String, Tensor>)> {
    let device = model.device().clone();
    if let Some(path) = &recipe.init_adapter {
        if !recipe.adapter.is_empty() {
            return Err(Error::recipe(
                "init_adapter",
                "the saved adapter brings its own settings; drop those of [adapter]",
            ));
        }
        let files = folder::read(Path::new(path))?;
        return Ok((folder::load(model, files, recipe.allow_base, DType::F32, &device)?, BTreeMap::new()));
    }
    let mut config = recipe.adapter_config()?;
    config.base = Some(base_name(recipe, model));
    config.task =
        Some(if model.config().labels().is_some() { TaskType::SequenceClassification } else { TaskType::CausalLm });
    if model.config().labels().is_some() && config.modules_to_save.is_empty() {
        config.modules_to_save = model.head_paths();
    }
    let starts = starts(model, &config)?;
    let origin = Origin::Started { seed: recipe.seed, starts: starts.clone() };
    Ok((attach(model, &config, origin, DType::F32, &device)?, starts))
}

/// What must be said of the base of a loaded adapter; `name` is the model as given.
pub fn base_note(
    (base, adapter): (BaseCheck, &AdapterConfig),
    config: &ModelConfig,
    path: Option<&Path>,
    name: &str,
) -> Option<String> {
    let path = path.map(|p| p.display().to_string()).unwrap_or_default();
    let own = config.raw.get("_name_or_path").and_then(serde_json::Value::as_str).unwrap_or_default();
    base.note(adapter, &[name, &path, own])
}

/// All dense weights of a model, to train it whole.
///
/// # Errors
/// If the walk fails.
pub fn whole_model(recipe: &Recipe, model: &mut Model) -> Result<Attached> {
    let device = model.device().clone();
    let method = espalier_adapters::MethodConfig::by_name("full")?;
    let base = model.config().names.base.to_owned();
    let mut whole = vec![base];
    if !model.config().tied {
        whole.extend(model.head_paths());
    }
    let config = AdapterConfig { modules_to_save: whole, ..AdapterConfig::new(method) };
    Ok(attach(model, &config, Origin::Seed(recipe.seed), DType::F32, &device)?)
}

fn base_name(recipe: &Recipe, model: &Model) -> String {
    if !recipe.model.is_empty() {
        return recipe.model.clone();
    }
    model.provenance().path().map_or_else(String::new, |p| p.display().to_string())
}

/// What a model is trained on: labels if it has a classification head, else its next tokens.
pub fn objective(model: &Model, codec: &TextCodec) -> Box<dyn Objective> {
    match model.config().labels() {
        Some(labels) => {
            let marks_pairs = model.config().token_types.is_some_and(|n| n > 1);
            let separator = codec.tokenizer().and_then(|t| t.token_to_id("[SEP]")).filter(|_| marks_pairs);
            Box::new(Classification { labels, separator })
        }
        None => Box::new(Causal),
    }
}
