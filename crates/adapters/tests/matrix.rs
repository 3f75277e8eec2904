//! Every method in several settings against everything an adapter must do. That gradients are derivatives is tried in
//! `espalier-trials` (R-06).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use common::*;
use espalier_adapters::adapter::{Property, Reach};
use espalier_adapters::config::{BiasMode, TokenIndices};
use espalier_adapters::formats::folder;
use espalier_adapters::initialisation::INITIALISATIONS;
use espalier_adapters::parametrisation::METHODS;
use espalier_adapters::parametrisation::lora::Lora;
use espalier_adapters::target::Pattern;
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, FrozenWeight, Host, MethodConfig, ModuleMut};

/// Name, settings; every method of the list has at least its default row.
fn rows() -> Vec<(String, AdapterConfig)> {
    let examples = MethodConfig::examples().into_iter();
    let mut rows: Vec<_> = examples.map(|(name, method)| (name, AdapterConfig::new(method))).collect();
    let lora = || AdapterConfig::new(MethodConfig::Lora(Lora { r: 3, alpha: 4.0, ..Lora::default() }));
    let mut table = lora();
    table.targets.target_modules = Pattern::Endings(vec!["embed_tokens".into(), "up_proj".into()]);
    table.targets.rank_pattern = [("up_proj".to_owned(), 2)].into();
    table.targets.alpha_pattern = [("embed_tokens".to_owned(), 3.0)].into();
    rows.push(("lora on a table".into(), table));
    let mut beside = lora();
    beside.bias = BiasMode::All;
    beside.modules_to_save = vec!["layers.0.norm".into(), "down_proj".into()];
    beside.trainable_tokens = Some(TokenIndices::Input(vec![3, 9, 0]));
    rows.push(("lora with all that can be beside it".into(), beside));
    rows
}

fn moves_base(config: &AdapterConfig) -> bool {
    config.method.portable().is_some()
}

/// A toy with the row's adapter acting, moved off its start.
fn adapted(config: &AdapterConfig, dtype: DType) -> (Toy, AdapterSet) {
    let mut toy = Toy::new(dtype);
    let parameters = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let adapter = fresh(&mut toy, config, 1, parameters);
    perturb(&adapter, 2);
    let set = acting(&mut toy, adapter);
    (toy, set)
}

#[test]
fn the_list_of_methods_is_covered() {
    let rows = rows();
    for method in METHODS {
        assert!(rows.iter().any(|(_, config)| config.method.name() == *method), "{method}");
    }
    assert!(rows.len() >= 2 * (2 + INITIALISATIONS.len()) + 3);
}

#[test]
fn initialisations_from_the_base_start_at_the_base() {
    for (name, config) in rows() {
        let mut toy = Toy::new(DType::F32);
        let base = toy.out();
        let adapter = fresh(&mut toy, &config, 1, DType::F32);
        let _set = acting(&mut toy, adapter);
        let d = difference(&toy.out(), &base);
        if config.method.starts_at_base() {
            assert!(d < 1e-5 || name.contains("table"), "{name}: the start differs from the base by {d}");
        } else {
            assert!(d > 1e-5 && d.is_finite(), "{name}: does not start at the base, yet differs from it by {d}");
        }
    }
}

#[test]
fn files_say_the_same_after_a_round_trip() {
    for (name, config) in rows() {
        let (mut toy, set) = adapted(&config, DType::F32);
        let temp = tempfile::tempdir().unwrap();
        let saved = folder::save(&mut toy, set.get("a").unwrap(), temp.path()).unwrap();
        let files = folder::read(temp.path()).unwrap();
        assert_eq!(files.tensors.len(), saved.tensors, "{name}");
        let mut other = Toy::new(DType::F32);
        let read = folder::load(&mut other, files, false, DType::F32, &Device::Cpu).unwrap();
        let again = temp.path().join("again");
        folder::save(&mut other, &read, &again).unwrap();
        for file in [folder::WEIGHTS_FILE, folder::CONFIG_FILE] {
            let (first, second) = (std::fs::read(temp.path().join(file)), std::fs::read(again.join(file)));
            assert_eq!(first.unwrap(), second.unwrap(), "{name}: {file} of a second round");
        }
        let own = &set.get("a").unwrap().parameters;
        // What an encoder makes is saved, not the encoder.
        let encoded = read.prompt.is_some() && moves_base(&config);
        assert!(encoded || own.len() == read.parameters.len(), "{name}");
        for p in own.iter().filter(|_| !encoded) {
            let found = &read.parameters.get(&p.name).unwrap_or_else(|| panic!("{name}: {} is lost", p.name)).tensor;
            if moves_base(&config) && p.name.contains(".lora_") && !p.name.contains("magnitude") {
                // Twice the rank: what moved out of the base is taken back.
                assert_eq!(found.elem_count(), 2 * p.tensor.elem_count(), "{name}: {}", p.name);
            } else {
                assert_eq!(values(found), values(&p.tensor), "{name}: {} is not bit for bit what was saved", p.name);
            }
        }
        let _set = acting(&mut other, read);
        let d = difference(&other.out(), &toy.out());
        assert!(d < 2e-5, "{name}: {d}");
    }
}

