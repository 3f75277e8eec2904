//! Broken files: each gives one error that names the file and what is wrong, and nothing panics.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{Toy, fresh, perturb};
use espalier_adapters::formats::folder::{self, WEIGHTS_FILE};
use espalier_adapters::formats::peft_config::{from_json, to_json};
use espalier_adapters::formats::safetensors::{Entry, TensorFile, write};
use espalier_adapters::{AdapterConfig, MethodConfig, Result};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const A: &str = "base_model.model.model.layers.0.up_proj.lora_A.weight";

/// A saved LoRA of the toy: its folder, and its tensors by their names in the file.
fn saved() -> (tempfile::TempDir, BTreeMap<String, Tensor>) {
    let mut toy = Toy::new(DType::F32);
    let adapter = fresh(&mut toy, &AdapterConfig::new(MethodConfig::by_name("lora").unwrap()), 1, DType::F32);
    perturb(&adapter, 2);
    let temp = tempfile::tempdir().unwrap();
    folder::save(&mut toy, &adapter, temp.path()).unwrap();
    let tensors = TensorFile::open(&temp.path().join(WEIGHTS_FILE)).unwrap().load_all(&Device::Cpu).unwrap();
    (temp, tensors)
}

fn rewrite(folder: &Path, tensors: &BTreeMap<String, Tensor>) {
    let entries = tensors.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
    write(&folder.join(WEIGHTS_FILE), entries, &BTreeMap::new()).unwrap();
}

fn load(folder: &Path) -> Result<()> {
    let files = folder::read(folder)?;
    folder::load(&mut Toy::new(DType::F32), files, false, DType::F32, &Device::Cpu).map(|_| ())
}

/// The error after `change` was made to the tensors of a saved adapter.
fn error_after(change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> String {
    let (temp, mut tensors) = saved();
    rewrite(temp.path(), &tensors);
    load(temp.path()).expect("unchanged");
    change(&mut tensors);
    rewrite(temp.path(), &tensors);
    load(temp.path()).expect_err("accepted").to_string()
}

/// A file with this header text and `data` bytes of zeros after it.
fn raw(path: &Path, header: &str, data: usize) {
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_file_cut_anywhere_is_refused_by_name() {
    let (temp, _) = saved();
    let path = temp.path().join(WEIGHTS_FILE);
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    assert!(header < whole.len());
    for cut in 0..whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let message = folder::read(temp.path()).expect_err(&format!("{cut} bytes were accepted")).to_string();
        assert!(message.contains(WEIGHTS_FILE), "{cut}: {message}");
        let wanted = if cut < 8 { "too few" } else { "truncated" };
        assert!(message.contains(wanted), "{cut}: {message}");
    }
    std::fs::write(&path, [&whole[..], &[0; 3]].concat()).unwrap();
    assert!(folder::read(temp.path()).is_err(), "bytes after the end");
}

#[test]
fn headers_that_lie_are_refused() {
    let (temp, _) = saved();
    let path = temp.path().join(WEIGHTS_FILE);
    for claim in [9u64, 4 << 30, 1 << 40, u64::MAX, u64::MAX - 7] {
        std::fs::write(&path, [&claim.to_le_bytes()[..], b"{}      "].concat()).unwrap();
        let message = folder::read(temp.path()).unwrap_err().to_string();
        assert!(message.contains(WEIGHTS_FILE) && message.contains("16"), "{claim}: {message}");
    }
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"{A}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    for header in [
        entry("F32", "[1099511627776]", "[0,4398046511104]"),
        entry("F32", "[18446744073709551615,2]", "[0,16]"),
        entry("F32", "[9223372036854775807,4]", "[0,16]"),
        entry("F32", "[8]", "[0,16]"),
        entry("F32", "[4]", "[16,0]"),
        entry("F32", "[4]", "[4,20]"),
        entry("F32", "[-4]", "[0,16]"),
        entry("F32", "[1.5]", "[0,16]"),
        entry("F99", "[4]", "[0,16]"),
        format!(r#"{{"{A}":3}}"#),
        format!(
            r#"{{"{A}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"b":{{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}}}"#
        ),
        "[]".into(),
        "nonsense".into(),
        "[".repeat(5000),
        String::new(),
    ] {
        raw(&path, &header, 16);
        let message = folder::read(temp.path()).expect_err(&header).to_string();
        assert!(message.contains(WEIGHTS_FILE), "{header}: {message}");
    }
}

#[test]
fn only_finite_floats_are_taken() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let message = error_after(|tensors| {
            let mut values = tensors[A].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values[7] = value;
            tensors.insert(A.into(), Tensor::from_vec(values, tensors[A].dims(), &Device::Cpu).unwrap());
        });
        assert!(message.contains(A) && message.contains("value 7") && message.contains(WEIGHTS_FILE), "{message}");
    }
    for dtype in [DType::I64, DType::U32, DType::U8] {
        let message = error_after(|tensors| {
            let other = tensors[A].abs().unwrap().to_dtype(dtype).unwrap();
            tensors.insert(A.into(), other);
        });
        assert!(message.contains(A) && message.contains(dtype.as_str()), "{message}");
    }
    let (temp, _) = saved();
    for (dtype, bytes) in [("I32", 16), ("BOOL", 4), ("F8_E4M3", 4), ("I16", 8)] {
        let header = format!(r#"{{"{A}":{{"dtype":"{dtype}","shape":[4],"data_offsets":[0,{bytes}]}}}}"#);
        raw(&temp.path().join(WEIGHTS_FILE), &header, bytes);
        let message = folder::read(temp.path()).unwrap_err().to_string();
        assert!(message.contains(A) && message.contains(WEIGHTS_FILE), "{message}");
    }
    // Half types are taken, and become f32.
    let (temp, tensors) = saved();
    let halves = tensors.iter().map(|(name, t)| (name.clone(), t.to_dtype(DType::BF16).unwrap())).collect();
    rewrite(temp.path(), &halves);
    load(temp.path()).unwrap();
}

