//! `adapter check` on good and bad adapters, and adapters of other tools.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Content, Value as Meta};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use common::{fails, golden, ok, run, text};
use espalier_adapters::formats::safetensors::{Entry, MappedFile, write};
use serde_json::{Value, json};

/// Where real files are; tests of them are left out where it is absent.
fn data(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ESPALIER_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"), PathBuf::from);
    Some(root.join(name)).filter(|p| p.is_dir())
}

/// The report of a check that must end with `code`.
fn check(code: i32, args: &[&str]) -> Value {
    let out = run(&[&["adapter", "check"], args, &["--json"]].concat());
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {said}\n{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_str(said.lines().last().unwrap_or("null")).unwrap_or(Value::Null)
}

#[test]
fn golden_adapters_pass_with_and_without_their_base() {
    for entry in std::fs::read_dir(golden().join("adapters")).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("lora_bias_term") {
            continue;
        }
        let config: Value = serde_json::from_slice(&std::fs::read(path.join("adapter_config.json")).unwrap()).unwrap();
        let base = text(&golden().join(config["base_model_name_or_path"].as_str().unwrap()));
        let report = check(0, &[&text(&path), "--model", &base]);
        assert_eq!(report["ok"], true, "{report}");
        assert!(report["tool"].as_str().unwrap().starts_with("PEFT 0."), "{report}");
        assert!(report["sites"].as_u64().unwrap() > 0 && report["bytes"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(report["zero_products"], 0, "{report}");
    }
    // A setting that is not understood.
    let report = check(1, &[&text(&golden().join("adapters/lora_bias_term"))]);
    assert!(report["faults"][0].as_str().unwrap().contains("lora_bias"), "{report}");
}

/// A golden adapter with changes, in a folder of its own.
fn changed(
    folder: &Path,
    config: impl FnOnce(&mut Value),
    tensors: impl FnOnce(&mut BTreeMap<String, Tensor>),
) -> String {
    let source = golden().join("adapters/rslora_patterns");
    let mut json: Value = serde_json::from_slice(&std::fs::read(source.join("adapter_config.json")).unwrap()).unwrap();
    let weights = MappedFile::open(&source.join("adapter_model.safetensors")).unwrap();
    let mut all = weights.load_all(&Device::Cpu).unwrap();
    config(&mut json);
    tensors(&mut all);
    std::fs::write(folder.join("adapter_config.json"), json.to_string()).unwrap();
    let entries = all.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
    write(&folder.join("adapter_model.safetensors"), entries, &BTreeMap::new()).unwrap();
    text(folder)
}

#[test]
fn every_fault_is_found_and_named() {
    const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    let temp = tempfile::tempdir().unwrap();
    let report = |config: &dyn Fn(&mut Value), tensors: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let path = changed(temp.path(), config, tensors);
        check(1, &[&path])["faults"].to_string()
    };
    let nothing = |_: &mut Value| {};
    let none = |_: &mut BTreeMap<String, Tensor>| {};
    let nan = |t: &mut BTreeMap<String, Tensor>| {
        let bad = (t[Q].clone() / 0.0).unwrap();
        t.insert(Q.into(), bad);
        let bad = t[B].to_dtype(DType::U32).unwrap();
        t.insert(B.into(), bad);
    };
    let found = report(&nothing, &nan);
    assert!(found.contains("NaN") && found.contains("U32"), "both: {found}");
    let found = report(&nothing, &|t| drop(t.remove(B)));
    assert!(found.contains("q_proj") && found.contains("lora_B.weight"), "{found}");
    let found =
        report(&nothing, &|t| drop(t.insert(B.into(), Tensor::ones((32, 5), DType::F32, &Device::Cpu).unwrap())));
    assert!(found.contains("rank 2") && found.contains("rank 5"), "{found}");
    let found = report(&|c| c["r"] = json!(5), &none);
    assert!(found.contains("the settings say rank 5, the tensors have 4"), "{found}");
    let found = report(&|c| c["rank_pattern"]["nowhere"] = json!(5), &none);
    assert!(found.contains("nowhere"), "{found}");
    let found = report(&|c| c["target_modules"].as_array_mut().unwrap().retain(|t| t != "q_proj"), &none);
    assert!(found.contains("q_proj"), "{found}");
    let found = report(&|c| c["use_velocity"] = json!(true), &none);
    assert!(found.contains("use_velocity"), "{found}");
    let found = report(&nothing, &|t| drop(t.insert("lora_A.weight".into(), t[Q].clone())));
    assert!(found.contains("not named as PEFT"), "{found}");
    // A product of zero is no fault, but is said.
    let zero = |t: &mut BTreeMap<String, Tensor>| drop(t.insert(B.into(), t[B].zeros_like().unwrap()));
    let path = changed(temp.path(), nothing, zero);
    let report = check(0, &[&path]);
    assert_eq!(report["zero_products"], 1, "{report}");
    assert!(report["notes"].to_string().contains("product of zero"), "{report}");
    // Sound by itself, but another model's.
    let report = check(1, &[&path, "--model", &text(&golden().join("families/gpt2"))]);
    assert!(report["faults"][0].as_str().unwrap().contains("matches no module"), "{report}");
    // The exit code speaks in text too.
    assert!(
        fails(1, &["adapter", "check", &path, "--model", &text(&golden().join("families/gpt2"))]).contains("1 fault")
    );
    assert!(ok(&["adapter", "check", &path]).contains("no fault found"));
    // No adapter at all, and pickled weights.
    let empty = temp.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    assert!(check(1, &[&text(&empty)])["faults"].to_string().contains("neither"));
    std::fs::write(empty.join("adapter_model.bin"), "x").unwrap();
    assert!(check(1, &[&text(&empty)])["faults"].to_string().contains("pickle"));
}

#[test]
fn a_loralib_file_needs_its_alpha_and_gives_the_scores_of_its_factors() {
    // RoBERTa's golden adapter in loralib's naming.
    let temp = tempfile::tempdir().unwrap();
    let source = golden().join("adapters/roberta_lora");
    let all = MappedFile::open(&source.join("adapter_model.safetensors")).unwrap().load_all(&Device::Cpu).unwrap();
    let bare = |name: &str| {
        let name = name.trim_start_matches("base_model.model.");
        name.replace(".lora_A.weight", ".lora_A").replace(".lora_B.weight", ".lora_B")
    };
    let entries = all.iter().map(|(name, t)| Entry::of(bare(name), t)).collect();
    let file = temp.path().join("roberta_lora.safetensors");
    write(&file, entries, &BTreeMap::new()).unwrap();
    let (base, file) = (text(&golden().join("families/roberta")), text(&file));
    assert!(check(1, &[&file])["faults"].to_string().contains("numerator"));
    let report = check(0, &[&file, "--alpha", "4", "--model", &base]);
    assert_eq!((&report["form"], &report["sites"]), (&json!("loralib file"), &json!(4)), "{report}");
    let (ids, out) = (text(&source.join("expected.safetensors")), temp.path().join("x.safetensors"));
    let target = text(&out);
    let args = ["logits", "--model", &base, "--adapter", &file, "--ids", &ids, "--out", &target];
    assert!(fails(1, &args).contains("alpha"));
    ok(&[&args[..], &["--adapter-alpha", "4"]].concat());
    let ours = MappedFile::open(&out).unwrap().load("logits", &Device::Cpu).unwrap();
    let wanted = MappedFile::open(Path::new(&ids)).unwrap().load("logits", &Device::Cpu).unwrap();
    let d = (ours - wanted).unwrap().abs().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(d.iter().all(|d| *d < 1e-4), "{d:?}");
    // A layout that holds its own does not take another.
    let peft = text(&source);
    assert!(check(1, &[&peft, "--alpha", "4", "--model", &base])["faults"].to_string().contains("holds its own"));
}

#[test]
fn real_adapters_are_recognised() {
    if let Some(folder) = data("ckpt-lora-roberta-base-mnli") {
        let file = text(&folder.join("roberta_base_lora_mnli.safetensors"));
        let report = check(0, &[&file, "--alpha", "16"]);
        assert_eq!((&report["sites"], &report["ranks"]), (&json!(24), &json!({"8": 24})), "{report}");
        assert_eq!(report["tensors"], 52, "{report}");
    }
    if let Some(folder) = data("ckpt-lora-peft-gpt2-tigrinya") {
        let report = check(0, &[&text(&folder)]);
        assert_eq!((&report["sites"], &report["ranks"]), (&json!(36), &json!({"8": 36})), "{report}");
    }
    if let Some(folder) = data("ckpt-lora-sd15-lora-disney") {
        let report = check(1, &[&text(&folder.join("lora_disney.safetensors"))]);
        assert!(report["form"].as_str().unwrap().contains("cloneofsimo"), "{report}");
        assert!(report["faults"].to_string().contains("image model"), "{report}");
    }
}

/// Largest difference of a model's scores with an adapter from those of a golden file.
fn distance(base: &str, adapter: &str, expected: &Path, scratch: &Path) -> f32 {
    let (ids, target) = (text(expected), text(&scratch.join("scores.safetensors")));
    ok(&["logits", "--model", base, "--adapter", adapter, "--ids", &ids, "--out", &target]);
    let scores = |path: &str| MappedFile::open(Path::new(path)).unwrap().load("logits", &Device::Cpu).unwrap();
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
        let all = MappedFile::open(&source.join("adapter_model.safetensors")).unwrap().load_all(&Device::Cpu).unwrap();
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
        for (name, t) in MappedFile::open(&out.join("adapters.safetensors")).unwrap().load_all(&Device::Cpu).unwrap() {
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
    let peft = MappedFile::open(&source.join("adapter_model.safetensors")).unwrap().load_all(&Device::Cpu).unwrap();
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
