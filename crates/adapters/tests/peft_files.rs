//! What files of other tools say beyond tensors and ranks: copies of the base, tying, names of the base, values of odd types.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use common::{Skeleton, golden};
use espalier_adapters::attach::{Attached, BaseCheck};
use espalier_adapters::formats::folder::{self, CONFIG_FILE, WEIGHTS_FILE};
use espalier_adapters::formats::safetensors::{Entry, TensorFile, write};
use espalier_adapters::{FrozenWeight, Host, ModuleMut, Result};
use serde_json::{Value, json};

/// A golden adapter with changes, loaded onto the modules of its base.
fn changed(
    case: &str,
    base: &mut Skeleton,
    config: impl FnOnce(&mut Value),
    tensors: impl FnOnce(&mut BTreeMap<String, Tensor>),
) -> Result<Attached> {
    let path = golden().join("adapters").join(case);
    let mut json: Value = serde_json::from_slice(&std::fs::read(path.join(CONFIG_FILE)).unwrap()).unwrap();
    let mut all = TensorFile::open(&path.join(WEIGHTS_FILE)).unwrap().load_all(&Device::Cpu).unwrap();
    config(&mut json);
    tensors(&mut all);
    let temp = tempfile::tempdir().unwrap();
    std::fs::write(temp.path().join(CONFIG_FILE), json.to_string()).unwrap();
    let entries = all.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
    write(&temp.path().join(WEIGHTS_FILE), entries, &BTreeMap::new()).unwrap();
    folder::load(base, folder::read(temp.path())?, false, DType::F32, &Device::Cpu)
}

fn message(result: Result<Attached>) -> String {
    result.map(|_| ()).expect_err("accepted").to_string()
}

#[test]
fn use_dora_must_be_a_boolean() {
    for value in [json!("true"), json!(1), json!([true])] {
        let base = &mut Skeleton::of("llama_gqa_tied");
        let error = message(changed("lora_all", base, |c| c["use_dora"] = value.clone(), |_| {}));
        assert!(error.contains("use_dora") && error.contains(&value.to_string()), "{error}");
    }
    let base = &mut Skeleton::of("llama_gqa_tied");
    changed("lora_all", base, |c| c["use_dora"] = Value::Null, |_| {}).unwrap();
}

#[test]
fn a_copy_of_a_tied_head_must_be_the_table() {
    const COPY: &str = "base_model.model.lm_head.base_layer.weight";
    let table = |base: &mut Skeleton| {
        let mut found = None;
        base.walk(&mut |m| {
            if let ModuleMut::Embedding(e) = m {
                found = Some(e.weight().frozen().clone());
            }
            Ok(())
        })
        .unwrap();
        found.unwrap()
    };
    let base = &mut Skeleton::of("llama_gqa_tied");
    let table = table(base);
    changed("lora_all", base, |_| {}, |t| drop(t.insert(COPY.into(), table.clone()))).unwrap();
    let others = [
        Tensor::full(7f32, (3, 2), &Device::Cpu).unwrap(),
        (&table + 1e-3).unwrap(),
        table.t().unwrap().contiguous().unwrap(),
    ];
    for other in others {
        let error = message(changed("lora_all", base, |_| {}, |t| drop(t.insert(COPY.into(), other.clone()))));
        assert!(error.contains("lm_head.weight"), "{error}");
    }
}

