//! Golden adapters with one thing wrong: none of them loads in silence.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{Skeleton, golden};
use espalier_adapters::Result;
use espalier_adapters::formats::folder::{self, CONFIG_FILE, WEIGHTS_FILE};
use espalier_adapters::formats::safetensors::{Entry, MappedFile, write};
use serde_json::{Value, json};

/// Adapter, the base it was made for.
const CASES: &[(&str, &str)] = &[
    ("lora_all", "llama_gqa_tied"),
    ("rslora_patterns", "llama_gqa_tied"),
    ("dora", "llama_gqa_tied"),
    ("lora_layers", "llama_gqa_tied"),
    ("lora_regex", "llama_gqa_tied"),
    ("lora_embedding", "llama_gqa_tied"),
    ("lora_embedding_tied", "llama_gqa_tied"),
    ("modules_to_save_pair", "llama_gqa_tied"),
    ("modules_to_save_tied", "llama_gqa_tied"),
    ("trainable_tokens", "llama_gqa_tied"),
    ("modules_to_save", "llama1"),
    ("lora_bias", "llama_bias"),
    ("lora_bias_all", "llama_bias"),
    ("gpt2_lora", "gpt2"),
    ("gpt2_dora", "gpt2"),
];

struct Bench {
    temp: tempfile::TempDir,
    base: Skeleton,
    config: Value,
    tensors: BTreeMap<String, Tensor>,
    tried: usize,
    accepted: Vec<String>,
}

impl Bench {
    fn open(case: &str, family: &str) -> Self {
        let path = golden().join("adapters").join(case);
        let config = serde_json::from_slice(&std::fs::read(path.join(CONFIG_FILE)).unwrap()).unwrap();
        let tensors = MappedFile::open(&path.join(WEIGHTS_FILE)).unwrap().load_all(&Device::Cpu).unwrap();
        let temp = tempfile::tempdir().unwrap();
        Self { temp, base: Skeleton::of(family), config, tensors, tried: 0, accepted: Vec::new() }
    }

    fn load(&mut self) -> Result<()> {
        let files = folder::read(self.temp.path())?;
        folder::load(&mut self.base, files, false, DType::F32, &Device::Cpu).map(|_| ())
    }

    fn write(&self, config: &Value, tensors: &BTreeMap<String, Tensor>) {
        std::fs::write(self.temp.path().join(CONFIG_FILE), config.to_string()).unwrap();
        let entries = tensors.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
        write(&self.temp.path().join(WEIGHTS_FILE), entries, &BTreeMap::new()).unwrap();
    }

    fn judge(&mut self, what: String) {
        self.tried += 1;
        match self.load() {
            Ok(()) => self.accepted.push(what),
            Err(error) => assert!(!error.to_string().is_empty(), "{what}"),
        }
    }

    fn tensors_changed(&mut self, what: String, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
        let mut tensors = self.tensors.clone();
        change(&mut tensors);
        self.write(&self.config, &tensors);
        self.judge(what);
    }

    fn config_changed(&mut self, what: String, change: impl FnOnce(&mut Value)) {
        let mut config = self.config.clone();
        change(&mut config);
        assert_ne!(config, self.config, "{what}: no change");
        self.write(&config, &self.tensors);
        self.judge(what);
    }
}

/// The file with the header entry of `name` twice.
fn double_entry(path: &Path, name: &str) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    let parsed: Value = serde_json::from_str(header).unwrap();
    let header = format!("{{{}:{},{}", json!(name), parsed[name], &header.trim_start()[1..]);
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat();
    std::fs::write(path, bytes).unwrap();
}

