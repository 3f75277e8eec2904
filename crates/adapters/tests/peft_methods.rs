//! Files of PEFT's other methods judged without a base, and those of older versions that computed something else.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;

use candle_core::Device;
use common::golden;
use espalier_adapters::formats::check::check;
use espalier_adapters::formats::folder::{CONFIG_FILE, WEIGHTS_FILE};
use espalier_adapters::formats::peft_config;
use espalier_adapters::formats::safetensors::{Entry, TensorFile, write};
use serde_json::{Value, json};

const CASES: [&str; 8] = ["ia3", "loha", "lokr_both", "hra", "oft", "fourierft", "vblora", "boft"];

#[test]
fn files_are_judged_by_names_and_targets() {
    for case in CASES {
        let path = golden().join("adapters").join(case);
        let report = check(&path, None);
        assert!(report.faults.is_empty() && report.sites > 0, "{case}: {report:?}");
        let temp = tempfile::tempdir().unwrap();
        std::fs::copy(path.join(CONFIG_FILE), temp.path().join(CONFIG_FILE)).unwrap();
        let mut tensors = TensorFile::open(&path.join(WEIGHTS_FILE)).unwrap().load_all(&Device::Cpu).unwrap();
        let key = tensors.keys().find(|key| key.contains("layers.0")).unwrap().clone();
        let tensor = tensors[&key].clone();
        let (module, part) = key.split_once("_proj").unwrap();
        let (parent, _) = module.rsplit_once('.').unwrap();
        // At a module that is no target, and under a name that the method does not have.
        tensors.insert(format!("{parent}.other_proj{part}"), tensor.clone());
        tensors.insert(format!("{key}_more"), tensor);
        let entries = tensors.iter().map(|(name, t)| Entry::of(name.clone(), t)).collect();
        write(&temp.path().join(WEIGHTS_FILE), entries, &BTreeMap::new()).unwrap();
        let faults = check(temp.path(), None).faults.join("; ");
        assert!(faults.contains("other_proj") && faults.contains("_more"), "{case}: {faults}");
    }
}

#[test]
fn oft_of_older_versions_is_refused() {
    let read = |change: &dyn Fn(&mut Value)| {
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(golden().join("adapters/oft").join(CONFIG_FILE)).unwrap()).unwrap();
        change(&mut json);
        peft_config::from_json(json)
    };
    read(&|_| {}).unwrap();
    let without = |key: &str| read(&|json| drop(json.as_object_mut().unwrap().remove(key))).unwrap_err().to_string();
    assert!(without("oft_block_size").starts_with("oft_block_size"));
    assert!(without("peft_version").starts_with("use_cayley_neumann"));
    for (version, taken) in
        [("0.17.1", false), ("0.18.0", true), ("0.9.0", false), ("1.0.0", true), ("0.21.2@main", true)]
    {
        assert_eq!(read(&|json| json["peft_version"] = json!(version)).is_ok(), taken, "{version}");
    }
    // The inverse itself was computed in the same way before.
    read(&|json| (json["peft_version"], json["use_cayley_neumann"]) = (json!("0.17.1"), json!(false))).unwrap();
}
