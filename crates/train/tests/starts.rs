//! Adapters that start from data: what they are given is what full fine-tuning and the model itself say, and a run that goes on
//! starts where it started.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{recipe, session, tensors, write_rows};
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::parametrisation::MethodConfig;
use espalier_adapters::target::{Pattern, TargetSpec};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow};
use espalier_train::tape::{self, Gradients, Start};
use espalier_train::{Recipe, Run, evidence};
use toml::Value;

/// Modules whose starts are looked at: attention and feed-forward of a first and a last block.
const SITES: [&str; 3] = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.0.mlp.gate_proj"];
const ROWS: usize = 5;

fn targets() -> TargetSpec {
    TargetSpec {
        target_modules: Pattern::Endings(SITES.iter().map(|s| (*s).to_owned()).collect()),
        ..TargetSpec::default()
    }
}

fn with(base: &Recipe, settings: &str) -> Recipe {
    Recipe { adapter: toml::from_str(settings).unwrap(), ..base.clone() }
}

fn method(settings: &str) -> MethodConfig {
    let table: Value = toml::from_str::<toml::Table>(settings).unwrap().into();
    table.try_into().unwrap()
}

/// Gradients of the mean loss over the first rows of the run with respect to the sites' weights, by full fine-tuning.
fn by_full_tuning(recipe: &Recipe, batches: usize) -> BTreeMap<String, Tensor> {
    let mut run = Run::prepare(recipe.clone()).unwrap();
    let mut set = AdapterSet::new();
    let config = AdapterConfig { targets: targets(), ..AdapterConfig::new(MethodConfig::by_name("full").unwrap()) };
    run.adapters.disable(&mut run.model).unwrap();
    let whole = attach(&mut run.model, &config, Origin::Seed(0), DType::F32, &Device::Cpu).unwrap();
    let parameters = whole.parameters.clone();
    set.add("whole", whole).unwrap();
    set.activate(&mut run.model, &[("whole", 1.0)]).unwrap();
    let window: Vec<_> = (0..batches)
        .map(|i| {
            let batch = run.data.train.batch(0, i).unwrap();
            let targets = run.objective.targets(&batch).unwrap();
            (batch, targets)
        })
        .collect();
    let weight: usize = window.iter().map(|(_, t)| t.weight()).sum();
    let mut gradients = Gradients::new(&parameters);
    let start = Start::of(&run.model, &parameters, |_| true);
    for (batch, targets) in &window {
        let how = (1.0 / weight as f64, false);
        let _ = tape::accumulate(&run.model, batch, targets, &Flow::eval(), start, how, &mut gradients).unwrap();
    }
    let named = parameters.trainable().zip(gradients.sums());
    named.map(|(p, sum)| (p.name.trim_end_matches(".weight").to_owned(), sum.clone().unwrap())).collect()
}