#[test]
fn copies_are_turned_and_compared_up_to_the_rounding_of_the_base() {
    // GPT-2's files keep [d_in, d_out], the model [d_out, d_in].
    let (base, place) = (&mut Skeleton::of("gpt2"), "transformer.h.0.mlp.c_fc");
    let stored = golden().join("families/gpt2/model.safetensors");
    let weight = TensorFile::open(&stored).unwrap().load(&format!("{place}.weight"), &Device::Cpu).unwrap();
    let key = format!("base_model.model.{place}.base_layer.weight");
    changed("gpt2_lora", base, |_| {}, |t| drop(t.insert(key.clone(), weight.clone()))).unwrap();
    let wrong = (&weight * 1.01).unwrap();
    let error = message(changed("gpt2_lora", base, |_| {}, |t| drop(t.insert(key.clone(), wrong))));
    assert!(error.contains("c_fc.weight"), "{error}");

    let (base, place) = (&mut Skeleton::of("llama_gqa_tied"), "model.layers.1.mlp.up_proj");
    let mut exact = None;
    base.walk(&mut |m| {
        if let ModuleMut::Linear(linear) = m {
            let dense = linear.base().dequantize(DType::F32)?;
            linear.set_base(std::sync::Arc::new(FrozenWeight::nf4(&dense, false)?))?;
            exact = if linear.path() == place { Some(dense) } else { exact.take() };
        }
        Ok(())
    })
    .unwrap();
    let (exact, key) = (exact.unwrap(), format!("base_model.model.{place}.base_layer.weight"));
    changed("lora_all", base, |_| {}, |t| drop(t.insert(key.clone(), exact.clone()))).unwrap();
    let other = exact.neg().unwrap();
    let error = message(changed("lora_all", base, |_| {}, |t| drop(t.insert(key, other))));
    assert!(error.contains("up_proj.weight"), "{error}");
}

#[test]
fn the_second_half_of_a_tied_pair_must_say_the_same() {
    for (case, name) in [("lora_embedding_tied", "lora_A.weight"), ("modules_to_save_tied", "weight")] {
        let key = format!("base_model.model.lm_head.{name}");
        let base = &mut Skeleton::of("llama_gqa_tied");
        changed(case, base, |_| {}, |_| {}).unwrap();
        let error = message(changed(
            case,
            base,
            |_| {},
            |t| {
                let other = (&t[&key] + 0.5).unwrap();
                t.insert(key.clone(), other);
            },
        ));
        assert!(error.contains("lm_head") && error.contains("tied"), "{case}: {error}");
        // Without tying, a LoRA of the head has no place on a tied base; a head saved whole has.
        let untied = changed(case, base, |c| c["ensure_weight_tying"] = false.into(), |_| {});
        assert!(message(untied).contains("lm_head"), "{case}");
    }
}

#[test]
fn a_file_without_a_hash_says_so_and_keeps_its_revision() {
    let base = &mut Skeleton::of("llama_gqa_tied");
    let attached = changed("lora_all", base, |c| c["revision"] = "v1.2".into(), |_| {}).unwrap();
    assert_eq!(attached.base, BaseCheck::NoHash);
    assert_eq!(attached.config.revision.as_deref(), Some("v1.2"));
    let temp = tempfile::tempdir().unwrap();
    folder::save(base, &attached, temp.path()).unwrap();
    let files = folder::read(temp.path()).unwrap();
    assert_eq!(files.config.revision.as_deref(), Some("v1.2"));
    let mut other = folder::read(temp.path()).unwrap();
    assert_eq!(folder::load(base, files, false, DType::F32, &Device::Cpu).unwrap().base, BaseCheck::Same);
    other.config.base_hash = Some("sha256:0".into());
    assert_eq!(folder::load(base, other, true, DType::F32, &Device::Cpu).unwrap().base, BaseCheck::Forced);
}

#[test]
fn a_file_of_many_tensors_is_read_in_one_pass() {
    let temp = tempfile::NamedTempFile::new().unwrap();
    let one = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
    let entries = (0..6000).map(|i| Entry::of(format!("model.layers.{i}.self_attn.q_proj.weight"), &one)).collect();
    write(temp.path(), entries, &BTreeMap::new()).unwrap();
    let began = Instant::now();
    let file = TensorFile::open(temp.path()).unwrap();
    assert_eq!(file.load_all(&Device::Cpu).unwrap().len(), 6000);
    // Reading the header anew for every tensor takes minutes.
    assert!(began.elapsed().as_secs_f64() < 5.0, "{:?}", began.elapsed());
}
