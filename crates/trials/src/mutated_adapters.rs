//! R-18: an adapter file with one thing wrong is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use espalier_adapters::formats::folder::{self, CONFIG_FILE, WEIGHTS_FILE};
use espalier_adapters::formats::safetensors::{Entry, TensorFile, write};
use espalier_models::{LoadOptions, Model};
use serde_json::{Value, json};

use crate::subject::{self, Subject};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-18",
    title: "Mutated adapters",
    claim: "An adapter file with one thing wrong is refused with an error: a tensor dropped, renamed in any part of its name, \
            turned, cut, given another rank, doubled, of whole numbers or with NaN; the file cut at any place; a setting \
            that its tensors do not fit. On the models themselves; every golden adapter of PEFT, and every method in each \
            of its examples. The bounded form takes every twentieth mutation.",
    unit: "mutations accepted",
    bar: 0.0,
    bounded: 1000,
    full: 20_000,
    run,
};

/// The bounded form takes one of so many.
const STRIDE: u64 = 20;

/// Folders are cut at so many places.
const CUTS: usize = 12;

struct Bench<'a> {
    place: PathBuf,
    model: Model,
    config: Value,
    tensors: BTreeMap<String, Tensor>,
    name: &'a str,
    stride: u64,
    /// Mutations seen, tried or not.
    seen: u64,
    tally: &'a mut Tally,
}

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let stride = if scope.is_full() { 1 } else { STRIDE };
    let mut seen = 0;
    for (i, subject) in subject::all()?.iter().enumerate() {
        let mut bench = Bench::open(subject, &scope.scratch.join(i.to_string()), stride, seen, tally)?;
        bench.all()?;
        seen = bench.seen;
    }
    Ok(())
}

/// Ways to misspell a name: each of its parts in turn, a number by another.
fn misspelt(name: &str) -> Vec<String> {
    let parts: Vec<&str> = name.split('.').collect();
    (0..parts.len())
        .map(|i| {
            let mut parts: Vec<String> = parts.iter().map(|p| (*p).to_owned()).collect();
            parts[i] = match parts[i].parse::<usize>() {
                Ok(n) => (n + 9).to_string(),
                Err(_) => parts[i].clone() + "_",
            };
            parts.join(".")
        })
        .chain([name.replacen("lora_A", "lora_C", 1), name.replacen("proj", "prój", 1), name.replacen('w', "W", 1)])
        .filter(|other| other != name)
        .collect()
}

impl<'a> Bench<'a> {
    fn open(subject: &'a Subject, place: &Path, stride: u64, seen: u64, tally: &'a mut Tally) -> Result<Self> {
        subject.files(place)?;
        let config = serde_json::from_slice(&std::fs::read(place.join(CONFIG_FILE))?)?;
        let tensors = TensorFile::open(&place.join(WEIGHTS_FILE))?.load_all(&Device::Cpu)?;
        let model = subject.model(&LoadOptions::cpu())?;
        let name = subject.name.as_str();
        let mut bench = Self { place: place.to_owned(), model, config, tensors, name, stride, seen, tally };
        // Rewritten here without a change it is accepted: what is refused below is refused for its change.
        bench.write(&bench.config, &bench.tensors)?;
        bench.load().with_context(|| format!("{name}, unchanged"))?;
        Ok(bench)
    }

    fn load(&mut self) -> espalier_adapters::Result<()> {
        let files = folder::read(&self.place)?;
        folder::load(&mut self.model, files, false, DType::F32, &Device::Cpu).map(|_| ())
    }

    fn write(&self, config: &Value, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        std::fs::write(self.place.join(CONFIG_FILE), config.to_string())?;
        let entries = tensors.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
        write(&self.place.join(WEIGHTS_FILE), entries, &BTreeMap::new())?;
        Ok(())
    }

    /// Whether the next mutation is one to try.
    fn is_next(&mut self) -> bool {
        self.seen += 1;
        self.seen.is_multiple_of(self.stride)
    }

    fn judge(&mut self, kind: &str, what: &str) -> Result<()> {
        let refused = self.load();
        if let Err(error) = &refused {
            ensure!(!error.to_string().is_empty(), "{}: {kind} {what}: an empty error", self.name);
        }
        self.tally.held(format!("{}: {kind} {what}", self.name), refused.is_err());
        self.tally.count(kind);
        Ok(())
    }

