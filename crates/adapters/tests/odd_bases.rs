//! Every method in several settings on weights that are not made for it: of one row or column, of widths that nothing divides, or
//! quantised. It works, or the error says which module does not fit.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;

use candle_core::{DType, Device};
use common::*;
use espalier_adapters::adapter::{Property, Reach};
use espalier_adapters::attach::{Origin, attach};
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{AdapterConfig, AdapterSet, Flow, FrozenWeight, Host, Linear, MethodConfig, ModuleMut, Result};

const PATH: &str = "model.layers.0.down_proj";

/// A model of one map.
struct Lone(Linear);

impl Lone {
    fn new(d_out: usize, d_in: usize) -> Self {
        let draw = |name: &str, shape: &[usize]| normal(&mut stream(5, name), 0.5, shape, &Device::Cpu).unwrap();
        let weight = FrozenWeight::dense(draw("weight", &[d_out, d_in])).unwrap();
        Self(Linear::new(PATH, weight, Some(draw("bias", &[d_out])), false).unwrap())
    }
}

impl Host for Lone {
    fn walk(&mut self, visit: &mut dyn FnMut(ModuleMut<'_>) -> Result<()>) -> Result<()> {
        visit(ModuleMut::Linear(&mut self.0))
    }

    fn head_paths(&self) -> Vec<String> {
        Vec::new()
    }

    fn base_hash(&self) -> Result<String> {
        Ok("lone".into())
    }
}

#[test]
fn weights_of_any_shape_work_or_say_why_not() {
    let (mut worked, mut refused) = (0, 0);
    for (d_out, d_in) in [(1, 8), (8, 1), (1, 1), (5, 7), (13, 4), (3, 24)] {
        for (name, method) in MethodConfig::examples() {
            let mut host = Lone::new(d_out, d_in);
            let config = AdapterConfig::new(method);
            let made = attach(&mut host, &config, Origin::Seed(1), DType::F32, &Device::Cpu);
            let adapter = match made {
                Ok(adapter) => adapter,
                Err(error) => {
                    let error = error.to_string();
                    // A lone map has neither norms nor tokens nor sequences to say anything of.
                    let elsewhere = config.method.reach() != Reach::Maps;
                    assert!(elsewhere || error.contains(PATH), "{name} on {d_out} x {d_in}: {error}");
                    refused += 1;
                    continue;
                }
            };
            perturb(&adapter, 2);
            let mut set = acting(&mut host, adapter);
            let x = normal(&mut stream(6, "x"), 1.0, (2, 3, d_in), &Device::Cpu).unwrap();
            let y = host.0.forward(&x, &Flow::eval()).unwrap();
            assert_eq!(y.dims(), [2, 3, d_out], "{name}");
            set.merge(&mut host, DType::F32).unwrap();
            let d = difference(&host.0.forward(&x, &Flow::eval()).unwrap(), &y);
            assert!(d < 1e-4, "{name} on {d_out} x {d_in}: merged differs by {d}");
            worked += 1;
        }
    }
    assert!(worked > refused && refused > 0, "{worked} {refused}");
}

/// Quantises the toy's maps.
fn quantise(toy: &mut Toy, kind: &str) {
    for linear in [&mut toy.up, &mut toy.down] {
        let weight = linear.base().as_dense().unwrap();
        let weight = if kind == "nf4" { FrozenWeight::nf4(weight, false) } else { FrozenWeight::int8(weight) };
        linear.set_base(Arc::new(weight.unwrap())).unwrap();
    }
}

#[test]
fn quantised_bases_run_train_and_merge() {
    for kind in ["nf4", "int8"] {
        for (name, method) in MethodConfig::examples() {
            let mut toy = Toy::new(DType::F32);
            quantise(&mut toy, kind);
            let config = AdapterConfig::new(method);
            let adapter = match attach(&mut toy, &config, Origin::Seed(1), DType::F32, &Device::Cpu) {
                Ok(adapter) => adapter,
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains(UP) || error.contains(DOWN), "{name} on {kind}: {error}");
                    continue;
                }
            };
            perturb(&adapter, 2);
            let mut set: AdapterSet = acting(&mut toy, adapter);
            let out = toy.out();
            let grads = toy.forward(&IDS, &Flow::eval()).unwrap().sin().unwrap().sum_all().unwrap().backward().unwrap();
            for p in set.get("a").unwrap().parameters.trainable() {
                let g = grads.get(&p.tensor).unwrap_or_else(|| panic!("{name} on {kind}: {} has no gradient", p.name));
                assert!(values(g).iter().all(|v| v.is_finite()), "{name} on {kind}: {}", p.name);
            }
            if let Some(reason) = config.method.exception(Property::Merge) {
                let refused = set.merge(&mut toy, DType::F32).unwrap_err().to_string();
                assert!(refused.contains(reason) && difference(&toy.out(), &out) == 0.0, "{name} on {kind}: {refused}");
                continue;
            }
            set.merge(&mut toy, DType::F32).unwrap();
            let d = difference(&toy.out(), &out);
            // The products with a quantised base are of weights in f32 as well.
            assert!(d < 1e-3, "{name} on {kind}: merged differs by {d}");
        }
    }
}

#[test]
fn a_method_that_scales_biases_is_not_mixed_with_others_in_a_batch() {
    let mut toy = Toy::new(DType::F32);
    let config = AdapterConfig::new(MethodConfig::by_name("ia3").unwrap());
    let adapter = fresh(&mut toy, &config, 1, DType::F32);
    perturb(&adapter, 2);
    // 2 (W x + bias) where the factors are 2: the bias is scaled too.
    for p in adapter.parameters.trainable().filter(|p| p.name.contains(UP)) {
        p.var().unwrap().set(&(p.tensor.zeros_like().unwrap() + 2.0).unwrap()).unwrap();
    }
    let x = normal(&mut stream(6, "x"), 1.0, (4, WIDTH), &Device::Cpu).unwrap();
    let base = toy.up.forward(&x, &Flow::eval()).unwrap();
    let mut set = acting(&mut toy, adapter);
    let twice = toy.up.forward(&x, &Flow::eval()).unwrap();
    assert!(difference(&twice, &(&base * 2.0).unwrap()) < 1e-6);
    set.activate(&mut toy, &[("a", 0.25)]).unwrap();
    let quarter = toy.up.forward(&x, &Flow::eval()).unwrap();
    assert!(difference(&quarter, &(&base * 1.25).unwrap()) < 1e-6);
    let error = set.activate_by_row(&mut toy, &[Some("a"), None]).unwrap_err().to_string();
    assert!(error.contains(UP) && error.contains("bias"), "{error}");
}

#[test]
fn settings_that_name_no_module_are_refused() {
    for (method, setting) in [
        ("ia3", serde_json::json!({"method": "ia3", "feedforward_modules": ["donw_proj"]})),
        ("ia3", serde_json::json!({"method": "ia3", "feedforward_modules": ".*donw_proj"})),
        (
            "fourierft",
            serde_json::json!({"method": "fourierft", "n_frequency": 2, "n_frequency_pattern": {"donw_proj": 3}}),
        ),
    ] {
        let config = AdapterConfig::new(serde_json::from_value(setting).unwrap());
        let made = attach(&mut Toy::new(DType::F32), &config, Origin::Seed(1), DType::F32, &Device::Cpu);
        let error = made.unwrap_err().to_string();
        assert!(error.contains("donw_proj") && error.contains("down_proj"), "{method}: {error}");
    }
}