fn mutate_tensor(bench: &mut Bench, case: &str, name: &str) {
    let copy = name.ends_with(".base_layer.weight");
    let tensor = bench.tensors[name].clone();
    // A copy of the base's own weight, or of the table for a head tied to it, says nothing: a file without it says the same.
    let repeated = name == "base_model.model.lm_head.weight" && bench.config["ensure_weight_tying"] == true;
    if !copy && !repeated {
        bench.tensors_changed(format!("{case}: drop {name}"), |t| drop(t.remove(name)));
    }
    for (from, to) in
        [(".weight", ".wieght"), ("model.", "module."), ("lora_A", "lora_C"), (".0.", ".9."), ("proj", "prój")]
    {
        if name.contains(from) {
            let other = name.replacen(from, to, 1);
            bench.tensors_changed(format!("{case}: rename {name} to {other}"), |t| {
                let value = t.remove(name).unwrap();
                t.insert(other, value);
            });
        }
    }
    if tensor.rank() == 2 && tensor.dims()[0] != tensor.dims()[1] {
        let turned = tensor.t().unwrap().contiguous().unwrap();
        bench.tensors_changed(format!("{case}: transpose {name}"), |t| drop(t.insert(name.into(), turned)));
    }
    let shorter = tensor.narrow(0, 0, tensor.dims()[0] - 1).unwrap().contiguous().unwrap();
    if shorter.elem_count() > 0 {
        bench.tensors_changed(format!("{case}: truncate {name}"), |t| drop(t.insert(name.into(), shorter)));
    }
    let deeper = tensor.unsqueeze(0).unwrap();
    bench.tensors_changed(format!("{case}: another rank for {name}"), |t| drop(t.insert(name.into(), deeper)));
    let alias = match name.rsplit_once(".lora_") {
        Some((module, part)) => format!("{module}.modules_to_save.lora_{part}"),
        None => format!("{name}.again"),
    };
    bench.tensors_changed(format!("{case}: duplicate {name} as {alias}"), |t| drop(t.insert(alias, tensor)));
    bench.write(&bench.config, &bench.tensors);
    double_entry(&bench.temp.path().join(WEIGHTS_FILE), name);
    bench.judge(format!("{case}: {name} twice in the header"));
}

fn mutate_config(bench: &mut Bench, case: &str) {
    if let Some(targets) = bench.config["target_modules"].as_array().cloned() {
        for i in 0..targets.len() {
            // A target that is excluded has no tensors to miss, nor has one that another names as well.
            let text = |t: &Value| t.as_str().unwrap().to_owned();
            let twice = targets.iter().enumerate().any(|(j, t)| {
                let (this, other) = (text(&targets[i]), text(t));
                i != j && (this.ends_with(&format!(".{other}")) || other.ends_with(&format!(".{this}")))
            });
            if targets.len() > 1 && !twice && bench.config["exclude_modules"].get(0) != Some(&targets[i]) {
                bench.config_changed(format!("{case}: without target {i}"), |c| {
                    c["target_modules"].as_array_mut().unwrap().remove(i);
                });
            }
            for wrong in [json!(format!("{}_", targets[i].as_str().unwrap())), json!("ln_1"), json!(3)] {
                bench.config_changed(format!("{case}: target {i} is {wrong}"), |c| c["target_modules"][i] = wrong);
            }
        }
    }
    let r = bench.config["r"].as_u64().unwrap();
    for (key, value) in [
        ("r", json!(r + 1)),
        ("r", json!(0)),
        ("use_dora", json!(!bench.config["use_dora"].as_bool().unwrap_or(false))),
        ("target_modules", json!("all_linear")),
        ("target_modules", Value::Null),
        ("modules_to_save", json!(["model.norm", "transformer.ln_f"])),
        ("rank_pattern", json!({"q_proj": 9})),
        ("layers_to_transform", json!([7])),
        ("exclude_modules", json!(".*_proj|.*c_attn")),
        ("bias", json!("none_")),
        ("lora_bias", json!(true)),
        ("peft_type", json!("LOHA")),
        ("init_lora_weights", json!("loftq")),
        ("trainable_token_indices", json!([1, 2])),
    ] {
        // Without sites, whole paths override the choice of layers, as in PEFT.
        if key == "layers_to_transform" && case == "lora_all" {
            continue;
        }
        bench.config_changed(format!("{case}: {key} = {value}"), |c| c[key] = value.clone());
    }
}

#[test]
fn no_mutation_of_a_golden_adapter_loads_in_silence() {
    let (mut tried, mut accepted) = (0, Vec::new());
    for (case, family) in CASES {
        let mut bench = Bench::open(case, family);
        bench.write(&bench.config, &bench.tensors);
        bench.load().unwrap_or_else(|e| panic!("{case} unchanged: {e}"));
        for name in bench.tensors.keys().cloned().collect::<Vec<_>>() {
            mutate_tensor(&mut bench, case, &name);
        }
        mutate_config(&mut bench, case);
        tried += bench.tried;
        accepted.append(&mut bench.accepted);
    }
    assert!(accepted.is_empty(), "{} of {tried} were accepted: {accepted:#?}", accepted.len());
    assert!(tried >= 1000, "only {tried}");
}