fn base_bytes(toy: &mut Toy) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut note = |t: &Tensor| all.push(espalier_adapters::formats::safetensors::bytes_of(t).unwrap());
    toy.walk(&mut |module| {
        match module {
            ModuleMut::Linear(m) => {
                note(m.base().as_dense().unwrap());
                m.bias().into_iter().for_each(|b| note(b.get()));
            }
            ModuleMut::Embedding(m) => note(m.weight().get()),
            ModuleMut::Norm(m) => {
                note(m.weight().get());
                m.bias().into_iter().for_each(|b| note(b.get()));
            }
        }
        Ok(())
    })
    .unwrap();
    all
}

#[test]
fn merging_keeps_the_outputs_and_unmerging_gives_every_bit_back() {
    for (name, config) in rows() {
        let before = base_bytes(&mut Toy::new(DType::F32));
        let (mut toy, mut set) = adapted(&config, DType::F32);
        let acting = toy.out();
        if let Some(reason) = config.method.exception(Property::Merge) {
            let refused = set.merge(&mut toy, DType::F32).unwrap_err().to_string();
            assert!(refused.contains(reason), "{name}: {refused}");
            assert_eq!(difference(&toy.out(), &acting), 0.0, "{name}: a refused merge changed something");
            continue;
        }
        let merged = set.merge(&mut toy, DType::F32).unwrap();
        assert!(toy.up.adapter().is_none() && toy.down.adapter().is_none() && toy.embed.adapter().is_none());
        assert!(difference(&toy.out(), &acting) < 1e-4, "{name}: {}", difference(&toy.out(), &acting));
        assert_ne!(base_bytes(&mut toy), before, "{name}: nothing was merged");
        set.unmerge(&mut toy, merged).unwrap();
        assert_eq!(base_bytes(&mut toy), before, "{name}");
        assert_eq!(difference(&toy.out(), &Toy::new(DType::F32).out()), 0.0, "{name}");
    }
}

#[test]
fn the_change_of_some_rows_is_those_rows_of_the_change() {
    let mut by_rows = std::collections::BTreeSet::new();
    for (name, config) in rows() {
        let (toy, _set) = adapted(&config, DType::F32);
        for linear in [&toy.up, &toy.down] {
            let Some(adapter) = linear.adapter() else { continue };
            let whole = adapter.delta(linear.base()).unwrap().unwrap();
            let d_out = linear.base().d_out();
            for run in [0..d_out, 0..1, 1..d_out, d_out - 1..d_out] {
                // A method without this form is merged a matrix at a time.
                let Some(part) = adapter.rows(run.clone()).unwrap() else { continue };
                by_rows.insert(config.method.name());
                let base = Arc::new(FrozenWeight::dense(linear.base().rows(run.clone()).unwrap()).unwrap());
                let d =
                    difference(&part.delta(&base).unwrap().unwrap(), &whole.narrow(0, run.start, run.len()).unwrap());
                assert!(d < 1e-6, "{name} {run:?}: {d}");
            }
        }
    }
    assert_eq!(by_rows.into_iter().collect::<Vec<_>>(), ["dora", "full", "lora"]);
}

#[test]
fn switching_off_gives_the_base_bit_for_bit() {
    for (name, config) in rows() {
        let (mut toy, mut set) = adapted(&config, DType::F32);
        let (base, acting) = (Toy::new(DType::F32).out(), toy.out());
        assert!(difference(&acting, &base) > 1e-2, "{name}: the adapter does nothing");
        set.disable(&mut toy).unwrap();
        assert_eq!(difference(&toy.out(), &base), 0.0, "{name}");
        set.activate(&mut toy, &[("a", 1.0)]).unwrap();
        assert_eq!(difference(&toy.out(), &acting), 0.0, "{name}");
    }
}

