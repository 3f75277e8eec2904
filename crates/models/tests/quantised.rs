//! Quantised bases: GGUF against transformers, and adapters trained on and merged into every quantised storage.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;

use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::{DType, Device, IndexOp, Tensor};
use common::{batch, difference, golden, largest, logits, rows, tensors};
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, Host, MethodConfig, ModuleMut, ParameterMap};
use espalier_kernels::cross_entropy::cross_entropy;
use espalier_models::export::ExportOptions;
use espalier_models::{LoadOptions, Model, Quantization};

const BASES: &[&str] = &["gguf", "nf4", "nf4 double", "int8"];

/// A quantised golden model and token ids it knows.
fn open(base: &str) -> (Model, Tensor) {
    if base == "gguf" {
        let folder = golden().join("gguf");
        let ids = tensors(&folder.join("expected.safetensors"))["ids"].clone();
        return (Model::load(&folder.join("tiny.gguf"), &LoadOptions::cpu()).unwrap(), ids);
    }
    let folder = golden().join("families/llama_gqa_tied");
    let quantization = match base {
        "nf4" => Quantization::Nf4 { double: false },
        "nf4 double" => Quantization::Nf4 { double: true },
        _ => Quantization::Int8,
    };
    let options = LoadOptions { quantization: Some(quantization), ..LoadOptions::cpu() };
    (Model::load(&folder, &options).unwrap(), tensors(&folder.join("expected.safetensors"))["ids"].clone())
}

fn adapt(model: &mut Model, method: &str) -> (AdapterSet, ParameterMap) {
    let config = AdapterConfig::new(MethodConfig::by_name(method).unwrap());
    let attached = attach(model, &config, Origin::Seed(3), DType::F32, &Device::Cpu).unwrap();
    let parameters = attached.parameters.clone();
    let mut set = AdapterSet::new();
    set.add("a", attached).unwrap();
    set.activate(model, &[("a", 1.0)]).unwrap();
    (set, parameters)
}

/// Mean loss of the next token.
fn loss(model: &Model, ids: &Tensor) -> Tensor {
    let scores = model.forward(&batch(ids), &Flow::eval()).unwrap();
    let (b, t, v) = scores.dims3().unwrap();
    let labels: Vec<u32> = rows(ids).into_iter().flat_map(|row| row[1..].to_vec()).collect();
    let shifted = scores.i((.., ..t - 1)).unwrap().reshape((b * (t - 1), v)).unwrap();
    cross_entropy(&shifted, &labels, None).unwrap().mean_all().unwrap()
}

fn matrices(model: &mut Model) -> BTreeMap<String, (String, Tensor)> {
    let mut found = BTreeMap::new();
    model
        .walk(&mut |module| {
            let path = module.path().to_owned();
            let (kind, tensor) = match module {
                ModuleMut::Linear(m) => (m.base().dtype_name(), m.base().dequantize(DType::F32)?),
                ModuleMut::Embedding(m) => ("f32".into(), m.weight().frozen().clone()),
                ModuleMut::Norm(m) => ("f32".into(), m.weight().frozen().clone()),
            };
            found.insert(path, (kind, tensor));
            Ok(())
        })
        .unwrap();
    found
}

/// The module that transformers calls by another name than the GGUF tensor `name`.
fn module_of(name: &str) -> String {
    let top = [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];
    if let Some((_, module)) = top.iter().find(|(own, _)| *own == name) {
        return (*module).into();
    }
    let (layer, part) = name.strip_prefix("blk.").unwrap().split_once('.').unwrap();
    let parts = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    format!("model.layers.{layer}.{}", parts.iter().find(|(own, _)| *own == part).unwrap().1)
}

#[test]
fn a_gguf_file_gives_the_scores_of_its_dequantised_weights() {
    let expected = tensors(&golden().join("gguf/expected.safetensors"));
    let (mut model, ids) = open("gguf");
    let d = difference(&logits(&model, &ids), &expected["logits"]);
    assert!(d < 1e-3, "{d}");
    let kinds: Vec<String> = matrices(&mut model).into_values().map(|(kind, _)| kind).collect();
    for kind in ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"] {
        assert!(kinds.iter().any(|k| k == kind), "{kind} was made dense: {kinds:?}");
    }
}