#[test]
fn tensors_and_places_pair_up_one_to_one() {
    let message = error_after(|tensors| drop(tensors.remove(A)));
    assert!(message.contains("1 declared") && message.contains("up_proj.lora_A.weight"), "{message}");
    let extra = A.replace("layers.0", "layers.4");
    let message = error_after(|tensors| drop(tensors.insert(extra.clone(), tensors[A].clone())));
    assert!(message.contains("1 in the file but without") && message.contains("layers.4"), "{message}");
    let message = error_after(|tensors| drop(tensors.insert(A.into(), tensors[A].t().unwrap().contiguous().unwrap())));
    assert!(message.contains("[8, 6]") && message.contains("[6, 8]"), "{message}");
    let alias = A.replace(".lora_A", ".base_layer.lora_A");
    let message = error_after(|tensors| drop(tensors.insert(alias.clone(), tensors[A].clone())));
    assert!(message.contains("two tensors") && message.contains("up_proj.lora_A.weight"), "{message}");
    let bare = A.trim_start_matches("base_model.model.");
    let message = error_after(|tensors| {
        let tensor = tensors.remove(A).unwrap();
        tensors.insert(bare.into(), tensor);
    });
    assert!(message.contains(bare) && message.contains("base_model.model."), "{message}");
    let copy = A.replace("lora_A", "base_layer");
    let message = error_after(|tensors| drop(tensors.insert(copy.clone(), tensors[A].clone())));
    assert!(message.contains("another base"), "{message}");
    let stranger = copy.replace("layers.0", "layers.9");
    let message = error_after(|tensors| drop(tensors.insert(stranger.clone(), tensors[A].clone())));
    assert!(message.contains("layers.9"), "{message}");
}

#[test]
fn a_file_for_another_base_is_refused_unless_allowed() {
    let (temp, _) = saved();
    let mut files = folder::read(temp.path()).unwrap();
    files.config.base_hash = Some("sha256:00".into());
    let mut toy = Toy::new(DType::F32);
    let failed = folder::load(&mut toy, files, false, DType::F32, &Device::Cpu).unwrap_err();
    assert!(failed.to_string().contains("sha256:00") && failed.hint().unwrap().contains("--allow-base"), "{failed}");
    let mut files = folder::read(temp.path()).unwrap();
    files.config.base_hash = Some("sha256:00".into());
    folder::load(&mut toy, files, true, DType::F32, &Device::Cpu).unwrap();
}

fn config_with(key: &str, value: Value) -> Result<AdapterConfig> {
    let mut keys = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]});
    keys[key] = value;
    from_json(keys)
}

#[test]
fn settings_that_would_change_the_results_are_refused_by_name() {
    for (key, value) in [
        ("lora_bias", json!(true)),
        ("layer_replication", json!([[0, 2]])),
        ("target_parameters", json!(["experts"])),
        ("alora_invocation_tokens", json!([1, 2])),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"x": 1})),
        ("something_new", json!(1)),
        ("another", json!("text")),
        ("megatron_config", json!({"tp": 2})),
    ] {
        let message = config_with(key, value.clone()).expect_err(key).to_string();
        assert!(message.contains(key) && message.contains("not supported"), "{message}");
        for unset in [Value::Null, json!(false), json!([]), json!({})] {
            config_with(key, unset).unwrap_or_else(|e| panic!("{key}: {e}"));
        }
    }
    for (key, value) in [
        ("peft_version", json!("0.99")),
        ("inference_mode", json!(false)),
        ("fan_in_fan_out", json!(true)),
        ("auto_mapping", json!({"base_model_class": "X"})),
        ("revision", json!("main")),
        ("megatron_core", json!("megatron.core")),
        ("qalora_group_size", json!(16)),
        ("eva_config", json!({"rho": 2.0})),
    ] {
        config_with(key, value).unwrap_or_else(|e| panic!("{key}: {e}"));
    }
}

