//! What single dynamics promise of a run: LoRA-Pro at full rank is full fine-tuning, ALLoRA changes gradients and no pass, LISA's
//! sleepers keep every bit, exchanges and restarts keep the function, and any first part of a nested product is an adapter.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use common::{family, recipe, session, tensors, train, write_rows};
use espalier_adapters::formats::folder;
use espalier_adapters::parameter::Role;
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{AdapterSet, Flow, Host, ModuleMut};
use espalier_models::{LoadOptions, Model, TokenBatch};
use espalier_train::dynamics::lisa::drawn;
use espalier_train::dynamics::{Dynamics, Moving, Rates, allora};
use espalier_train::kept::Steps;
use espalier_train::optimizer::Optimizer;
use espalier_train::run::metrics::{self, Record};
use espalier_train::tape::{self, Gradients, Start};
use espalier_train::{Recipe, Run};

fn table(text: &str) -> toml::Table {
    text.parse().unwrap()
}

/// A recipe on the golden Llama with rows of its own in `dir`.
fn with(dir: &Path, adapter: &str, dynamics: &str) -> Recipe {
    let rows = dir.join("rows.jsonl");
    write_rows(&rows, 24);
    Recipe { adapter: table(adapter), dynamics: table(dynamics), ..recipe(&rows, &dir.join("run")) }
}

fn values(t: &Tensor) -> Vec<f32> {
    t.detach().flatten_all().unwrap().to_vec1().unwrap()
}

fn far(a: &Tensor, b: &Tensor) -> f64 {
    let wide = |t: &Tensor| t.detach().to_dtype(DType::F64).unwrap();
    let d = (wide(a) - wide(b)).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
    if d >= 0.0 { d } else { f64::INFINITY }
}

fn logits(model: &Model) -> Tensor {
    let ids = (0..24).map(|i| (3 + i * 7 + i * i * 5) as u32 % 40).collect();
    model.forward(&TokenBatch::new(ids, 2, 12).unwrap(), &Flow::eval()).unwrap().detach()
}

/// Changes of the weights by module path.
fn deltas(run: &mut Run) -> BTreeMap<String, Tensor> {
    let mut all = BTreeMap::new();
    run.model
        .walk(&mut |module| {
            if let ModuleMut::Linear(l) = module
                && let Some(adapter) = l.adapter()
            {
                all.insert(l.path().to_owned(), adapter.delta(l.base())?.unwrap());
            }
            Ok(())
        })
        .unwrap();
    all
}

#[test]
fn lora_pro_at_full_rank_takes_full_fine_tunings_first_step() {
    let dir = tempfile::tempdir().unwrap();
    for optimizer in ["adamw", "sgd", "muon"] {
        let of = |adapter: &str, dynamics: &str| {
            let eps = if optimizer == "sgd" { 1e-8 } else { 1e-2 };
            let recipe = Recipe {
                optimizer: optimizer.into(),
                // An epsilon that lets Adam see the gradient and not its sign alone.
                adam_eps: eps,
                max_steps: Some(1),
                // The norm that clipping goes by is that of the raw gradients, which differ.
                max_grad_norm: 0.0,
                ..with(dir.path(), adapter, dynamics)
            };
            deltas(&mut train(recipe).0)
        };
        let full = of("method = 'full'\ntarget_modules = ['q_proj', 'up_proj']", "");
        let pro = of("r = 64\nalpha = 128\ntarget_modules = ['q_proj', 'up_proj']", "method = 'lora-pro'");
        let lora = of("r = 64\nalpha = 128\ntarget_modules = ['q_proj', 'up_proj']", "");
        assert!(full.len() > 1 && full.keys().eq(pro.keys()));
        for (path, full) in &full {
            let size = far(full, &full.zeros_like().unwrap());
            let (near, other) = (far(&pro[path], full) / size, far(&lora[path], full) / size);
            assert!(size > 0.0 && near < 2e-3 && other > 0.1, "{optimizer}, {path}: {near:e}, LoRA {other:e}");
        }
    }
}

