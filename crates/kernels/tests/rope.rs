//! Rotary embedding: kernel against reference, inverse, partial rotation.
#![allow(clippy::unwrap_used)]
mod common;
use candle_core::{DType, Device, Tensor};
use common::*;
use espalier_kernels::rope::{reference, rope};

fn angles(b: usize, t: usize, half: usize) -> (Tensor, Tensor) {
    let a: Vec<f32> = (0..b * t * half).map(|i| (i % 97) as f32 * 0.37).collect();
    let a = Tensor::from_vec(a, (b, t, half), &Device::Cpu).unwrap();
    (a.cos().unwrap(), a.sin().unwrap())
}

#[test]
fn kernel_matches_the_f64_reference() {
    let mut r = rng(1);
    for (b, t, heads, d, half, ab) in [
        (2, 7, 3, 16, 8, 1),
        (2, 7, 3, 16, 8, 2),
        (1, 1, 1, 2, 1, 1),
        (3, 5, 2, 20, 6, 1),
        (0, 4, 2, 8, 4, 1),
        (2, 0, 2, 8, 4, 1),
        (2, 130, 8, 64, 32, 2),
        (2, 3, 2, 8, 0, 1),
    ] {
        let (cos, sin) = angles(ab, t, half);
        for dtype in FUSED {
            let x = randn(&mut r, &[b, t, heads, d], dtype);
            let op = |i: &[Tensor]| rope(&i[0], &cos, &sin);
            if half == 0 {
                assert_eq!(bits(&rope(&x, &cos, &sin).unwrap()), bits(&x));
            } else {
                matches_f64(&format!("rope {b} {t} {heads} {d} {half} {dtype:?}"), &op, &[x], rounding(dtype));
            }
        }
    }
}

#[test]
fn reference_matches_finite_differences() {
    let (cos, sin) = angles(1, 3, 2);
    finite_differences(
        "rope",
        &|i| reference::rope(&i[0], &cos, &sin),
        &[randn(&mut rng(2), &[2, 3, 2, 5], DType::F64)],
    );
}

#[test]
fn rotating_back_restores_and_strided_inputs_work() {
    let x = randn(&mut rng(3), &[2, 4, 9, 32], DType::F32).transpose(1, 2).unwrap();
    let (cos, sin) = angles(2, 9, 16);
    let y = rope(&x, &cos, &sin).unwrap();
    let back = rope(&y, &cos, &sin.neg().unwrap()).unwrap();
    close("round trip", &back, &x, 1e-5);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let x = randn(&mut rng(4), &[2, 100, 8, 32], DType::F32);
    let (cos, sin) = angles(1, 100, 16);
    same_bits_in_any_pool("rope", || everything(&|i| rope(&i[0], &cos, &sin), std::slice::from_ref(&x)));
}

#[test]
fn wrong_shapes_are_named() {
    let x = randn(&mut rng(5), &[2, 4, 3, 8], DType::F32);
    for (cos, sin) in [angles(1, 5, 4), angles(3, 4, 4), angles(1, 4, 5), (angles(1, 4, 4).0, angles(1, 4, 3).1)] {
        assert!(message(rope(&x, &cos, &sin)).contains("[2, 4, 3, 8]"));
    }
    let (cos, sin) = angles(1, 4, 4);
    assert!(rope(&x.flatten_all().unwrap(), &cos, &sin).is_err());
}
