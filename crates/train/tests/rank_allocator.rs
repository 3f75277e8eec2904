//! The allocator of ranks against PEFT's: budgets and masks of a whole course.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use common::{golden, tensors};
use espalier_train::dynamics::rank_allocator::{Budget, RankAllocator, Triplets};

const LAYERS: usize = 3;
const RANK: usize = 4;
const STEPS: usize = 14;
const BUDGET: Budget = Budget { target: 1, initial: 2, last: 3, every: 2, total: STEPS, beta1: 0.85, beta2: 0.8 };

fn names() -> Vec<String> {
    (0..LAYERS).map(|i| format!("layer{i}")).collect()
}

fn allocator(budget: Budget) -> espalier_train::Result<RankAllocator> {
    RankAllocator::new(budget, names().into_iter().map(|name| (name, RANK)).collect())
}

fn layers(golden: &BTreeMap<String, Tensor>, step: usize) -> BTreeMap<String, (Triplets, Triplets)> {
    let of = |kind: &str, name: &str| {
        let part = |part: &str| golden[&format!("{kind}.{step:02}.{name}.lora_{part}")].clone();
        Triplets { q: part("A"), p: part("B"), values: part("E") }
    };
    names().into_iter().map(|name| (name.clone(), (of("value", &name), of("gradient", &name)))).collect()
}

#[test]
fn budgets_and_masks_are_those_of_peft() {
    let golden = tensors(&golden().join("rank_allocator.safetensors"));
    let mut allocator = allocator(BUDGET).unwrap();
    let mut pruned = 0;
    for step in 0..STEPS {
        let wanted = golden[&format!("budget.{step:02}")].to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        assert_eq!([allocator.at(step).0 as f64, f64::from(allocator.at(step).1)], wanted[..], "step {step}");
        let masks = allocator.step(step, &layers(&golden, step)).unwrap().cloned();
        let expected = golden.get(&format!("masks.{step:02}"));
        assert_eq!(masks.is_some(), expected.is_some(), "step {step}");
        let (Some(masks), Some(expected)) = (masks, expected) else { continue };
        let expected = expected.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        for (name, row) in names().iter().zip(&expected) {
            let row: Vec<bool> = row.iter().map(|kept| *kept == 1.0).collect();
            assert_eq!(masks[name], row, "step {step}: {name}");
        }
        pruned += usize::from(masks.values().flatten().any(|kept| !kept));
    }
    assert!(pruned >= 6, "{pruned} steps pruned something");
    let last = golden[&format!("masks.{:02}", STEPS - 1)].to_dtype(DType::F64).unwrap();
    let kept = last.sum_all().unwrap().to_scalar::<f64>().unwrap();
    assert_eq!(kept as usize, LAYERS * BUDGET.target);
}

#[test]
fn courses_without_a_step_to_prune_in_are_refused() {
    for (wrong, named) in [
        (Budget { initial: 11, ..BUDGET }, "no step"),
        (Budget { every: 0, ..BUDGET }, "no step"),
        (Budget { beta1: 1.0, ..BUDGET }, "sensitivity_beta"),
        (Budget { beta2: 0.0, ..BUDGET }, "uncertainty_beta"),
    ] {
        let error = allocator(wrong).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let golden = tensors(&golden().join("rank_allocator.safetensors"));
    let mut short = layers(&golden, 0);
    short.remove("layer1");
    assert!(allocator(BUDGET).unwrap().step(0, &short).unwrap_err().to_string().contains("layer1"));
}