#[test]
fn allora_changes_gradients_in_fused_passes_and_no_loss() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = with(dir.path(), "r = 4\nalpha = 4", "method = 'allora'\neta = 1.5");
    let mut run = Run::prepare(recipe).unwrap();
    for p in run.parameters.trainable() {
        let noise = normal(&mut stream(2, &p.name), 0.2, p.tensor.shape(), &Device::Cpu).unwrap();
        p.var().unwrap().set(&(p.tensor.detach() + noise).unwrap()).unwrap();
    }
    let batch = run.data.train.batch(0, 0).unwrap();
    let targets = run.objective.targets(&batch).unwrap();
    let pass = |run: &Run| {
        let mut sums = Gradients::new(&run.parameters);
        let start = Start::of(&run.model, &run.parameters, |_| true);
        let flow = Flow::train(0, 0, 0);
        let loss = tape::accumulate(&run.model, &batch, &targets, &flow, start, (1.0, false), &mut sums).unwrap();
        let taped = loss.taped.0;
        (loss.value().unwrap(), taped, sums.sums().iter().map(|g| g.clone().unwrap()).collect::<Vec<_>>())
    };
    let (plain_loss, _, plain) = pass(&run);
    let mut dynamics = run.dynamics().unwrap();
    let mut optimizer = optimizer(&run);
    dynamics.enter(&mut moving(&mut run, &mut optimizer, 0)).unwrap();
    let (loss, taped, rated) = pass(&run);
    assert_eq!(taped, 0, "the blocks left their kernels");
    assert!((loss - plain_loss).abs() < 1e-4 * plain_loss.abs(), "{loss} against {plain_loss}");
    let all: Vec<_> = run.parameters.trainable().collect();
    for i in (0..all.len()).step_by(2) {
        let (a, b) = (&all[i], &all[i + 1]);
        assert_eq!((a.role, b.role), (Role::Down, Role::Up));
        let h = allora::rates(&a.tensor, &b.tensor, 1.5).unwrap().unsqueeze(1).unwrap();
        let expected = plain[i + 1].broadcast_mul(&h).unwrap();
        let size = far(&expected, &expected.zeros_like().unwrap());
        assert!(far(&rated[i + 1], &expected) < 1e-4 * size, "{}", b.name);
        assert!(far(&rated[i], &plain[i]) > 1e-2 * far(&plain[i], &plain[i].zeros_like().unwrap()), "{}", a.name);
    }
    dynamics.leave(&mut moving(&mut run, &mut optimizer, 0)).unwrap();
    assert_eq!(pass(&run).0.to_bits(), plain_loss.to_bits());
}

fn optimizer(run: &Run) -> Optimizer {
    let all: Vec<(String, Var)> = run.parameters.trainable().map(|p| (p.name.clone(), p.var().unwrap())).collect();
    let count = all.len();
    Optimizer::new(&run.recipe, all, vec![1.0; count]).unwrap()
}

fn moving<'a>(run: &'a mut Run, optimizer: &'a mut Optimizer, step: usize) -> Moving<'a> {
    let Run { recipe, model, adapters, name, parameters, .. } = run;
    Moving { model, attached: adapters.get(name).unwrap(), parameters, optimizer, step, total: 200, seed: recipe.seed }
}

/// The trained tensors, and names of what the optimiser kept, after each step.
fn course(recipe: &Recipe) -> Vec<(BTreeMap<String, Tensor>, Vec<String>)> {
    let every = Recipe { save_every: 1, keep_checkpoints: 100, ..recipe.clone() };
    session(&every, false, None).unwrap();
    let folder = |step: usize| Path::new(&recipe.out).join(format!("checkpoints/step-{step:06}"));
    (1..=recipe.max_steps.unwrap())
        .map(|step| {
            let kept = tensors(&folder(step).join("optimizer.safetensors"));
            (tensors(&folder(step).join("parameters.safetensors")), kept.into_keys().collect())
        })
        .collect()
}

fn block_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

#[test]
fn lisas_sleepers_keep_every_bit_and_no_moments() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = "method = 'full'\nmodules_to_save = ['lm_head']";
    let base = with(dir.path(), adapter, "method = 'lisa'\nlayers = 1\ninterval = 2");
    let untied = Recipe { model: family("llama1"), weight_decay: 0.1, max_steps: Some(14), seed: 5, ..base };
    let course = course(&untied);
    let records = metrics::read(Path::new(&untied.out).join("metrics.jsonl")).unwrap();
    let mut periods = std::collections::BTreeSet::new();
    for (i, record) in records.iter().enumerate() {
        let Record::Step(record) = record else { panic!("an evaluation") };
        let awake: Vec<usize> =
            record.extra["awake_blocks"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
        assert_eq!(awake.len(), 1);
        assert_eq!(awake, drawn(untied.seed, i / 2, &[0, 1], 1).into_iter().collect::<Vec<_>>());
        periods.insert(awake[0]);
        let (after, kept) = &course[i];
        let awake_now = |name: &str| block_of(name).is_none_or(|b| awake.contains(&b));
        for (name, tensor) in after {
            let moments = kept.contains(&format!("m.{name}"));
            assert_eq!(moments, awake_now(name), "step {}: moments of {name}", i + 1);
            if i > 0 {
                let moved = values(tensor) != values(&course[i - 1].0[name]);
                assert_eq!(moved, awake_now(name), "step {}: {name}", i + 1);
            }
        }
        assert!(after.keys().any(|name| block_of(name).is_none()), "the head is trained");
    }
    assert!(periods.len() > 1, "no other block was ever drawn");
}

