//! `espalier inspect`.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use espalier_adapters::formats::{folder, safetensors};
use espalier_adapters::parametrisation::MethodConfig;
use espalier_adapters::target::Kind;
use espalier_models::ModelConfig;
use espalier_models::source::folder::WeightFiles;
use espalier_train::checkpoint;
use espalier_train::run::metrics::{self, Record};
use serde::Serialize;
use serde_json::{Value, json};

use crate::output::Output;

/// Says what is in a model folder, an adapter folder, a run folder or a safetensors file.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Folder or file.
    path: PathBuf,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// List the modules that can be adapted (model folders).
    #[arg(long)]
    modules: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    kind: &'static str,
    path: PathBuf,
    facts: Vec<(String, Value)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    items: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.kind, self.path.display())?;
        for (name, value) in &self.facts {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            writeln!(f, "  {name:22} {text}")?;
        }
        self.items.iter().try_for_each(|item| writeln!(f, "  {item}"))
    }
}

fn fact(name: &str, value: impl Serialize) -> (String, Value) {
    (name.into(), json!(value))
}

fn tensor_lines(path: &Path) -> Result<(Vec<String>, usize)> {
    let entries = safetensors::TensorFile::open(path)?.entries();
    let values = entries.iter().map(|(_, _, shape)| shape.iter().product::<usize>()).sum();
    Ok((entries.into_iter().map(|(name, dtype, shape)| format!("{name} {dtype:?} {shape:?}")).collect(), values))
}

impl Inspect {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let p = &self.path;
        let report = if p.is_file() && p.extension().is_some_and(|e| e == "safetensors") {
            let (items, values) = tensor_lines(p)?;
            let facts = vec![fact("tensors", items.len()), fact("values", values)];
            Report { kind: "safetensors file", path: p.clone(), facts, items }
        } else if p.join(folder::CONFIG_FILE).is_file() {
            self.adapter()?
        } else if p.join("metrics.jsonl").is_file() || p.join("recipe.toml").is_file() {
            self.run_folder()?
        } else if p.join("config.json").is_file() {
            self.model()?
        } else {
            bail!(
                "{}: neither a model (config.json), an adapter ({}), a run (metrics.jsonl) nor a safetensors file",
                p.display(),
                folder::CONFIG_FILE
            );
        };
        out.result(&report)
    }

    fn adapter(&self) -> Result<Report> {
        let files = folder::read(&self.path)?;
        let config = &files.config;
        let method: &MethodConfig = &config.method;
        let values: usize = files.tensors.values().map(candle_core::Tensor::elem_count).sum();
        let facts = vec![
            fact("method", serde_json::to_value(method)?),
            fact("targets", serde_json::to_value(&config.targets)?),
            fact("modules_to_save", &config.modules_to_save),
            fact("base", &config.base),
            fact("base hash", &config.base_hash),
            fact("tensors", files.tensors.len()),
            fact("values", values),
        ];
        let items = match self.tensors {
            true => files.tensors.iter().map(|(n, t)| format!("{n} {:?} {:?}", t.dtype(), t.dims())).collect(),
            false => Vec::new(),
        };
        Ok(Report { kind: "adapter", path: self.path.clone(), facts, items })
    }

    fn model(&self) -> Result<Report> {
        let config = ModelConfig::read(&self.path)?;
        let files = WeightFiles::open(&self.path)?;
        let names: Vec<&str> = files.names().collect();
        let mut values = 0;
        let mut items = Vec::new();
        for name in &names {
            if let Some(file) = files.file_of(name) {
                let (dtype, shape) = file.kind(name)?;
                values += shape.iter().product::<usize>();
                if self.tensors {
                    items.push(format!("{name} {dtype:?} {shape:?}"));
                }
            }
        }
        if self.modules {
            let options = espalier_models::LoadOptions::cpu();
            let mut model = espalier_models::Model::load(&self.path, &options)?;
            let candidates = espalier_adapters::attach::candidates(&mut model)?;
            items.extend(candidates.into_iter().map(|c| {
                let kind = match c.kind {
                    _ if c.head => "head",
                    Kind::Linear => "linear",
                    Kind::Embedding => "embedding",
                    Kind::Norm => "norm",
                };
                format!("{} ({kind})", c.path)
            }));
        }
        let facts = vec![
            fact("family", &config.family),
            fact("layers", config.layers),
            fact("hidden", config.hidden),
            fact("heads", format!("{} query, {} key/value, width {}", config.heads, config.kv_heads, config.head_dim)),
            fact("mlp", config.intermediate),
            fact("vocabulary", config.vocab),
            fact("positions", config.max_positions),
            fact("tied head", config.tied),
            fact("tensors", names.len()),
            fact("parameters", values),
            fact("hash", files.hash()?),
        ];
        Ok(Report { kind: "model", path: self.path.clone(), facts, items })
    }

    fn run_folder(&self) -> Result<Report> {
        let records = metrics::read(self.path.join("metrics.jsonl")).unwrap_or_default();
        let last = records.iter().rev().find_map(|r| if let Record::Step(s) = r { Some(s) } else { None });
        let best = records
            .iter()
            .filter_map(|r| if let Record::Eval(e) = r { Some((e.eval_loss, e.step)) } else { None })
            .min_by(|a, b| a.0.total_cmp(&b.0));
        let checkpoints = checkpoint::list(&self.path.join("checkpoints"));
        let facts = vec![
            fact("steps", last.map(|s| s.step)),
            fact("last loss", last.map(|s| s.loss)),
            fact("best evaluation", best),
            fact("checkpoints", checkpoints.iter().map(|(step, _)| *step).collect::<Vec<_>>()),
            fact("adapter", self.path.join("adapter").join(folder::CONFIG_FILE).is_file()),
        ];
        Ok(Report { kind: "run", path: self.path.clone(), facts, items: Vec::new() })
    }
}