#[test]
fn gguf_rows_are_dequantised_exactly() {
    const HEAD: usize = 16;
    let expected = tensors(&golden().join("gguf/expected.safetensors"));
    let found = matrices(&mut open("gguf").0);
    let mut compared = 0;
    for (key, theirs) in expected.iter().filter(|(key, _)| key.starts_with("deq.")) {
        let name = key.trim_start_matches("deq.").trim_end_matches(".weight");
        let (_, ours) = &found[&module_of(name)];
        if theirs.rank() == 1 {
            assert_eq!(difference(ours, theirs), 0.0, "{key}");
        } else {
            // llama.cpp keeps the two halves of a head interleaved: its second row is the first of the second half.
            let second = if name.ends_with("attn_q") || name.ends_with("attn_k") { HEAD / 2 } else { 1 };
            assert_eq!(difference(&ours.i(0).unwrap(), &theirs.i(0).unwrap()), 0.0, "{key}, row 0");
            assert_eq!(difference(&ours.i(second).unwrap(), &theirs.i(1).unwrap()), 0.0, "{key}, row 1");
        }
        compared += 1;
    }
    assert_eq!(compared, found.len());
}

#[test]
fn adapters_train_on_every_quantised_base() {
    for base in BASES {
        for method in ["lora", "dora"] {
            let (mut model, ids) = open(base);
            let before = matrices(&mut model);
            assert!(before.values().any(|(kind, _)| kind != "f32"), "{base}");
            let (_set, parameters) = adapt(&mut model, method);
            let mut losses = Vec::new();
            for step in 0..=10 {
                let now = loss(&model, &ids);
                losses.push(now.to_scalar::<f32>().unwrap());
                let grads = now.backward().unwrap();
                for p in parameters.trainable() {
                    let g = grads.get(&p.tensor).unwrap_or_else(|| panic!("{base} {method}: {} has none", p.name));
                    let largest = largest(g);
                    assert!(largest.is_finite(), "{base} {method}: {}", p.name);
                    // B starts at zero, so A learns from the second step on.
                    assert!(largest > 0.0 || (step == 0 && p.name.contains("lora_A")), "{base} {method}: {}", p.name);
                    p.var().unwrap().set(&(p.tensor.detach() - (g * 0.05).unwrap()).unwrap()).unwrap();
                }
            }
            assert!(losses[10] < losses[0] - 0.05, "{base} {method}: {losses:?}");
            let after = matrices(&mut model);
            for (path, (_, weight)) in &before {
                assert_eq!(difference(weight, &after[path].1), 0.0, "{base}: {path} is frozen");
            }
        }
    }
}

#[test]
fn merging_into_a_quantised_base_makes_it_dense_and_keeps_the_scores() {
    for base in BASES {
        for method in ["lora", "dora"] {
            let (mut model, ids) = open(base);
            let plain = logits(&model, &ids);
            let (mut set, parameters) = adapt(&mut model, method);
            for p in parameters.trainable().filter(|p| p.name.contains("lora_B")) {
                let wave = Tensor::arange(0f32, p.tensor.elem_count() as f32, &Device::Cpu).unwrap().sin().unwrap();
                p.var().unwrap().set(&(wave.reshape(p.tensor.shape()).unwrap() * 0.02).unwrap()).unwrap();
            }
            let adapted = logits(&model, &ids);
            assert!(difference(&adapted, &plain) > 0.01, "{base} {method}");
            let merged = set.merge(&mut model, DType::F32).unwrap();
            let d = difference(&logits(&model, &ids), &adapted);
            assert!(d < 1e-3, "{base} {method}: {d}");
            assert!(matrices(&mut model).values().all(|(kind, _)| kind == "f32"), "{base} {method}");
            set.unmerge(&mut model, merged).unwrap();
            assert_eq!(difference(&logits(&model, &ids), &plain), 0.0, "{base} {method}");
        }
    }
}