#[test]
fn two_adapters_act_as_the_sum_of_their_changes() {
    let x = Tensor::arange(0f32, (4 * WIDTH) as f32, &Device::Cpu).unwrap().reshape((4, WIDTH)).unwrap();
    let x = (x.sin().unwrap() * 1.5).unwrap();
    let plain = AdapterConfig::new(MethodConfig::Lora(Lora { r: 2, ..Lora::default() }));
    for (name, config) in rows() {
        let (mut toy, mut set) = adapted(&config, DType::F32);
        let second = fresh(&mut toy, &plain, 7, DType::F32);
        perturb(&second, 8);
        set.add("b", second).unwrap();
        let mut of = |wanted: &[(&str, f64)]| {
            set.activate(&mut toy, wanted).unwrap();
            toy.up.forward(&x, &Flow::eval()).unwrap().detach()
        };
        let (base, a, b) = (of(&[]), of(&[("a", 1.0)]), of(&[("b", 1.0)]));
        let both = of(&[("a", 1.0), ("b", -0.5)]);
        let change = ((a - &base).unwrap() + ((b - &base).unwrap() * -0.5).unwrap()).unwrap();
        let d = difference(&both, &(base + change).unwrap());
        assert!(d < 1e-4, "{name}: {d}");
        let acting = toy.out();
        if config.method.exception(Property::Merge).is_none() {
            set.merge(&mut toy, DType::F32).unwrap();
            assert!(difference(&toy.out(), &acting) < 1e-4, "{name}: merged");
        }
    }
}

#[test]
fn adapters_of_one_table_add_up_too() {
    let (_, config) = rows().into_iter().find(|(name, _)| name == "lora on a table").unwrap();
    let (mut toy, mut set) = adapted(&config, DType::F32);
    let second = fresh(&mut toy, &config, 7, DType::F32);
    perturb(&second, 8);
    set.add("b", second).unwrap();
    let ids = Tensor::new(&IDS, &Device::Cpu).unwrap();
    let mut of = |wanted: &[(&str, f64)]| {
        set.activate(&mut toy, wanted).unwrap();
        toy.embed.forward(&ids).unwrap().detach()
    };
    let (base, a, b) = (of(&[]), of(&[("a", 1.0)]), of(&[("b", 1.0)]));
    let both = of(&[("a", 1.5), ("b", -0.5)]);
    let change = (((a - &base).unwrap() * 1.5).unwrap() + ((b - &base).unwrap() * -0.5).unwrap()).unwrap();
    assert!(difference(&change, &change.zeros_like().unwrap()) > 0.1);
    assert!(difference(&both, &(base + change).unwrap()) < 1e-5);
    let acting = toy.out();
    set.merge(&mut toy, DType::F32).unwrap();
    assert!(difference(&toy.out(), &acting) < 1e-4);
}

#[test]
fn every_trainable_tensor_learns_after_one_step() {
    for (name, config) in rows() {
        let mut toy = Toy::new(DType::F32);
        let adapter = fresh(&mut toy, &config, 1, DType::F32);
        let set = acting(&mut toy, adapter);
        let loss = |toy: &Toy| toy.forward(&IDS, &Flow::eval()).unwrap().sin().unwrap().sum_all().unwrap();
        let grads = loss(&toy).backward().unwrap();
        for p in set.get("a").unwrap().parameters.trainable() {
            if let Some(g) = grads.get(&p.tensor) {
                p.var().unwrap().set(&(p.tensor.detach() - (g * 0.05).unwrap()).unwrap()).unwrap();
            }
        }
        let grads = loss(&toy).backward().unwrap();
        for p in set.get("a").unwrap().parameters.trainable() {
            let g = grads.get(&p.tensor).unwrap_or_else(|| panic!("{name}: {} has no gradient", p.name));
            let largest = difference(g, &g.zeros_like().unwrap());
            assert!(largest > 1e-9 && largest.is_finite(), "{name}: the gradient of {} is {largest}", p.name);
        }
    }
}

#[test]
fn a_bf16_base_runs_and_trains_f32_parameters() {
    for (name, config) in rows() {
        let exact = adapted(&config, DType::F32).0.out();
        let (toy, set) = adapted(&config, DType::BF16);
        let y = toy.forward(&IDS, &Flow::train(1, 2, 3)).unwrap();
        assert_eq!(y.dtype(), DType::BF16, "{name}");
        let grads = y.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for p in set.get("a").unwrap().parameters.trainable() {
            assert_eq!(p.tensor.dtype(), DType::F32, "{name}");
            let g = grads.get(&p.tensor).unwrap_or_else(|| panic!("{name}: {} has no gradient", p.name));
            assert!(values(g).iter().all(|v| v.is_finite()), "{name}: {}", p.name);
        }
        let scale = values(&exact).into_iter().map(f64::abs).fold(0.0, f64::max);
        let d = difference(&toy.out(), &exact) / scale;
        // Eight bits of mantissa in every one of four modules.
        assert!(d < 0.04, "{name}: {d}");
    }
}