#[test]
fn lisa_with_all_blocks_awake_is_full_fine_tuning() {
    let dir = tempfile::tempdir().unwrap();
    let of = |dynamics: &str| {
        let recipe = Recipe { weight_decay: 0.1, max_steps: Some(7), ..with(dir.path(), "method = 'full'", dynamics) };
        train(recipe).0.parameters.trainable().map(|p| values(&p.tensor)).collect::<Vec<_>>()
    };
    assert!(of("method = 'lisa'\nlayers = 9\ninterval = 2") == of(""));
    assert!(of("method = 'lisa'\nlayers = 9\ninterval = 2\nmoments = 'drop-all'") != of(""));
}

#[test]
fn lisa_draws_every_block_as_often() {
    let blocks: Vec<usize> = (0..8).collect();
    let mut counts = [0f64; 8];
    for period in 0..4000 {
        let awake = drawn(7, period, &blocks, 3);
        assert_eq!(awake.len(), 3);
        awake.into_iter().for_each(|b| counts[b] += 1.0);
    }
    let expected = 4000.0 * 3.0 / 8.0;
    let chi: f64 = counts.iter().map(|c| (c - expected).powi(2) / expected).sum();
    // 99.9 % of 7 degrees of freedom; draws without replacement spread less.
    assert!(chi < 24.3, "{counts:?}: {chi}");
}

fn gradients(run: &Run, scale: f64) -> Vec<Option<Tensor>> {
    let one = |p: &espalier_adapters::Parameter| {
        let values = normal(&mut stream(3, &p.name), scale, p.tensor.shape(), &Device::Cpu).unwrap();
        Some(values)
    };
    run.parameters.trainable().map(one).collect()
}

#[test]
fn exchanges_keep_the_function_and_reset_the_counterparts_alone() {
    let dir = tempfile::tempdir().unwrap();
    for start in ["product", "adapter"] {
        let text = format!("method = 'switchlora'\ninterval = 4\nshare = 100\nhold = 2\nstart = '{start}'");
        let recipe = with(dir.path(), "r = 8\nalpha = 1", &text);
        let mut run = Run::prepare(recipe).unwrap();
        let before = logits(&run.model);
        let size = far(&before, &before.zeros_like().unwrap());
        let mut optimizer = optimizer(&run);
        let mut dynamics = run.dynamics().unwrap();
        dynamics.begin(&mut moving(&mut run, &mut optimizer, 0)).unwrap();
        assert!(far(&logits(&run.model), &before) < 1e-5 * size, "{start}: the start changed the function");
        let rates = Rates { lr: 1e-3, scale: 1.0 };
        let mut switched = 0;
        for step in 0..12 {
            let state = optimizer.state().unwrap();
            let function = logits(&run.model);
            let mut sums = gradients(&run, 1.0);
            let mut m = moving(&mut run, &mut optimizer, step);
            dynamics.gradients(&mut m, &mut sums, rates).unwrap();
            let now = dynamics.metrics()["switched"].as_u64().unwrap();
            switched += now;
            let later = optimizer.state().unwrap();
            assert!(far(&logits(&run.model), &function) < 1e-5 * size, "{start}, step {step}: another function");
            let held = held(&*dynamics);
            for (name, tensor) in &later {
                let Some(old) = state.get(name) else { continue };
                let side = name.split_once('.').unwrap().1;
                let (lines, columns) = held.iter().find(|(path, _)| side.starts_with(&format!("{path}."))).unwrap().1;
                let is_b = side.ends_with("lora_B.weight");
                for (i, h) in (if is_b { columns } else { lines }).iter().enumerate() {
                    let line = |t: &Tensor| match t.rank() {
                        0 => values(t),
                        _ => values(&t.narrow(usize::from(is_b), i, 1).unwrap().contiguous().unwrap()),
                    };
                    if *h == 2 {
                        assert!(line(tensor).iter().all(|v| *v == 0.0), "step {step}: {name} {i} was not reset");
                    } else if tensor.rank() == old.rank() {
                        assert_eq!(line(tensor), line(old), "step {step}: {name} {i} was reset");
                    }
                }
            }
            let values_before: Vec<Vec<f32>> = run.parameters.trainable().map(|p| values(&p.tensor)).collect();
            let mut m = moving(&mut run, &mut optimizer, step);
            dynamics.update(&mut m, &sums, rates).unwrap();
            let moved = run.parameters.trainable().zip(values_before);
            for (p, old) in moved {
                let (_, (rows, columns)) =
                    held.iter().find(|(path, _)| p.name.starts_with(&format!("{path}."))).unwrap();
                let (width, new) = (p.tensor.dim(1).unwrap(), values(&p.tensor));
                for (at, (a, b)) in old.iter().zip(&new).enumerate() {
                    let still = if p.role == Role::Up { columns[at % width] } else { rows[at / width] } > 0;
                    assert_eq!(a == b, still, "step {step}: {} [{at}]", p.name);
                }
            }
        }
        assert!(switched > 200, "{start}: {switched}");
    }
}