/// The golden GGUF file without its output head, so that the table is the head.
fn tied_gguf(path: &std::path::Path) {
    let mut source = std::fs::File::open(golden().join("gguf/tiny.gguf")).unwrap();
    let content = Content::read(&mut source).unwrap();
    let names: Vec<&String> = content.tensor_infos.keys().filter(|n| *n != "output.weight").collect();
    let tensors: Vec<QTensor> = names.iter().map(|n| content.tensor(&mut source, n, &Device::Cpu).unwrap()).collect();
    let tensors: Vec<(&str, &QTensor)> = names.iter().map(|n| n.as_str()).zip(&tensors).collect();
    let metadata: Vec<(&str, &Value)> = content.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn a_table_merged_alone_leaves_the_old_head_in_a_tied_gguf() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("tied.gguf");
    tied_gguf(&path);
    let ids = open("gguf").1;
    for tie in [false, true] {
        let mut model = Model::load(&path, &LoadOptions::cpu()).unwrap();
        assert!(model.config().tied);
        let plain = logits(&model, &ids);
        let targets = serde_json::from_value(serde_json::json!({"target_modules": ["embed_tokens"]})).unwrap();
        let method = MethodConfig::by_name("lora").unwrap();
        let config = AdapterConfig { targets, tie_weights: tie, ..AdapterConfig::new(method) };
        let attached = attach(&mut model, &config, Origin::Seed(3), DType::F32, &Device::Cpu).unwrap();
        for p in attached.parameters.trainable() {
            let wave = Tensor::arange(0f32, p.tensor.elem_count() as f32, &Device::Cpu).unwrap().sin().unwrap();
            p.var().unwrap().set(&wave.reshape(p.tensor.shape()).unwrap()).unwrap();
        }
        let mut set = AdapterSet::new();
        set.add("a", attached).unwrap();
        set.activate(&mut model, &[("a", 1.0)]).unwrap();
        let adapted = logits(&model, &ids);
        let merged = set.merge(&mut model, DType::F32).unwrap();
        assert_eq!(merged.unties, !tie);
        let d = difference(&logits(&model, &ids), &adapted);
        assert!(d < 1e-3, "tie {tie}: in memory {d}");
        let out = temp.path().join(format!("merged-{tie}"));
        model.export(&out, &ExportOptions::default()).unwrap();
        let again = common::load(&out);
        assert_eq!(again.config().tied, tie);
        let d = difference(&logits(&again, &ids), &adapted);
        assert!(d < 1e-3, "tie {tie}: written {d}");
        set.unmerge(&mut model, merged).unwrap();
        assert_eq!(difference(&logits(&model, &ids), &plain), 0.0);
    }
}

/// A GGUF header of version 3 by hand: key-value pairs, then tensors (name, dimensions, type, offset), then `data` zero bytes.
fn by_hand(pairs: &[(&str, u32, &[u8])], tensors: &[(&str, &[u64], u32, u64)], data: usize) -> Vec<u8> {
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let mut out = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((pairs.len() as u64).to_le_bytes());
    for (key, kind, value) in pairs {
        out.extend([&text(key)[..], &kind.to_le_bytes(), value].concat());
    }
    for (name, dims, kind, offset) in tensors {
        out.extend([&text(name)[..], &(dims.len() as u32).to_le_bytes()].concat());
        dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend([&kind.to_le_bytes()[..], &offset.to_le_bytes()].concat());
    }
    out.resize(out.len().next_multiple_of(32) + data, 0);
    out
}