/// |a - b| / |b| in Frobenius norm.
fn apart(a: &Tensor, b: &Tensor) -> f64 {
    let norm =
        |t: &Tensor| t.to_dtype(DType::F64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    (norm(&(a - b).unwrap()) / norm(b)).sqrt()
}

#[test]
fn the_gradient_of_a_site_is_that_of_full_fine_tuning() {
    let temp = tempfile::tempdir().unwrap();
    let rows = temp.path().join("rows.jsonl");
    write_rows(&rows, 9);
    let base = recipe(&rows, &temp.path().join("run"));
    // Two rows a batch: five rows are three batches.
    let expected = by_full_tuning(&base, 3);
    assert_eq!(expected.len(), SITES.len());
    let settings = format!(
        "method = \"lora-xs\"\nr = 8\nalpha = 8.0\nstart = \"gradient\"\nupdate = \"raw\"\nstart_lr = 1.0\nrows = {ROWS}"
    );
    let mut run = Run::prepare(base.clone()).unwrap();
    run.adapters.disable(&mut run.model).unwrap();
    let config = AdapterConfig { targets: targets(), ..AdapterConfig::new(method(&settings)) };
    let made = evidence::starts(&base, &mut run.model, &config, &run.data, run.objective.as_ref(), 1.0).unwrap();
    for (path, gradient) in expected {
        let of = |name: &str| &made[&format!("{path}.{name}.weight")];
        let (a, b, r) = (of("lora_A"), of("lora_B"), of("lora_latent_mapping"));
        let kept = b.matmul(r).unwrap().matmul(a).unwrap().neg().unwrap();
        // B and A are the gradient's own leading vectors: what they leave out of it is orthogonal to what they keep.
        let inside = b.matmul(&b.t().unwrap().matmul(&gradient).unwrap()).unwrap();
        let inside = inside.matmul(&a.t().unwrap()).unwrap().matmul(a).unwrap();
        assert!(apart(&kept, &inside) < 1e-4, "{path}: {}", apart(&kept, &inside));
        assert!(apart(&kept, &gradient) < 0.9, "{path}: {}", apart(&kept, &gradient));
    }
}

#[test]
fn principal_inputs_hold_more_of_the_inputs_than_any_other_directions() {
    let temp = tempfile::tempdir().unwrap();
    let rows = temp.path().join("rows.jsonl");
    write_rows(&rows, 9);
    let base = recipe(&rows, &temp.path().join("run"));
    let mut run = Run::prepare(base.clone()).unwrap();
    run.adapters.disable(&mut run.model).unwrap();
    let settings = format!("method = \"lora\"\nr = 3\ninit = {{ name = \"eva\", rows = {ROWS} }}");
    let config = AdapterConfig { targets: targets(), ..AdapterConfig::new(method(&settings)) };
    let made = evidence::starts(&base, &mut run.model, &config, &run.data, run.objective.as_ref(), 1.0).unwrap();
    assert_eq!(made.len(), 2 * SITES.len());
    for (name, a) in made.iter().filter(|(name, _)| name.ends_with("lora_A.weight")) {
        let gram = a.matmul(&a.t().unwrap()).unwrap();
        assert!(apart(&gram, &Tensor::eye(3, DType::F32, &Device::Cpu).unwrap()) < 1e-5, "{name}");
    }
    // No adapter is left behind, and the model is as it was.
    let (batch, targets) = {
        let batch = run.data.train.batch(0, 0).unwrap();
        let targets = run.objective.targets(&batch).unwrap();
        (batch, targets)
    };
    let after = tape::evaluate(&run.model, &batch, &targets).unwrap();
    let mut fresh = Run::prepare(base).unwrap();
    fresh.adapters.disable(&mut fresh.model).unwrap();
    assert_eq!(after, tape::evaluate(&fresh.model, &batch, &targets).unwrap());
}

#[test]
fn a_run_that_started_from_data_goes_on_to_the_same_bits() {
    for settings in [
        "method = \"lora\"\nr = 3\nrslora = true\ninit = { name = \"lora-ga\", rows = 4, stable_gamma = 64 }",
        "method = \"lora\"\nr = 3\ninit = \"eva\"",
        "method = \"lora-xs\"\nr = 3\nalpha = 3\nstart = \"gradient\"",
        "method = \"dora\"\nr = 3\ninit = \"lora-ga\"",
    ] {
        let temp = tempfile::tempdir().unwrap();
        let rows = temp.path().join("rows.jsonl");
        write_rows(&rows, 9);
        let run = |name: &str| Recipe { save_every: 3, ..with(&recipe(&rows, &temp.path().join(name)), settings) };
        let whole = session(&run("whole"), false, None).unwrap();
        let first = session(&run("cut"), false, Some(5)).unwrap();
        assert!(first.outcome.stopped, "{settings}");
        assert!(temp.path().join("cut/starts.safetensors").is_file(), "{settings}");
        // Other data would start elsewhere; what is kept is used, not made again.
        let rest = session(&run("cut"), true, None).unwrap();
        assert_eq!(rest.outcome.resumed_from, Some(5), "{settings}");
        let adapter =
            |name: &str| tensors(Path::new(&temp.path().join(name).join("adapter/adapter_model.safetensors")));
        let (a, b) = (adapter("whole"), adapter("cut"));
        assert_eq!(a.len(), b.len());
        for (name, tensor) in a {
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(&tensor), bits(&b[&name]), "{settings}: {name}");
        }
        assert!(whole.outcome.loss.is_finite());
    }
}

#[test]
fn a_gradient_start_reads_as_plain_low_rank_and_gives_the_same_scores() {
    let temp = tempfile::tempdir().unwrap();
    let rows = temp.path().join("rows.jsonl");
    write_rows(&rows, 9);
    let settings = "method = \"lora\"\nr = 3\ninit = \"lora-ga\"";
    let ended = session(&with(&recipe(&rows, &temp.path().join("run")), settings), false, None).unwrap();
    let config = std::fs::read_to_string(ended.adapter.unwrap().join("adapter_config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!((json["r"].as_u64(), json["init_lora_weights"].as_bool()), (Some(6), Some(true)));
}