/// Steps for which rows of A and columns of B are held, by module path.
fn held(dynamics: &dyn Dynamics) -> BTreeMap<String, (Vec<u32>, Vec<u32>)> {
    let state = dynamics.state().unwrap();
    let of = |path: &str, lines: &str| state[&format!("{path}.{lines}.held")].to_vec1::<u32>().unwrap();
    let paths = state.keys().filter_map(|k| k.strip_suffix(".rows.held"));
    paths.map(|path| (path.to_owned(), (of(path, "rows"), of(path, "columns")))).collect()
}

#[test]
fn the_first_update_after_a_hold_is_a_small_one() {
    let dir = tempfile::tempdir().unwrap();
    let text = "method = 'switchlora'\ninterval = 40\nshare = 1e-3\nhold = 5";
    let mut run = Run::prepare(with(dir.path(), "r = 8\nalpha = 1\ntarget_modules = ['q_proj']", text)).unwrap();
    let mut optimizer = optimizer(&run);
    let name = run.parameters.trainable().find(|p| p.role == Role::Up).unwrap().name.clone();
    let ones = |run: &Run| {
        run.parameters.trainable().map(|p| Some(p.tensor.ones_like().unwrap().detach())).collect::<Vec<_>>()
    };
    let rates = Rates { lr: 1e-3, scale: 1.0 };
    let mut plain = Run::prepare(with(dir.path(), "r = 8\nalpha = 1\ntarget_modules = ['q_proj']", "")).unwrap();
    let mut nothing = plain.dynamics().unwrap();
    let sums = ones(&run);
    nothing.update(&mut moving(&mut run, &mut optimizer, 0), &sums, rates).unwrap();
    optimizer.reset(&name, espalier_train::kept::Line::Columns, &[3]).unwrap();
    // Five steps of a gradient of 0, then of 1, as for a column that was held.
    let b = run.parameters.get(&name).unwrap().tensor.clone();
    let (rows, columns) = b.dims2().unwrap();
    let zero = Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap();
    for _ in 0..5 {
        let sums: Vec<_> = run.parameters.trainable().map(|p| (p.name == name).then(|| zero.clone())).collect();
        nothing.update(&mut moving(&mut run, &mut optimizer, 0), &sums, rates).unwrap();
    }
    let before = values(&b);
    let sums = ones(&run);
    nothing.update(&mut moving(&mut run, &mut optimizer, 0), &sums, rates).unwrap();
    let after = values(&b);
    let at = |v: &[f32], i: usize| f64::from(v[i]);
    let ratio = (at(&before, 3) - at(&after, 3)) / 1e-3;
    // (0.1 / (1 - 0.9^6)) / sqrt(0.001 / (1 - 0.999^6)).
    assert!((ratio - 0.522).abs() < 2e-3, "{ratio}");
    assert!(matches!(optimizer.kept(&name).unwrap().steps, Steps::Each(_)));
}

