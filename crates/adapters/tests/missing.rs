//! Tensors that a file lacks are not made before it is refused. A process of its own: its peak memory is measured.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use espalier_adapters::formats::folder::{self, CONFIG_FILE, WEIGHTS_FILE};
use espalier_adapters::formats::safetensors::write;
use espalier_adapters::{FrozenWeight, Host, Linear, ModuleMut, Result};

/// Eight maps of 512 by 512.
struct Maps(Vec<Linear>);

impl Host for Maps {
    fn walk(&mut self, visit: &mut dyn FnMut(ModuleMut<'_>) -> Result<()>) -> Result<()> {
        self.0.iter_mut().try_for_each(|m| visit(ModuleMut::Linear(m)))
    }

    fn head_paths(&self) -> Vec<String> {
        Vec::new()
    }

    fn base_hash(&self) -> Result<String> {
        Ok(String::new())
    }
}

fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn a_file_without_its_tensors_is_refused_before_they_take_memory() {
    let weight = || FrozenWeight::dense(Tensor::ones((512, 512), DType::F32, &Device::Cpu).unwrap()).unwrap();
    let map = |i: usize| Linear::new(format!("model.layers.{i}.up_proj"), weight(), None, false).unwrap();
    let mut maps = Maps((0..8).map(map).collect());
    let temp = tempfile::tempdir().unwrap();
    write(&temp.path().join(WEIGHTS_FILE), Vec::new(), &BTreeMap::new()).unwrap();
    for dora in [false, true] {
        let config =
            serde_json::json!({"peft_type": "LORA", "r": 65536, "target_modules": ["up_proj"], "use_dora": dora});
        std::fs::write(temp.path().join(CONFIG_FILE), config.to_string()).unwrap();
        let before = peak_mib();
        let files = folder::read(temp.path()).unwrap();
        let error = folder::load(&mut maps, files, false, DType::F32, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("layers.7.up_proj.lora_B") || error.contains("more"), "{error}");
        assert!(peak_mib() - before < 50, "{} MiB for a file of nothing", peak_mib() - before);
    }
}