#[test]
fn fields_of_a_gguf_header_are_checked_and_named() {
    const TABLE: &str = "token_embd.weight";
    let arch = [&5u64.to_le_bytes()[..], b"llama"].concat();
    let arch = ("general.architecture", 8, arch.as_slice());
    let (zero, big) = (0u32.to_le_bytes(), u64::MAX.to_le_bytes());
    let endless = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(40);
    let table: (&str, &[u64], u32, u64) = (TABLE, &[4, 2], 0, 0);
    for (bytes, field) in [
        (by_hand(&[arch, ("general.alignment", 4, &zero)], &[table], 64), "general.alignment"),
        (by_hand(&[arch, ("general.alignment", 10, &big)], &[table], 64), "general.alignment"),
        (by_hand(&[arch, ("a.text", 8, &big)], &[table], 64), "a.text"),
        (by_hand(&[arch, ("a.list", 9, &[&4u32.to_le_bytes()[..], &big].concat())], &[table], 64), "a.list"),
        (by_hand(&[arch, ("a.list", 9, &endless)], &[table], 64), "a.list"),
        (by_hand(&[arch, ("a.flag", 7, &[2])], &[table], 64), "a.flag"),
        (by_hand(&[arch, ("a.kind", 99, &[2])], &[table], 64), "a.kind"),
        (by_hand(&[arch, arch], &[table], 64), "general.architecture"),
        (by_hand(&[arch], &[(TABLE, &[], 0, 0)], 64), TABLE),
        (by_hand(&[arch], &[(TABLE, &[8], 0, 0)], 64), TABLE),
        (by_hand(&[arch], &[(TABLE, &[0, 2], 0, 0)], 64), TABLE),
        (by_hand(&[arch], &[(TABLE, &[1 << 62], 0, 0)], 64), TABLE),
        (by_hand(&[arch], &[(TABLE, &[1 << 32, 1 << 32], 0, 0)], 64), TABLE),
        (by_hand(&[arch], &[(TABLE, &[4, 2], 4, 0)], 64), TABLE),
        (by_hand(&[arch], &[(TABLE, &[4, 8], 2, 0)], 64), TABLE),
        (by_hand(&[arch], &[(TABLE, &[4, 2], 0, 8)], 64), TABLE),
        (by_hand(&[arch], &[(TABLE, &[4, 2], 0, u64::MAX - 31)], 64), TABLE),
        (by_hand(&[arch], &[table, table], 64), TABLE),
        (by_hand(&[arch], &[table, ("output.weight", &[4, 2], 0, 0)], 64), "output.weight"),
        (by_hand(&[arch], &[table, ("rope_freqs.weight", &[1 << 62], 0, 32)], 64), "rope_freqs.weight"),
        (by_hand(&[arch, ("llama.block_count", 10, &big)], &[table], 64), "llama.block_count"),
    ] {
        let temp = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        std::fs::write(temp.path(), bytes).unwrap();
        let error = Model::load(temp.path(), &LoadOptions::cpu()).unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
}

#[test]
fn rounding_stays_within_the_steps_of_the_storage() {
    let folder = golden().join("families/llama_gqa_tied");
    let dense = matrices(&mut common::load(&folder));
    // Relative to the largest weight: half the widest gap of NF4's code book, and of its 8-bit scales; half of 1/127.
    for (base, step) in [("nf4", 0.16), ("nf4 double", 0.2), ("int8", 0.5 / 127.0 + 1e-6)] {
        for (path, (kind, weight)) in matrices(&mut open(base).0) {
            let exact = &dense[&path].1;
            let largest = exact.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            let d = difference(&weight, exact) / f64::from(largest);
            assert!(d <= if kind == "f32" { 0.0 } else { step }, "{base} {path}: {d}");
            assert!(kind == "f32" || d > 0.0, "{base} {path} was not quantised");
        }
    }
}

#[test]
fn a_broken_gguf_file_is_refused_by_name() {
    let whole = std::fs::read(golden().join("gguf/tiny.gguf")).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("cut.gguf");
    let cuts = (0..2048).step_by(97).chain((2048..whole.len()).step_by(4001)).chain([whole.len() - 1]);
    for cut in cuts {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let message = Model::load(&path, &LoadOptions::cpu()).expect_err(&format!("{cut} bytes")).to_string();
        assert!(message.contains("cut.gguf"), "{cut}: {message}");
    }
    for at in 0..600 {
        let mut bytes = whole.clone();
        bytes[at] = bytes[at].wrapping_add(113);
        std::fs::write(&path, &bytes).unwrap();
        // Not every byte matters (names in the metadata); none may stop the program.
        let _ = Model::load(&path, &LoadOptions::cpu());
    }
    // Every field of the header at its limits.
    let header = whole.windows(12).rposition(|w| w == b"output.weigh" as &[u8]).unwrap() + 64;
    let values = [0, 1, 7, 1 << 31, (1 << 61) + 2, 1 << 62, u64::MAX / 8 + 1, u64::MAX];
    for (i, at) in (0..header).step_by(3).enumerate() {
        let (value, width) = (values[i % values.len()], [4, 8][(i / values.len()) % 2]);
        let mut bytes = whole.clone();
        bytes[at..at + width].copy_from_slice(&u64::to_le_bytes(value)[..width]);
        std::fs::write(&path, &bytes).unwrap();
        if let Err(error) = Model::load(&path, &LoadOptions::cpu()) {
            assert!(!error.to_string().is_empty());
        }
    }
    std::fs::write(&path, "not a model").unwrap();
    let message = Model::load(&path, &LoadOptions::cpu()).unwrap_err().to_string();
    assert!(message.contains("cut.gguf") && message.contains("GGUF"), "{message}");
}