#[test]
fn a_restart_keeps_the_function_and_what_comes_out_is_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe {
        max_steps: Some(9),
        eval_data: common::data(dir.path().join("rows.jsonl")),
        ..with(dir.path(), "r = 2", "method = 'relora'\nevery = 4\nrewarm = 2\nprune = 0.9")
    };
    let mut run = Run::prepare(recipe.clone()).unwrap();
    let mut optimizer = optimizer(&run);
    let mut dynamics = run.dynamics().unwrap();
    let rates = Rates { lr: 1e-2, scale: 1.0 };
    for step in 0..9 {
        let sums = gradients(&run, 1.0);
        dynamics.update(&mut moving(&mut run, &mut optimizer, step), &sums, rates).unwrap();
        let (before, b) = (logits(&run.model), run.parameters.trainable().nth(1).unwrap().tensor.clone());
        let size = far(&before, &before.zeros_like().unwrap());
        dynamics.after(&mut moving(&mut run, &mut optimizer, step + 1)).unwrap();
        let restarted = (step + 1) % 4 == 0;
        assert_eq!(values(&b).iter().all(|v| *v == 0.0), restarted, "step {step}");
        assert!(far(&logits(&run.model), &before) < 1e-5 * size, "step {step}: another function");
        if restarted {
            let moments =
                values(&optimizer.state().unwrap()[&format!("m.{}", run.parameters.trainable().nth(1).unwrap().name)]);
            let zeros = moments.iter().filter(|v| **v == 0.0).count() as f64 / moments.len() as f64;
            assert!((zeros - 0.9).abs() < 0.02, "{zeros}");
        }
    }
    assert_eq!([3, 4, 5, 6].map(|step| dynamics.rate(step)), [1.0, 0.0, 0.5, 1.0]);
    // The sum has a rank above that of one product.
    let ended = session(&recipe, false, None).unwrap();
    assert!(ended.adapter.is_none());
    let model = ended.model.unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let start = &tensors(&Path::new(&recipe.model).join("model.safetensors"))[name];
    let end = &tensors(&model.join("model.safetensors"))[name];
    let (_, s, _) = espalier_adapters::decomposition::svd(&(end - start).unwrap()).unwrap();
    assert!(s[3] > 1e-3 * s[0] && s[7] < 1e-3 * s[0], "{s:?}");
}

#[test]
fn dylora_trains_the_drawn_components_and_strictly_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    for (strict, last_only) in [(true, true), (true, false), (false, true)] {
        let text = format!("method = 'dylora'\nstrict = {strict}\nlast_only = {last_only}");
        let name = format!("run-{strict}-{last_only}");
        let recipe = Recipe {
            max_steps: Some(10),
            weight_decay: 0.1,
            out: dir.path().join(&name).display().to_string(),
            ..with(dir.path(), "method = 'dylora'\nr = 5", &text)
        };
        let course = course(&recipe);
        let records = metrics::read(Path::new(&recipe.out).join("metrics.jsonl")).unwrap();
        let mut drifted = false;
        for i in 1..10 {
            let Record::Step(record) = &records[i] else { panic!("an evaluation") };
            let rank = record.extra["nested_rank"].as_u64().unwrap() as usize;
            for (tensor, dim) in [("lora_A.weight", 0), ("lora_B.weight", 1)] {
                let (before, after) = (&course[i - 1].0, &course[i].0);
                let key = after.keys().find(|k| k.ends_with(tensor)).unwrap();
                for at in 0..5 {
                    let line = |t: &Tensor| values(&t.narrow(dim, at, 1).unwrap().contiguous().unwrap());
                    let moved = line(&before[key]) != line(&after[key]);
                    let meant = if last_only { at + 1 == rank } else { at < rank };
                    match strict {
                        true => assert!(!moved || meant, "step {i}: {key} {at} moved at rank {rank}"),
                        false => drifted |= moved && !meant,
                    }
                    assert!(moved || !meant || dim == 0, "step {i}: {key} {at} stood still at rank {rank}");
                }
            }
        }
        assert_eq!(drifted, !strict, "without `strict` momentum and decay move the others");
    }
}

