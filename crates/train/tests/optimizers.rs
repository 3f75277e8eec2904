//! Optimisers against torch's numbers, and what is kept of parameters: lines that begin anew, lines that are held still.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use common::{golden, tensors};
use espalier_train::Recipe;
use espalier_train::dynamics::lora_fa;
use espalier_train::kept::{Line, Steps};
use espalier_train::optimizer::{Hold, NO_HOLDS, Optimizer, Step, rule};

fn goldens() -> BTreeMap<String, Tensor> {
    tensors(&golden().join("optim.safetensors"))
}

fn optimizer(recipe: &Recipe, start: &Tensor) -> (Optimizer, Var) {
    let p = Var::from_tensor(start).unwrap();
    (Optimizer::new(recipe, vec![("p".into(), p.clone())], vec![1.0]).unwrap(), p)
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let all = (wide(a) - wide(b)).unwrap().abs().unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    all.into_iter().fold(0.0, |m, d| if d >= 0.0 { d.max(m) } else { f64::INFINITY })
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// The worst difference from the parameters after each step.
fn worst(
    recipe: &Recipe,
    start: &Tensor,
    gradients: &Tensor,
    expected: &Tensor,
    change: impl Fn(Tensor) -> Tensor,
) -> f64 {
    let (mut optimizer, p) = optimizer(recipe, start);
    let mut worst = 0f64;
    for i in 0..gradients.dim(0).unwrap() {
        let gradient = change(gradients.get(i).unwrap());
        optimizer.step(&[Some(gradient)], Step { lr: recipe.lr, scale: 1.0, holds: &NO_HOLDS }).unwrap();
        worst = worst.max(difference(p.as_tensor(), &expected.get(i).unwrap()));
    }
    assert!(difference(p.as_tensor(), start) > 1e-3, "nothing moved");
    worst
}

#[test]
fn steps_give_torchs_numbers() {
    let g = goldens();
    let recipe = |optimizer: &str, lr: f64, weight_decay: f64| Recipe {
        optimizer: optimizer.into(),
        lr,
        weight_decay,
        ..Recipe::default()
    };
    let muon = recipe("muon", 1e-2, 0.1);
    let cases = [
        ("adamw", Recipe { beta2: 0.95, ..recipe("adamw", 1e-2, 0.1) }, 1e-6),
        ("adamw_default", recipe("adamw", 2e-3, 0.01), 1e-6),
        ("sgd", recipe("sgd", 1e-2, 0.1), 1e-6),
        ("sgd_momentum", Recipe { momentum: Some(0.9), nesterov: false, ..recipe("sgd", 1e-2, 0.0) }, 1e-6),
        ("sgd_nesterov", Recipe { momentum: Some(0.9), ..recipe("sgd", 1e-2, 0.0) }, 1e-6),
        ("lion", Recipe { beta2: 0.99, ..recipe("lion", 1e-3, 0.1) }, 1e-6),
        ("muon", muon.clone(), 1e-5),
        ("muon_bf16", muon.clone(), 2e-3),
        ("muon_rms", Recipe { muon_adjust_lr: "match_rms_adamw".into(), ..muon.clone() }, 1e-5),
    ];
    for (name, recipe, bar) in cases {
        let expected = &g[&format!("{name}.params")];
        let found = worst(&recipe, &g["adamw.p0"], &g["adamw.grads"], expected, |t| t);
        assert!(found < bar, "{name}: {found:e}");
    }
    let start = g["adamw.p0"].t().unwrap().contiguous().unwrap();
    let turned = |t: Tensor| t.t().unwrap().contiguous().unwrap();
    let found = worst(&muon, &start, &g["adamw.grads"], &g["muon_tall.params"], turned);
    assert!(found < 1e-5, "muon_tall: {found:e}");
    // A vector is no matrix: AdamW's.
    let (row, grads, expected) = (g["adamw.p0"].get(1), g["adamw.grads"].clone(), g["adamw_default.params"].clone());
    let row_of = |t: &Tensor| t.narrow(1, 1, 1).unwrap().squeeze(1).unwrap().contiguous().unwrap();
    let found = worst(&recipe("muon", 2e-3, 0.01), &row.unwrap(), &row_of(&grads), &row_of(&expected), |t| t);
    assert!(found < 1e-6, "a vector under muon: {found:e}");
}

#[test]
fn lora_fa_gives_pefts_numbers() {
    let g = goldens();
    let recipe = Recipe { lr: 1e-2, ..Recipe::default() };
    let change = |t: Tensor| lora_fa::corrected(&t, &g["lorafa.a"], 3.0).unwrap();
    let found = worst(&recipe, &g["lorafa.b0"], &g["lorafa.grads"], &g["lorafa.params"], change);
    // PEFT's eps stands before the bias correction.
    assert!(found < 1e-6, "{found:e}");
}

#[test]
fn a_step_taken_apart_is_the_step() {
    let g = goldens();
    for name in ["adamw", "lion", "muon", "sgd"] {
        let recipe = Recipe { optimizer: name.into(), weight_decay: 0.1, ..Recipe::default() };
        let (mut whole, p) = optimizer(&recipe, &g["adamw.p0"]);
        let (mut apart, q) = optimizer(&recipe, &g["adamw.p0"]);
        for i in 0..4 {
            let gradient = g["adamw.grads"].get(i).unwrap();
            whole.step(&[Some(gradient.clone())], Step { lr: 1e-2, scale: 0.5, holds: &NO_HOLDS }).unwrap();
            let direction = apart.direction("p", &gradient, 0.5).unwrap();
            apart.advance(0, &direction, 1e-2).unwrap();
        }
        let found = difference(p.as_tensor(), q.as_tensor());
        assert!(found < 1e-6, "{name}: {found:e}");
    }
}

#[test]
fn lines_that_begin_anew_move_as_at_their_first_step() {
    let g = goldens();
    let recipe = Recipe { beta2: 0.95, ..Recipe::default() };
    let step = Step { lr: 1e-2, scale: 1.0, holds: &NO_HOLDS };
    let (mut some, p) = optimizer(&recipe, &g["adamw.p0"]);
    let (mut none, q) = optimizer(&recipe, &g["adamw.p0"]);
    for i in 0..3 {
        some.step(&[Some(g["adamw.grads"].get(i).unwrap())], step).unwrap();
        none.step(&[Some(g["adamw.grads"].get(i).unwrap())], step).unwrap();
    }
    some.reset("p", Line::Columns, &[2, 5]).unwrap();
    assert!(some.reset("p", Line::Columns, &[7]).is_err(), "a column outside");
    let before = p.as_tensor().copy().unwrap();
    let (mut first, f) = optimizer(&recipe, &before);
    let gradient = || vec![Some(g["adamw.grads"].get(5).unwrap())];
    some.step(&gradient(), step).unwrap();
    none.step(&gradient(), step).unwrap();
    first.step(&gradient(), step).unwrap();
    let column = |t: &Tensor, i: usize| t.narrow(1, i, 1).unwrap();
    for i in 0..7 {
        let expected = if [2, 5].contains(&i) { f.as_tensor() } else { q.as_tensor() };
        let found = difference(&column(p.as_tensor(), i), &column(expected, i));
        assert!(found < 1e-6, "column {i}: {found:e}");
    }
    assert!(difference(&column(p.as_tensor(), 2), &column(q.as_tensor(), 2)) > 1e-4, "the reset changes nothing");
    let Steps::Each(counts) = &some.kept("p").unwrap().steps else { panic!("one count for all") };
    assert_eq!(values(counts), [4.0, 4.0, 1.0, 4.0, 4.0, 1.0, 4.0]);
    // And all of it survives being written and read.
    let (mut read, r) = optimizer(&recipe, p.as_tensor());
    read.restore(some.state().unwrap(), 4, &[]).unwrap();
    some.step(&gradient(), step).unwrap();
    read.step(&gradient(), step).unwrap();
    assert_eq!(values(p.as_tensor()), values(r.as_tensor()));
}

#[test]
fn what_is_held_keeps_every_bit() {
    let g = goldens();
    let recipe = Recipe { weight_decay: 0.5, ..Recipe::default() };
    let (mut optimizer, p) = optimizer(&recipe, &g["adamw.p0"]);
    let gradient = || vec![Some(g["adamw.grads"].get(0).unwrap())];
    optimizer.step(&gradient(), Step { lr: 1e-2, scale: 1.0, holds: &NO_HOLDS }).unwrap();
    for kept in [true, false] {
        let moves = Line::Rows.mask((5, 7), &Device::Cpu, |i| i == 3).unwrap();
        let holds = BTreeMap::from([(0, Hold { moves, kept })]);
        let (before, state) = (values(p.as_tensor()), optimizer.state().unwrap());
        optimizer.step(&gradient(), Step { lr: 1e-2, scale: 1.0, holds: &holds }).unwrap();
        let (after, later) = (values(p.as_tensor()), optimizer.state().unwrap());
        for row in 0..5 {
            let at = row * 7..(row + 1) * 7;
            assert_eq!(before[at.clone()] == after[at.clone()], row != 3, "row {row}");
            let same = values(&state["m.p"])[at.clone()] == values(&later["m.p"])[at.clone()];
            // The first gradient column is 0.
            assert_eq!(same, row != 3 && kept, "moments of row {row}, {kept}");
        }
    }
}

#[test]
fn pruning_keeps_the_largest_moments() {
    let g = goldens();
    let (mut optimizer, _) = optimizer(&Recipe::default(), &g["adamw.p0"]);
    optimizer.step(&[Some(g["adamw.grads"].get(0).unwrap())], Step { lr: 1e-2, scale: 1.0, holds: &NO_HOLDS }).unwrap();
    let before = values(&optimizer.state().unwrap()["m.p"]);
    optimizer.prune("p", 0.8).unwrap();
    let after = values(&optimizer.state().unwrap()["m.p"]);
    assert_eq!(after.iter().filter(|v| **v == 0.0).count(), 28);
    // The same entries of both, or none would be left with a first moment alone.
    let second = values(&optimizer.state().unwrap()["v.p"]);
    assert!(after.iter().zip(&second).all(|(m, v)| (*m == 0.0) == (*v == 0.0)));
    let smallest = after.iter().filter(|v| **v != 0.0).fold(f32::INFINITY, |m, v| m.min(v.abs()));
    for (a, b) in before.iter().zip(&after) {
        assert!(a == b || (*b == 0.0 && a.abs() <= smallest));
    }
    optimizer.prune("p", 1.0).unwrap();
    assert!(optimizer.state().unwrap().is_empty());
}

#[test]
fn settings_of_other_optimisers_are_refused() {
    let of = |text: &str| Recipe::parse(text, "r.toml").unwrap_err().to_string();
    for (text, key) in [
        ("optimizer = \"sgd\"\nbeta2 = 0.99", "beta2"),
        ("optimizer = \"lion\"\nadam_eps = 1e-6", "adam_eps"),
        ("momentum = 0.9", "momentum"),
        ("optimizer = \"sgd\"\nmuon_adjust_lr = \"match_rms_adamw\"", "muon_adjust_lr"),
        ("optimizer = \"sgd\"\nmomentum = 1.5", "momentum"),
        ("optimizer = \"muon\"\nmuon_adjust_lr = \"spectral\"", "muon_adjust_lr"),
        ("optimizer = \"lyon\"", "lion"),
    ] {
        assert!(of(text).contains(key), "{text}: {}", of(text));
    }
    assert!(rule(&Recipe { optimizer: "muon".into(), momentum: Some(0.5), ..Recipe::default() }).is_ok());
}
