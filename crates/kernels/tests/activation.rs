//! Activations and gated units: kernel against reference, names, extremes.
#![allow(clippy::unwrap_used)]
mod common;
use candle_core::{DType, Device, Tensor};
use common::*;
use espalier_kernels::activation::{Activation, activate, gated, reference};

const ALL: [Activation; 6] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::QuickGelu,
    Activation::Tanh,
];

#[test]
fn kernels_match_the_f64_reference() {
    let mut r = rng(1);
    for dims in [vec![0], vec![1], vec![3, 37], vec![2, 5, 4099]] {
        for act in ALL {
            for dtype in FUSED {
                let x = (randn(&mut r, &dims, dtype) * 2.0).unwrap();
                let up = randn(&mut r, &dims, dtype);
                let what = format!("{act:?} {dims:?} {dtype:?}");
                matches_f64(&what, &|i| activate(&i[0], act), std::slice::from_ref(&x), rounding(dtype));
                matches_f64(&format!("gated {what}"), &|i| gated(&i[0], &i[1], act), &[x, up], rounding(dtype));
            }
        }
    }
}

#[test]
fn references_match_finite_differences() {
    let mut r = rng(2);
    let (x, up) = (randn(&mut r, &[11], DType::F64), randn(&mut r, &[11], DType::F64));
    for act in ALL {
        finite_differences(&format!("{act:?}"), &|i| reference::activate(&i[0], act), std::slice::from_ref(&x));
        finite_differences(
            &format!("gated {act:?}"),
            &|i| reference::gated(&i[0], &i[1], act),
            &[x.clone(), up.clone()],
        );
    }
}

#[test]
fn gated_gives_each_gradient_alone() {
    let mut r = rng(3);
    let (x, up) = (randn(&mut r, &[9], DType::F32), randn(&mut r, &[9], DType::F32));
    for act in ALL {
        matches_f64("gate only", &|i| gated(&i[0], &up.to_dtype(i[0].dtype())?, act), std::slice::from_ref(&x), 4e-6);
        matches_f64("up only", &|i| gated(&x.to_dtype(i[0].dtype())?, &i[0], act), std::slice::from_ref(&up), 4e-6);
    }
}

#[test]
fn extremes_stay_finite_and_right() {
    let x = Tensor::new(&[-1e30f32, -200.0, -90.0, 0.0, 90.0, 200.0, 1e15], &Device::Cpu).unwrap();
    for act in ALL {
        let (y, grads) = value_and_gradients(&|i| activate(&i[0], act), std::slice::from_ref(&x));
        let (y, g) = (flat(&y), flat(&grads[0]));
        assert!(y.iter().chain(&g).all(|v| v.is_finite()), "{act:?}: {y:?} {g:?}");
        let (low, high) = if act == Activation::Tanh { (-1.0, 1.0) } else { (0.0, 200.0) };
        assert_eq!((y[1], y[3], y[5]), (low, 0.0, high), "{act:?}");
    }
}

#[test]
fn names_are_those_of_hugging_face() {
    for (name, act) in [
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("gelu", Activation::Gelu),
        ("gelu_new", Activation::GeluTanh),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("gelu_fast", Activation::GeluTanh),
        ("relu", Activation::Relu),
        ("quick_gelu", Activation::QuickGelu),
        ("tanh", Activation::Tanh),
    ] {
        assert_eq!(Activation::from_name(name), Some(act));
    }
    assert_eq!(Activation::from_name("Silu"), None);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let mut r = rng(4);
    let inputs = [randn(&mut r, &[33, 1001], DType::F32), randn(&mut r, &[33, 1001], DType::F32)];
    same_bits_in_any_pool("gated", || everything(&|i| gated(&i[0], &i[1], Activation::Gelu), &inputs));
}

#[test]
fn wrong_inputs_are_named() {
    let x = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
    let up = Tensor::zeros((4, 2), DType::F32, &Device::Cpu).unwrap();
    let text = message(gated(&x, &up, Activation::Silu));
    assert!(text.contains("[2, 4]") && text.contains("[4, 2]"), "{text}");
    assert!(gated(&x, &x.to_dtype(DType::BF16).unwrap(), Activation::Silu).is_err());
    assert!(activate(&x.to_dtype(DType::U32).unwrap(), Activation::Silu).is_err());
}