#[test]
fn no_rows_and_one_row_run() {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        for (name, config) in rows() {
            let (mut toy, mut set) = adapted(&config, dtype);
            let whole = toy.out();
            for flow in [Flow::eval(), Flow::train(1, 1, 1)] {
                let none = toy.forward(&[], &flow).unwrap_or_else(|e| panic!("{name} {dtype:?}: {e}"));
                assert_eq!(none.dims(), [0, OUT], "{name}");
            }
            let one = toy.forward(&IDS[..1], &Flow::eval()).unwrap();
            let tolerance = if dtype == DType::BF16 { 0.05 } else { 1e-5 };
            assert!(difference(&one, &whole.narrow(0, 0, 1).unwrap()) < tolerance, "{name}");
            let second = fresh(&mut toy, &config, 9, DType::F32);
            if second.dense.is_empty() && second.rows.is_empty() && second.prompt.is_none() {
                set.add("b", second).unwrap();
                set.activate(&mut toy, &[("a", 0.5), ("b", 0.5)]).unwrap();
                let none = toy.forward(&[], &Flow::eval()).unwrap_or_else(|e| panic!("{name} {dtype:?}: {e}"));
                assert_eq!(none.dims(), [0, OUT], "{name}");
            }
        }
    }
}

#[test]
fn a_tensor_of_another_shape_is_refused_with_both_shapes() {
    for (name, config) in rows() {
        let (mut toy, set) = adapted(&config, DType::F32);
        let temp = tempfile::tempdir().unwrap();
        folder::save(&mut toy, set.get("a").unwrap(), temp.path()).unwrap();
        for key in folder::read(temp.path()).unwrap().tensors.into_keys() {
            let mut files = folder::read(temp.path()).unwrap();
            let tensor = &files.tensors[&key];
            // The toy's `down_proj` is kept transposed, so its shape in the message is the model's.
            let turned = key == format!("{DOWN}.weight");
            let bigger = Tensor::cat(&[tensor, tensor], usize::from(turned)).unwrap();
            let shown =
                |t: &Tensor| if turned { format!("{:?}", t.t().unwrap().dims()) } else { format!("{:?}", t.dims()) };
            let (expected, found) = (shown(tensor), shown(&bigger));
            files.tensors.insert(key.clone(), bigger);
            let error = folder::load(&mut toy, files, false, DType::F32, &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains(&expected) && error.contains(&found) && error.contains(&key), "{name}: {error}");
        }
    }
}

#[test]
fn ranks_above_a_dimension_work_or_say_why_not() {
    for (name, mut config) in rows() {
        // Whatever a method calls its settings, the one called `r` is its rank.
        let rank = |config: &mut AdapterConfig, r: usize| {
            let mut settings = serde_json::to_value(&config.method).unwrap();
            if let Some(own) = settings.get_mut("r") {
                *own = r.into();
                config.method = serde_json::from_value(settings).unwrap();
            }
        };
        let has_rank = config.method.rank_and_alpha().0 > 0;
        rank(&mut config, 40);
        let made = try_fresh(&mut Toy::new(DType::F32), &config, 1, DType::F32);
        if let (Err(error), true) = (&made, has_rank) {
            let error = error.to_string();
            let named = [UP, DOWN, EMBED].iter().any(|path| error.contains(path));
            assert!(error.contains("rank 40") && named, "{name}: {error}");
            continue;
        }
        let stays = !moves_base(&config) || config.method.reach() == Reach::Sequence;
        assert!(made.is_ok() && stays, "{name}: {:?}", made.err());
        let (mut toy, mut set) = adapted(&config, DType::F32);
        let acting = toy.out();
        assert!(values(&acting).iter().all(|v| v.is_finite()), "{name}");
        if config.method.exception(Property::Merge).is_none() {
            set.merge(&mut toy, DType::F32).unwrap();
            assert!(difference(&toy.out(), &acting) < 1e-3, "{name}");
        }
        for r in [0, 1 << 50] {
            rank(&mut config, r);
            let made = try_fresh(&mut Toy::new(DType::F32), &config, 1, DType::F32);
            if has_rank && config.targets.rank_pattern.is_empty() {
                let error = made.unwrap_err().to_string();
                assert!(error.contains(if r > 0 { "rank" } else { "at least 1" }), "{name}: {error}");
            }
        }
    }
}