    fn tensors_changed(
        &mut self,
        kind: &str,
        what: &str,
        change: impl FnOnce(&mut BTreeMap<String, Tensor>),
    ) -> Result<()> {
        if !self.is_next() {
            return Ok(());
        }
        let mut tensors = self.tensors.clone();
        change(&mut tensors);
        self.write(&self.config, &tensors)?;
        self.judge(kind, what)
    }

    fn config_changed(&mut self, what: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut config = self.config.clone();
        change(&mut config);
        ensure!(config != self.config, "{}: {what} is no change", self.name);
        if !self.is_next() {
            return Ok(());
        }
        self.write(&config, &self.tensors)?;
        self.judge("setting", what)
    }

    fn all(&mut self) -> Result<()> {
        for name in self.tensors.keys().cloned().collect::<Vec<_>>() {
            self.tensor(&name)?;
        }
        self.settings()?;
        self.cuts()
    }

    fn tensor(&mut self, name: &str) -> Result<()> {
        let tensor = self.tensors[name].clone();
        let put = |value: Tensor| {
            let name = name.to_owned();
            move |t: &mut BTreeMap<String, Tensor>| drop(t.insert(name, value))
        };
        // A copy of the base's own weight, or of the table for a head tied to it, says nothing: a file without it says the
        // same.
        let head = ["lm_head.weight", "decoder.weight"].iter().any(|end| name.ends_with(end));
        let rows = name.ends_with("lm_head.trainable_tokens_delta") && self.config["peft_type"] == "TRAINABLE_TOKENS";
        let repeated = (head && self.config["ensure_weight_tying"] == true) || rows;
        if !name.ends_with(".base_layer.weight") && !repeated {
            self.tensors_changed("drop", name, |t| drop(t.remove(name)))?;
        }
        for other in misspelt(name) {
            self.tensors_changed("rename", &format!("{name} to {other}"), |t| {
                t.insert(other.clone(), tensor.clone());
                t.remove(name);
            })?;
        }
        if tensor.rank() == 2 && tensor.dims()[0] != tensor.dims()[1] {
            self.tensors_changed("turn", name, put(tensor.t()?.contiguous()?))?;
        }
        if tensor.dims()[0] > 1 {
            self.tensors_changed("cut", name, put(tensor.narrow(0, 0, tensor.dims()[0] - 1)?.contiguous()?))?;
        }
        self.tensors_changed("another number of dimensions", name, put(tensor.unsqueeze(0)?))?;
        self.tensors_changed("whole numbers", name, put(tensor.to_dtype(DType::I64)?))?;
        let mut values = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        // A layer that kept nothing has no value to spoil.
        if let Some(last) = values.last_mut() {
            *last = f32::NAN;
            self.tensors_changed("not a number", name, put(Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?))?;
        }
        let alias = match name.rsplit_once(".lora_") {
            Some((module, part)) => format!("{module}.modules_to_save.lora_{part}"),
            None => format!("{name}.again"),
        };
        let kept = tensor.clone();
        self.tensors_changed("double", &format!("{name} as {alias}"), |t| drop(t.insert(alias.clone(), kept)))?;
        if self.is_next() {
            self.write(&self.config, &self.tensors)?;
            double_entry(&self.place.join(WEIGHTS_FILE), name)?;
            self.judge("twice in the header", name)?;
        }
        Ok(())
    }