#[test]
fn any_first_part_of_a_nested_product_is_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    for scale in ["used", "constant"] {
        let adapter = format!("method = 'dylora'\nr = 4\nscale = '{scale}'\nrank_pattern = {{ up_proj = 2 }}");
        let out = dir.path().join(scale);
        let recipe = Recipe { out: out.display().to_string(), ..with(dir.path(), &adapter, "method = 'dylora'") };
        let ended = session(&recipe, false, None).unwrap();
        let saved = ended.adapter.unwrap();
        let load = |path: &Path| {
            let mut model = Model::load(Path::new(&recipe.model), &LoadOptions::cpu()).unwrap();
            let files = folder::read(path).unwrap();
            let attached = folder::load(&mut model, files, false, DType::F32, &Device::Cpu).unwrap();
            let mut set = AdapterSet::new();
            set.add("a", attached).unwrap();
            set.activate(&mut model, &[("a", 1.0)]).unwrap();
            (model, set)
        };
        let mut seen = Vec::new();
        for rank in 1..=4 {
            // Inference at a smaller rank by a setting of the saved adapter.
            let file = saved.join("adapter_config.json");
            let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            json["rank"] = rank.into();
            std::fs::write(&file, json.to_string()).unwrap();
            let (mut model, set) = load(&saved);
            let nested = logits(&model);
            // And the same as a file of plain LoRA.
            let cut = out.join(format!("cut-{rank}"));
            folder::save_cut(&mut model, set.get("a").unwrap(), rank, &cut).unwrap();
            let json: serde_json::Value =
                serde_json::from_slice(&std::fs::read(cut.join("adapter_config.json")).unwrap()).unwrap();
            assert_eq!((&json["peft_type"], &json["r"]), (&"LORA".into(), &rank.into()), "{json}");
            assert!(json.get("espalier_method").is_none());
            let plain = logits(&load(&cut).0);
            let size = far(&nested, &nested.zeros_like().unwrap());
            assert!(far(&plain, &nested) < 1e-5 * size, "{scale}, rank {rank}: {:e}", far(&plain, &nested));
            seen.push(values(&nested));
        }
        assert!(seen.windows(2).all(|w| w[0] != w[1]), "{scale}: ranks do not differ");
        let (mut model, set) = load(&saved);
        let message = folder::save_cut(&mut model, set.get("a").unwrap(), 5, &out.join("no")).unwrap_err().to_string();
        assert!(message.contains("from 1 to the adapter's 4"), "{message}");
    }
}

#[test]
fn the_estimate_knows_what_a_dynamics_keeps() {
    let dir = tempfile::tempdir().unwrap();
    let of = |adapter: &str, dynamics: &str, optimizer: &str| {
        let recipe = Recipe { optimizer: optimizer.into(), ..with(dir.path(), adapter, dynamics) };
        let mut run = Run::prepare(recipe).unwrap();
        let count = run.parameters.trainable_count() as u64;
        (run.plan(0).unwrap().memory.trained, count)
    };
    let (plain, count) = of("r = 4", "", "adamw");
    assert_eq!(plain, 16 * count);
    assert_eq!(of("r = 4", "", "sgd").0, 8 * count);
    assert_eq!(of("r = 4", "", "lion").0, 12 * count);
    assert!(of("r = 4", "method = 'lora-pro'", "adamw").0 > 2 * plain);
    assert_eq!(of("r = 4", "method = 'lora-pro'\nmoments = 'efficient'", "adamw").0, plain);
    let (full, count) = of("method = 'full'", "", "adamw");
    assert_eq!(full, 16 * count);
    // Of two blocks one is awake: half of the gradients and moments.
    assert_eq!(of("method = 'full'", "method = 'lisa'\nlayers = 1", "adamw").0, 10 * count);
    assert!(of("method = 'full'", "method = 'galore'\nrank = 4", "adamw").0 < 12 * count);
}

/// A layer that is the same object in two slots is no trouble for a dynamics that replaces slots.
#[test]
fn slots_are_given_back() {
    let dir = tempfile::tempdir().unwrap();
    for (adapter, dynamics) in
        [("r = 4\nalpha = 4", "method = 'allora'"), ("method = 'full'", "method = 'lisa'\nlayers = 1")]
    {
        let mut run = Run::prepare(with(dir.path(), adapter, dynamics)).unwrap();
        let kept = |run: &mut Run| {
            let mut all = Vec::new();
            run.model
                .walk(&mut |module| {
                    if let ModuleMut::Linear(l) = module {
                        all.push((l.base().clone(), l.adapter().cloned()));
                    }
                    Ok(())
                })
                .unwrap();
            all
        };
        let before = kept(&mut run);
        run.train(None, false, &mut espalier_train::Silent, &std::sync::atomic::AtomicBool::new(false)).unwrap();
        for ((base, layer), (base_now, layer_now)) in before.iter().zip(kept(&mut run)) {
            assert!(Arc::ptr_eq(base, &base_now));
            assert_eq!(layer.is_some(), layer_now.is_some());
            if let (Some(layer), Some(now)) = (layer, layer_now) {
                assert!(Arc::ptr_eq(layer, &now));
            }
        }
    }
}
