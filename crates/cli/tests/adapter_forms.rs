//! Adapters of mlx-lm and llama.cpp: read by their own equations, and written with their names and shapes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Content, Value as Meta};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use common::{check, fails, golden, ok, text};
use espalier_adapters::formats::safetensors::{Entry, TensorFile, write};
use serde_json::{Value, json};

/// Largest difference of a model's scores with an adapter from those of a golden file.
fn distance(base: &str, adapter: &str, expected: &Path, scratch: &Path) -> f32 {
    let (ids, target) = (text(expected), text(&scratch.join("scores.safetensors")));
    ok(&["logits", "--model", base, "--adapter", adapter, "--ids", &ids, "--out", &target]);
    let scores = |path: &str| TensorFile::open(Path::new(path)).unwrap().load("logits", &Device::Cpu).unwrap();
    let d = (scores(&target) - scores(&ids)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    d.into_iter().fold(0.0, |m, d| if d.abs() <= m { m } else { d.abs() })
}

fn base_of(case: &str) -> String {
    let path = golden().join("adapters").join(case).join("adapter_config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    text(&golden().join(config["base_model_name_or_path"].as_str().unwrap()))
}

#[test]
fn folders_of_mlx_lm_are_read_as_its_equation_says() {
    let temp = tempfile::tempdir().unwrap();
    for (case, kind, r, scale) in
        [("lora_all", "lora", 4, 2.0), ("dora", "dora", 4, 2.0), ("lora_embedding_tied", "lora", 3, 2.0)]
    {
        let source = golden().join("adapters").join(case);
        let all = TensorFile::open(&source.join("adapter_model.safetensors")).unwrap().load_all(&Device::Cpu).unwrap();
        let mut entries = Vec::new();
        for (key, t) in &all {
            let key = key.trim_start_matches("base_model.model.");
            let turned = || t.t().unwrap().contiguous().unwrap();
            let parts = [
                (".lora_A.weight", ".lora_a"),
                (".lora_B.weight", ".lora_b"),
                (".lora_embedding_A", ".lora_a"),
                (".lora_embedding_B", ".lora_b"),
            ];
            // What PEFT says of the head, mlx-lm takes from the table.
            if key.starts_with("lm_head") || key.contains("base_layer") {
                continue;
            } else if let Some((from, to)) = parts.iter().find(|(from, _)| key.ends_with(from)) {
                entries.push(Entry::of(key.replace(from, to), &turned()));
            } else {
                entries.push(Entry::of(key.replace(".lora_magnitude_vector", ".m").replace(".m.weight", ".m"), t));
            }
        }
        let folder = temp.path().join(case);
        std::fs::create_dir(&folder).unwrap();
        write(&folder.join("adapters.safetensors"), entries, &BTreeMap::new()).unwrap();
        let mut config = json!({"fine_tune_type": kind, "num_layers": 2, "model": "x", "batch_size": 4,
            "lora_parameters": {"rank": r, "scale": scale, "dropout": 0.0}});
        let put = |config: &Value| std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
        put(&config);
        let d = distance(&base_of(case), &text(&folder), &source.join("expected.safetensors"), temp.path());
        assert!(d < 1e-4, "{case}: {d}");
        let report = check(0, &[&text(&folder), "--model", &base_of(case)]);
        assert_eq!((&report["form"], &report["tool"]), (&json!("mlx-lm folder"), &json!("mlx-lm")), "{report}");
        // Settings that do not go with the tensors.
        for (key, value, word) in [
            ("rank", json!(r + 1), "rank"),
            ("keys", json!(["self_attn.q_proj"]), "no key names it"),
            ("keys", json!(["self_attn.z_proj"]), "key"),
            ("alpha", json!(3), "alpha"),
        ] {
            if case != "lora_all" {
                continue;
            }
            let mut other = config.clone();
            other["lora_parameters"][key] = value;
            put(&other);
            let found = check(1, &[&text(&folder)])["faults"].to_string();
            assert!(found.contains(word), "{key}: {found}");
        }
        config["num_layers"] = json!(1);
        put(&config);
        assert!(check(1, &[&text(&folder)])["faults"].to_string().contains("num_layers"));
        config["fine_tune_type"] = json!("full");
        put(&config);
        assert!(check(1, &[&text(&folder)])["faults"].to_string().contains("full"));
    }
}

#[test]
fn adapters_are_written_for_mlx_lm_with_its_shapes_and_names() {
    let temp = tempfile::tempdir().unwrap();
    for case in [
        "lora_all",
        "dora",
        "rslora_patterns",
        "lora_layers",
        "lora_regex",
        "lora_embedding_tied",
        "pissa",
        "qwen3_lora",
        "lora_embedding_untied",
    ] {
        let (source, out) = (golden().join("adapters").join(case), temp.path().join(case));
        let args = [
            "export",
            "--model",
            &base_of(case),
            "--adapter",
            &text(&source),
            "--form",
            "mlx",
            "--verify",
            "--out",
            &text(&out),
        ];
        ok(&args);
        ok(&args);
        let d = distance(&base_of(case), &text(&out), &source.join("expected.safetensors"), temp.path());
        assert!(d < 1e-4, "{case}: {d}");
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
        let parameters = &config["lora_parameters"];
        let rank = parameters["rank"].as_u64().unwrap() as usize;
        for (name, t) in TensorFile::open(&out.join("adapters.safetensors")).unwrap().load_all(&Device::Cpu).unwrap() {
            match name.rsplit('.').next().unwrap() {
                "lora_a" => assert_eq!(t.dims()[1], rank, "{case}: {name}"),
                "lora_b" => assert_eq!(t.dims()[0], rank, "{case}: {name}"),
                "m" => assert_eq!(config["fine_tune_type"], "dora"),
                other => panic!("{other}"),
            }
        }
        let (keys, layers) = (parameters["keys"].to_string(), config["num_layers"].as_u64().unwrap());
        match case {
            "lora_all" => assert!(keys.contains("\"mlp.down_proj\"") && layers == 2, "{keys}"),
            "lora_layers" => {
                assert!(keys == r#"["mlp.down_proj","self_attn.q_proj"]"# && layers == 1, "{keys} {layers}")
            }
            // Other modules in each layer: by whole path, so that no other module is changed.
            "lora_regex" => assert!(keys.contains("\"model.layers.0.self_attn.q_proj\""), "{keys}"),
            "lora_embedding_tied" => assert!(keys.contains("\"model.embed_tokens\""), "{keys}"),
            _ => {}
        }
        assert!(std::fs::read_to_string(out.join("README.md")).unwrap().contains("library_name: \"mlx\""));
    }
    for (case, word) in [
        ("modules_to_save", "trained whole"),
        ("trainable_tokens", "token rows"),
        ("lora_bias", "bias"),
        ("lora_embedding", "output head"),
        ("gpt2_lora", "another name"),
    ] {
        let (source, out) = (text(&golden().join("adapters").join(case)), temp.path().join(case));
        let args = ["export", "--model", &base_of(case), "--adapter", &source, "--form", "mlx", "--out", &text(&out)];
        let error = fails(1, &args);
        assert!(error.contains(word) && !out.exists(), "{case}: {error}");
    }
}

/// Metadata and dense tensors of a GGUF file.
fn gguf(path: &Path) -> (BTreeMap<String, Meta>, BTreeMap<String, Tensor>) {
    let mut file = std::fs::File::open(path).unwrap();
    let content = Content::read(&mut file).unwrap();
    let dense =
        |name: &String| content.tensor(&mut file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
    let names: Vec<String> = content.tensor_infos.keys().cloned().collect();
    let tensors = names.iter().map(dense).collect::<Vec<_>>();
    (content.metadata.into_iter().collect(), names.into_iter().zip(tensors).collect())
}

fn write_gguf(path: &Path, metadata: &BTreeMap<String, Meta>, tensors: &BTreeMap<String, Tensor>) {
    let stored: Vec<(String, QTensor)> =
        tensors.iter().map(|(n, t)| (n.clone(), QTensor::quantize(t, GgmlDType::F32).unwrap())).collect();
    let stored: Vec<(&str, &QTensor)> = stored.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let metadata: Vec<(&str, &Meta)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &stored).unwrap();
}

#[test]
fn adapters_go_to_llama_cpp_and_come_back() {
    let temp = tempfile::tempdir().unwrap();
    for case in [
        "lora_all",
        "rslora_patterns",
        "mistral_lora",
        "gemma2_lora",
        "qwen3_lora",
        "phi3_lora",
        "pissa",
        "lora_embedding_untied",
    ] {
        let (source, out) = (golden().join("adapters").join(case), temp.path().join(format!("{case}.gguf")));
        let (base, adapter, target) = (base_of(case), text(&source), text(&out));
        let args =
            ["export", "--model", &base, "--adapter", &adapter, "--form", "gguf-adapter", "--verify", "--out", &target];
        ok(&args);
        ok(&args);
        let d = distance(&base, &target, &source.join("expected.safetensors"), temp.path());
        assert!(d < 1e-4, "{case}: {d}");
        let report = check(0, &[&target]);
        assert_eq!(report["form"], "adapter of llama.cpp", "{report}");
        check(0, &[&target, "--model", &base]);
    }
    for (case, word) in [
        ("dora", "magnitudes"),
        ("modules_to_save", "trained whole"),
        ("lora_embedding_tied", "output head"),
        ("gpt2_lora", "not known"),
    ] {
        let out = temp.path().join("refused.gguf");
        let (base, adapter, target) = (base_of(case), text(&golden().join("adapters").join(case)), text(&out));
        let args = ["export", "--model", &base, "--adapter", &adapter, "--form", "gguf-adapter", "--out", &target];
        let error = fails(1, &args);
        assert!(error.contains(word) && !out.exists(), "{case}: {error}");
    }
}

/// Makes one thing of a file wrong: its metadata, its tensors.
type Change<'a> = &'a dyn Fn(&mut BTreeMap<String, Meta>, &mut BTreeMap<String, Tensor>);

#[test]
fn a_gguf_adapter_has_llama_cpps_names_rows_and_scale() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (golden().join("adapters/lora_all"), temp.path().join("a.gguf"));
    let (base, adapter, target) = (base_of("lora_all"), text(&source), text(&out));
    ok(&["export", "--model", &base, "--adapter", &adapter, "--form", "gguf-adapter", "--out", &target]);
    let (metadata, tensors) = gguf(&out);
    let word = |key: &str| metadata[key].to_string().unwrap().clone();
    assert_eq!(
        (word("general.type"), word("general.architecture"), word("adapter.type")),
        ("adapter".into(), "llama".into(), "lora".into())
    );
    assert_eq!(metadata["adapter.lora.alpha"].to_f32().unwrap(), 8.0);
    let peft = TensorFile::open(&source.join("adapter_model.safetensors")).unwrap().load_all(&Device::Cpu).unwrap();
    assert_eq!(tensors.len(), peft.len());
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let of = |module: &str, part: &str| {
        peft[&format!("base_model.model.model.layers.1.{module}.lora_{part}.weight")].clone()
    };
    let file = |name: &str| tensors[&format!("blk.1.{name}")].clone();
    assert_eq!(values(&file("ffn_down.weight.lora_a")), values(&of("mlp.down_proj", "A")));
    assert_eq!(values(&file("ffn_down.weight.lora_b")), values(&of("mlp.down_proj", "B")));
    assert_eq!(values(&file("attn_q.weight.lora_a")), values(&of("self_attn.q_proj", "A")));
    // 4 heads of 8 rows: the two halves of a head lie interleaved.
    let (theirs, ours) =
        (file("attn_q.weight.lora_b").to_vec2::<f32>().unwrap(), of("self_attn.q_proj", "B").to_vec2::<f32>().unwrap());
    for (row, ours) in ours.iter().enumerate() {
        let (head, within) = (row / 8, row % 8);
        assert_eq!(&theirs[head * 8 + 2 * (within % 4) + within / 4], ours, "row {row}");
    }
    // Alpha 0 or none means the factor 1: with B twice as large, as alpha / r = 2.
    let mut doubled = tensors.clone();
    for (name, t) in &mut doubled {
        if name.ends_with(".lora_b") {
            *t = (&*t * 2.0).unwrap();
        }
    }
    let mut no_alpha = metadata.clone();
    for alpha in [Some(Meta::F32(0.0)), None] {
        match alpha {
            Some(alpha) => drop(no_alpha.insert("adapter.lora.alpha".into(), alpha)),
            None => drop(no_alpha.remove("adapter.lora.alpha")),
        }
        write_gguf(&out, &no_alpha, &doubled);
        let d = distance(&base, &target, &source.join("expected.safetensors"), temp.path());
        assert!(d < 1e-4, "{d}");
    }
    // One thing wrong each.
    let broken = |change: Change<'_>| {
        let (mut m, mut t) = (metadata.clone(), tensors.clone());
        change(&mut m, &mut t);
        write_gguf(&out, &m, &t);
        check(1, &[&target, "--model", &base])["faults"].to_string()
    };
    const A: &str = "blk.0.attn_v.weight.lora_a";
    let found = broken(&|_, t| drop(t.remove(A)));
    assert!(found.contains("attn_v") && found.contains("missing"), "{found}");
    let found = broken(&|_, t| drop(t.insert("blk.0.attn_norm.weight".into(), t[A].clone())));
    assert!(found.contains("blk.0.attn_norm.weight") && found.contains("no factor"), "{found}");
    let found = broken(&|_, t| {
        for part in ["lora_a", "lora_b"] {
            let moved = t.remove(&format!("blk.0.attn_v.weight.{part}")).unwrap();
            t.insert(format!("blk.7.attn_v.weight.{part}"), moved);
        }
    });
    assert!(found.contains("blk.7.attn_v.weight"), "{found}");
    let found = broken(&|m, _| drop(m.insert("general.architecture".into(), Meta::String("qwen2".into()))));
    assert!(found.contains("qwen2") && found.contains("llama"), "{found}");
    let found = broken(&|m, _| drop(m.insert("adapter.type".into(), Meta::String("dora".into()))));
    assert!(found.contains("adapter.type"), "{found}");
    let found = broken(&|m, _| drop(m.insert("adapter.alora.invocation_tokens".into(), Meta::U32(3))));
    assert!(found.contains("invocation_tokens"), "{found}");
}