    /// Settings that the tensors do not fit.
    fn settings(&mut self) -> Result<()> {
        if let Some(targets) = self.config["target_modules"].as_array().cloned() {
            let names: Vec<&str> = targets.iter().filter_map(Value::as_str).collect();
            for (i, name) in names.iter().enumerate() {
                // A target that is excluded has no tensors to miss, nor has one that another names as well.
                let twice = names.iter().enumerate().any(|(j, other)| {
                    i != j && (name.ends_with(&format!(".{other}")) || other.ends_with(&format!(".{name}")))
                });
                let missed = self.tensors.keys().any(|key| key.contains(&format!(".{name}.")));
                if names.len() > 1 && !twice && missed {
                    self.config_changed(&format!("without target {i}"), |c| {
                        c["target_modules"].as_array_mut().map(|t| t.remove(i));
                    })?;
                }
                let wrong = [json!(format!("{name}_")), json!("ln_1"), json!(3)];
                for wrong in wrong.into_iter().filter(|wrong| *wrong != targets[i]) {
                    self.config_changed(&format!("target {i} is {wrong}"), |c| c["target_modules"][i] = wrong)?;
                }
            }
        }
        let rank_key = if self.config["init_r"].is_null() { "r" } else { "init_r" };
        let rank = self.config[rank_key].as_u64().unwrap_or(0);
        let has_rank = rank > 0;
        let kind = self.config["peft_type"].as_str().unwrap_or_default();
        // The tensors show it, where it is no number that is rounded to a divisor (OFT's blocks) and where a factor is a product
        // (LoKr's need not be).
        let shows_rank = match kind {
            "OFT" => false,
            "LOKR" => self.tensors.keys().any(|name| name.ends_with("lokr_w1_a") || name.ends_with("lokr_w2_a")),
            _ => has_rank,
        };
        let other_kind = kind != "LOHA";
        let has_targets = !self.config["target_modules"].is_null();
        let turned_on = self.config["use_dora"].as_bool().unwrap_or(false);
        for (key, value, applies) in [
            (rank_key, json!(rank + 1), shows_rank),
            (rank_key, json!(0), has_rank),
            (rank_key, json!("many"), true),
            ("num_virtual_tokens", json!(77), !self.config["num_virtual_tokens"].is_null()),
            ("num_layers", json!(77), !self.config["num_layers"].is_null()),
            ("token_indices", json!([1]), !self.config["token_indices"].is_null()),
            ("lora_alpha", json!("large"), has_rank),
            ("lora_alpha", json!([1]), has_rank),
            ("use_dora", json!(!turned_on), has_rank),
            ("use_dora", json!("true"), has_rank),
            ("target_modules", json!("all_linear"), true),
            ("target_modules", Value::Null, has_targets),
            ("modules_to_save", json!(["model.norm", "transformer.ln_f", "LayerNorm"]), true),
            ("rank_pattern", json!({".*": 9}), has_rank && (shows_rank || kind == "OFT")),
            // Without sites, whole paths override the choice of layers, as in PEFT.
            ("layers_to_transform", json!([7]), !self.names_whole_paths()),
            ("exclude_modules", json!(".*"), true),
            ("bias", json!("none_"), true),
            ("lora_bias", json!(true), has_rank && self.config["lora_bias"] != true),
            ("peft_type", json!("LOHA"), other_kind),
            ("espalier_method", json!("none"), true),
            ("init_lora_weights", json!("loftq"), has_rank),
            ("trainable_token_indices", json!([1, 2]), true),
        ] {
            if applies {
                self.config_changed(&format!("{key} = {value}"), |c| c[key] = value.clone())?;
            }
        }
        Ok(())
    }

    fn names_whole_paths(&self) -> bool {
        let targets = self.config["target_modules"].as_array();
        targets.is_some_and(|t| t.iter().any(|name| name.as_str().is_some_and(|n| n.contains('.'))))
    }

    /// The files cut short.
    fn cuts(&mut self) -> Result<()> {
        self.write(&self.config, &self.tensors)?;
        for file in [CONFIG_FILE, WEIGHTS_FILE] {
            let path = self.place.join(file);
            let bytes = std::fs::read(&path)?;
            for i in 0..CUTS {
                let length = bytes.len() * i / CUTS;
                if self.is_next() {
                    std::fs::write(&path, &bytes[..length])?;
                    self.judge("file cut", &format!("{file} to {length} of {} bytes", bytes.len()))?;
                }
            }
            std::fs::write(&path, &bytes)?;
        }
        Ok(())
    }
}

/// The file with the header entry of `name` twice.
fn double_entry(path: &Path, name: &str) -> Result<()> {
    let bytes = std::fs::read(path)?;
    let (length, rest) = bytes.split_at(8);
    let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into()?) as usize);
    let header = std::str::from_utf8(header)?;
    let parsed: Value = serde_json::from_str(header)?;
    let header = format!("{{{}:{},{}", json!(name), parsed[name], &header.trim_start()[1..]);
    std::fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat())?;
    Ok(())
}
