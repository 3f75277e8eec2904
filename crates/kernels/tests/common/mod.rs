//! What the tests of the kernels share: random tensors, comparison with an f64 reference, finite differences, pools.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub(crate) mod parts;

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Roughly normal values.
pub(crate) fn values(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| (0..6).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.707).collect()
}

pub(crate) fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

pub(crate) fn randn(rng: &mut ChaCha8Rng, dims: &[usize], dtype: DType) -> Tensor {
    let values = values(rng, dims.iter().product());
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

pub(crate) fn flat(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn bits(x: &Tensor) -> Vec<u32> {
    x.to_dtype(DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap()
        .iter()
        .map(|x| x.to_bits())
        .collect()
}

/// |a - b| <= tolerance * (largest |b| + |b|), entry by entry; shapes equal. Inputs are of unit scale, so a tensor whose
/// exact values all but cancel is held to a twentieth of that scale.
pub(crate) fn close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.dims(), b.dims(), "{what}: shapes");
    let (a, b) = (flat(a), flat(b));
    let top = b.iter().fold(0f64, |m, x| m.max(x.abs())).max(0.05);
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        assert!((a - b).abs() <= tolerance * (top + b.abs()), "{what}: entry {i} is {a}, expected {b} (largest {top})");
    }
}

pub(crate) type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Value of `op` and the gradients of sum(value * r) for a fixed random r.
pub(crate) fn value_and_gradients(op: Op<'_>, inputs: &[Tensor]) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tensors).unwrap();
    let r = randn(&mut rng(99), y.dims(), DType::F32).to_dtype(y.dtype()).unwrap();
    let loss = (&y * r).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    let all = vars.iter().map(|v| grads.get(v).cloned().unwrap_or_else(|| v.zeros_like().unwrap())).collect();
    (y.detach(), all)
}

/// `op` on `inputs` as they are equals `op` on the same values in f64, in value and in all gradients.
pub(crate) fn matches_f64(what: &str, op: Op<'_>, inputs: &[Tensor], tolerance: f64) {
    let (y, grads) = value_and_gradients(op, inputs);
    let wide: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(DType::F64).unwrap()).collect();
    let (want, want_grads) = value_and_gradients(op, &wide);
    assert_eq!(want.dtype(), DType::F64, "{what}: the f64 path");
    close(what, &y, &want, tolerance);
    for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
        assert_eq!(g.dtype(), inputs[i].dtype(), "{what}: dtype of gradient {i}");
        close(&format!("{what}, gradient {i}"), g, w, tolerance * 4.0);
    }
}

/// Tolerance of one rounding to a storage type, with room for f32 arithmetic.
pub(crate) fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1.0 / 128.0,
        DType::F16 => 1.0 / 1024.0,
        _ => 4e-6,
    }
}

pub(crate) const FUSED: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Gradients of `op` in f64 equal central differences.
pub(crate) fn finite_differences(what: &str, op: Op<'_>, inputs: &[Tensor]) {
    let inputs: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(DType::F64).unwrap()).collect();
    let (y, grads) = value_and_gradients(op, &inputs);
    let r = randn(&mut rng(99), y.dims(), DType::F32).to_dtype(DType::F64).unwrap();
    let loss =
        |inputs: &[Tensor]| -> f64 { (op(inputs).unwrap() * &r).unwrap().sum_all().unwrap().to_scalar().unwrap() };
    let h = 1e-5;
    for (which, input) in inputs.iter().enumerate() {
        let base = flat(input);
        let grad = flat(&grads[which]);
        for i in 0..base.len() {
            let moved = |by: f64| {
                let mut values = base.clone();
                values[i] += by;
                let mut all = inputs.clone();
                all[which] = Tensor::from_vec(values, input.dims(), &Device::Cpu).unwrap();
                loss(&all)
            };
            let slope = (moved(h) - moved(-h)) / (2.0 * h);
            assert!(
                (slope - grad[i]).abs() < 1e-6 * (1.0 + slope.abs()),
                "{what}: input {which} entry {i}: gradient {}, difference {slope}",
                grad[i]
            );
        }
    }
}

/// `f` gives the same bits in pools of 1, 2 and 4 threads.
pub(crate) fn same_bits_in_any_pool(what: &str, f: impl Fn() -> Vec<Tensor> + Send + Sync) {
    let run = |threads: usize| -> Vec<Vec<u32>> {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| f().iter().map(bits).collect())
    };
    let one = run(1);
    for threads in [2, 4] {
        assert!(run(threads) == one, "{what}: other bits with {threads} threads than with one");
    }
}

/// Value and gradients in one list.
pub(crate) fn everything(op: Op<'_>, inputs: &[Tensor]) -> Vec<Tensor> {
    let (y, mut grads) = value_and_gradients(op, inputs);
    grads.push(y);
    grads
}

/// The message of an error.
pub(crate) fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string(),
    }
}