#[test]
fn values_of_the_wrong_kind_are_refused_by_key() {
    for (key, value) in [
        ("r", json!(-1)),
        ("r", json!("8")),
        ("r", json!(2.5)),
        ("lora_alpha", json!("x")),
        ("use_rslora", json!(1)),
        ("lora_dropout", json!([0.1])),
        ("init_lora_weights", json!(3)),
        ("init_lora_weights", json!("zeros")),
        ("target_modules", json!(7)),
        ("target_modules", Value::Null),
        ("exclude_modules", json!(7)),
        ("layers_to_transform", json!("x")),
        ("layers_to_transform", json!(-1)),
        ("layers_pattern", json!(1)),
        ("rank_pattern", json!({"q_proj": "x"})),
        ("alpha_pattern", json!([1])),
        ("bias", json!("some")),
        ("modules_to_save", json!("lm_head")),
        ("trainable_token_indices", json!("x")),
        ("task_type", json!("POETRY")),
        ("base_model_name_or_path", json!(1)),
        ("peft_type", json!("LOHA")),
    ] {
        let message = config_with(key, value.clone()).expect_err(key).to_string();
        assert!(message.starts_with(key), "{key} = {value}: {message}");
    }
    for dropout in [1.0, -0.1, 7.0] {
        let config = config_with("lora_dropout", json!(dropout));
        let mut config = config.unwrap();
        config.targets.target_modules = Default::default();
        let origin = espalier_adapters::attach::Origin::Seed(0);
        let made =
            espalier_adapters::attach::attach(&mut Toy::new(DType::F32), &config, origin, DType::F32, &Device::Cpu);
        assert!(made.unwrap_err().to_string().contains("dropout"));
    }
    for whole in [json!([]), json!(null), json!("x"), json!({})] {
        assert!(from_json(whole).is_err());
    }
}

#[test]
fn missing_files_are_named() {
    let temp = tempfile::tempdir().unwrap();
    let message = folder::read(temp.path()).unwrap_err().to_string();
    assert!(message.contains(folder::CONFIG_FILE), "{message}");
    let (saved, _) = saved();
    std::fs::remove_file(saved.path().join(WEIGHTS_FILE)).unwrap();
    assert!(folder::read(saved.path()).unwrap_err().to_string().contains(WEIGHTS_FILE));
    std::fs::write(saved.path().join(folder::CONFIG_FILE), "{\"r\": 4,\n\"x\"}").unwrap();
    let message = folder::read(saved.path()).unwrap_err().to_string();
    assert!(message.contains(folder::CONFIG_FILE) && message.contains("line 2"), "{message}");
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        prop::sample::select(vec!["LORA", "all-linear", "pissa_niter_", "lora_only", "full", "dora", ".*("])
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{0,8}", inner, 0..4)
                .prop_map(|m| m.into_iter().collect::<Map<_, _>>().into()),
        ]
    })
}

const KEYS: &[&str] = &[
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "init_lora_weights",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "task_type",
    "base_model_name_or_path",
    "espalier_method",
    "other",
];

fn config_like() -> impl Strategy<Value = Value> {
    let pairs = prop::collection::vec((prop::sample::select(KEYS), any_json()), 0..8);
    (any::<bool>(), pairs).prop_map(|(plain, pairs)| {
        let mut keys = Map::new();
        if plain {
            keys.insert("peft_type".into(), "LORA".into());
            keys.insert("target_modules".into(), json!(["up_proj"]));
        }
        keys.extend(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)));
        keys.into()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_json_is_read_or_refused(json in prop_oneof![any_json(), config_like()]) {
        if let Ok(config) = from_json(json) {
            // What was understood is written so that it is understood again.
            let written = to_json(&config, true).unwrap();
            prop_assert_eq!(&written, &to_json(&from_json(written.clone()).unwrap(), true).unwrap());
            let origin = espalier_adapters::attach::Origin::Seed(0);
            let _ = espalier_adapters::attach::attach(&mut Toy::new(DType::F32), &config, origin, DType::F32, &Device::Cpu);
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let temp = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(temp.path(), &bytes).unwrap();
        if let Ok(file) = TensorFile::open(temp.path()) {
            let _ = file.load_all(&Device::Cpu);
        }
    }

    #[test]
    fn a_changed_byte_is_read_or_refused(at in 0usize..1000, value in any::<u8>()) {
        let (temp, _) = saved();
        let path = temp.path().join(WEIGHTS_FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] = value;
        std::fs::write(&path, &bytes).unwrap();
        let _ = load(temp.path());
    }
}
