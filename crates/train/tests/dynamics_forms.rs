//! Closed forms of the dynamics in f64: LoRA-Pro's theorems, LoRA-FA's minimiser, ALLoRA's rates, GaLore's subspaces, SwitchLoRA's
//! pools and frequencies.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{Adapter, Flow, FrozenWeight, LowRankView, ParameterMap};
use espalier_train::dynamics::allora::{RowRates, rates};
use espalier_train::dynamics::lora_pro::{Damping, Frame, Freedom};
use espalier_train::dynamics::switchlora::Switchlora;
use espalier_train::dynamics::{galore, lora_fa};
use espalier_train::pool::Pool;

fn random(name: &str, rows: usize, columns: usize) -> Tensor {
    let values = normal(&mut stream(5, name), 1.0, (rows, columns), &Device::Cpu).unwrap();
    values.to_dtype(DType::F64).unwrap()
}

fn mm(a: &Tensor, b: &Tensor) -> Tensor {
    a.matmul(b).unwrap()
}

fn t(a: &Tensor) -> Tensor {
    a.t().unwrap().contiguous().unwrap()
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    (a * b).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
}

fn far(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap()
}

fn rows(a: &Tensor) -> Vec<Vec<f64>> {
    a.to_vec2().unwrap()
}

/// The solution of M x = v by Gaussian elimination with pivots.
fn solved(mut m: Vec<Vec<f64>>, mut v: Vec<f64>) -> Vec<f64> {
    let n = v.len();
    for i in 0..n {
        let pivot = (i..n).max_by(|a, b| m[*a][i].abs().total_cmp(&m[*b][i].abs())).unwrap();
        m.swap(i, pivot);
        v.swap(i, pivot);
        for j in i + 1..n {
            let f = m[j][i] / m[i][i];
            let (above, below) = m.split_at_mut(j);
            below[0][i..].iter_mut().zip(&above[i][i..]).for_each(|(x, y)| *x -= f * y);
            v[j] -= f * v[i];
        }
    }
    for i in (0..n).rev() {
        v[i] = (v[i] - (i + 1..n).map(|k| m[i][k] * v[k]).sum::<f64>()) / m[i][i];
    }
    v
}

/// The inverse of a symmetric matrix, column by column.
fn inverse(m: &Tensor) -> Tensor {
    let n = m.dim(0).unwrap();
    let columns: Vec<f64> =
        (0..n).flat_map(|j| solved(rows(m), (0..n).map(|i| f64::from(u8::from(i == j))).collect())).collect();
    t(&Tensor::from_vec(columns, (n, n), &Device::Cpu).unwrap())
}

fn identity(n: usize) -> Tensor {
    Tensor::eye(n, DType::F64, &Device::Cpu).unwrap()
}

const SCALE: f64 = 1.7;

struct Case {
    a: Tensor,
    b: Tensor,
    g: Tensor,
    ga: Tensor,
    gb: Tensor,
}

fn case(m: usize, n: usize, r: usize) -> Case {
    let (a, b, g) = (random("a", r, n), random("b", m, r), random("g", m, n));
    let ga = (mm(&t(&b), &g) * SCALE).unwrap();
    let gb = (mm(&g, &t(&a)) * SCALE).unwrap();
    Case { a, b, g, ga, gb }
}

impl Case {
    fn frame(&self) -> Frame {
        Frame::new(&self.a, &self.b, SCALE, Damping::Absolute).unwrap()
    }
}

#[test]
fn lora_pros_change_is_the_nearest_to_the_gradient_under_any_freedom() {
    let c = case(7, 9, 3);
    let frame = c.frame();
    let p_b = mm(&mm(&c.b, &inverse(&mm(&t(&c.b), &c.b))), &t(&c.b));
    let p_a = mm(&mm(&t(&c.a), &inverse(&mm(&c.a, &t(&c.a)))), &c.a);
    let residual = mm(&mm(&(identity(7) - &p_b).unwrap(), &c.g), &(identity(9) - &p_a).unwrap());
    let mut all = Vec::new();
    for freedom in [Freedom::Sylvester, Freedom::Zero, Freedom::Symmetric] {
        let (da, db) = frame.adjusted(&c.ga, &c.gb, freedom).unwrap();
        let found = frame.equivalent(&da, &db).unwrap();
        // The damping of 1e-8 is all that stands between.
        assert!(far(&(&c.g - &found).unwrap(), &residual) < 1e-7, "{freedom:?}: the residual");
        let square = dot(&found, &found);
        assert!((dot(&c.g, &found) - square).abs() < 1e-6 * square, "{freedom:?}: no projection");
        let descent = dot(&c.ga, &da) + dot(&c.gb, &db);
        assert!((descent - square).abs() < 1e-6 * square, "{freedom:?}: theorem 2.2");
        all.push(found);
    }
    assert!(far(&all[0], &all[1]) < 1e-7 && far(&all[0], &all[2]) < 1e-7, "depends on the freedom");
    // No other change of A and B comes nearer.
    let (da, db) = frame.adjusted(&c.ga, &c.gb, Freedom::Sylvester).unwrap();
    let distance = |da: &Tensor, db: &Tensor| {
        let d = (&c.g - frame.equivalent(da, db).unwrap()).unwrap();
        dot(&d, &d)
    };
    let least = distance(&da, &db);
    for i in 0..20 {
        let da = (&da + (random(&format!("u{i}"), 3, 9) * 1e-3).unwrap()).unwrap();
        let db = (&db + (random(&format!("v{i}"), 7, 3) * 1e-3).unwrap()).unwrap();
        assert!(distance(&da, &db) > least, "{i}");
    }
}

#[test]
fn lora_pros_freedom_solves_the_sylvester_equation_and_is_the_nearest_to_the_factors_gradients() {
    let (m, n, r) = (8, 11, 4);
    let c = case(m, n, r);
    let frame = c.frame();
    let x = frame.freedom(&c.ga, &c.gb, Freedom::Sylvester).unwrap().unwrap();
    let (left, right) = (mm(&t(&c.b), &c.b), mm(&c.a, &t(&c.a)));
    let rhs = (mm(&inverse(&left), &mm(&c.ga, &t(&c.a))) * (-1.0 / (SCALE * SCALE))).unwrap();
    // The same equation as one dense system of r^2 unknowns: (L x I + I x R^T) vec(X) = vec(C).
    let (l, u, v) = (rows(&left), rows(&right), rows(&rhs));
    let mut dense = vec![vec![0.0; r * r]; r * r];
    for i in 0..r {
        for j in 0..r {
            for k in 0..r {
                dense[i * r + j][k * r + j] += l[i][k];
                dense[i * r + j][i * r + k] += u[k][j];
            }
        }
    }
    let expected = Tensor::from_vec(solved(dense, v.concat()), (r, r), &Device::Cpu).unwrap();
    // The damping of 1e-8 in the inverse stands between.
    assert!(far(&x, &expected) < 1e-7, "{:e}", far(&x, &expected));
    let left_side = (mm(&left, &x) + mm(&x, &right)).unwrap();
    assert!(far(&left_side, &rhs) < 1e-6);
    let (da, db) = frame.nearest(&c.ga, &c.gb).unwrap();
    let cost = |x: &Tensor| {
        let a = ((&da + mm(x, &c.a)).unwrap() - &c.ga).unwrap();
        let b = ((&db - mm(&c.b, x)).unwrap() - &c.gb).unwrap();
        dot(&a, &a) + dot(&b, &b)
    };
    let least = cost(&x);
    for i in 0..20 {
        let other = (&x + (random(&format!("x{i}"), r, r) * 1e-3).unwrap()).unwrap();
        assert!(cost(&other) > least, "{i}: {} is not above {least}", cost(&other));
    }
}

#[test]
fn lora_pro_does_not_depend_on_how_the_product_is_split() {
    let c = case(7, 9, 3);
    let frame = c.frame();
    let change = |case: &Case| {
        let frame = case.frame();
        let (da, db) = frame.adjusted(&case.ga, &case.gb, Freedom::Sylvester).unwrap();
        frame.equivalent(&da, &db).unwrap()
    };
    let split = |f: f64| {
        let (a, b) = ((&c.a / f).unwrap(), (&c.b * f).unwrap());
        let (ga, gb) = frame_gradients(&a, &b, &c.g);
        Case { a, b, g: c.g.clone(), ga, gb }
    };
    assert!(far(&change(&c), &change(&split(3.0))) < 1e-6);
    // LoRA's own does.
    let plain = |c: &Case| frame.equivalent(&c.ga, &c.gb).unwrap();
    assert!(far(&plain(&c), &plain(&split(3.0))) > 1e-1);
}

fn frame_gradients(a: &Tensor, b: &Tensor, g: &Tensor) -> (Tensor, Tensor) {
    Frame::new(a, b, SCALE, Damping::Absolute).unwrap().gradients(g).unwrap()
}

#[test]
fn lora_pro_at_its_ends() {
    // At full rank the change is the gradient.
    let c = case(5, 6, 5);
    let frame = c.frame();
    let (da, db) = frame.adjusted(&c.ga, &c.gb, Freedom::Sylvester).unwrap();
    assert!(far(&frame.equivalent(&da, &db).unwrap(), &c.g) < 1e-5);
    // With B = 0 only B moves, by g(B) (A A^T)^-1 / s^2.
    let a = random("a", 3, 9);
    let b = random("b", 7, 3).zeros_like().unwrap();
    let g = random("g", 7, 9);
    let (ga, gb) = frame_gradients(&a, &b, &g);
    for damping in [Damping::Absolute, Damping::Relative] {
        let frame = Frame::new(&a, &b, SCALE, damping).unwrap();
        let (da, db) = frame.adjusted(&ga, &gb, Freedom::Sylvester).unwrap();
        let expected = (mm(&gb, &inverse(&mm(&a, &t(&a)))) / (SCALE * SCALE)).unwrap();
        assert_eq!(da.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap(), 0.0, "{damping:?}");
        assert!(far(&db, &expected) < 1e-5, "{damping:?}: {:e}", far(&db, &expected));
        // Which is LoRA-FA's.
        assert!(far(&db, &lora_fa::corrected(&gb, &a, SCALE).unwrap()) < 1e-5, "{damping:?}");
    }
}

/// Relative loss after each step of gradient descent on 1/2 |s B A - T|^2.
fn descent(lr: f64, pro: bool, steps: usize) -> Vec<f64> {
    const S: f64 = 2.0;
    let (m, n, r) = (48, 64, 4);
    let target = (0..12)
        .map(|i| {
            let (u, v) = (random(&format!("tu{i}"), m, 1), random(&format!("tv{i}"), 1, n));
            let norms = (dot(&u, &u) * dot(&v, &v)).sqrt();
            (mm(&u, &v) * (0.7f64.powi(i) / norms)).unwrap()
        })
        .reduce(|a, b| (a + b).unwrap())
        .unwrap();
    let mut a = (random("start", r, n) / (n as f64).sqrt()).unwrap();
    let mut b = Tensor::zeros((m, r), DType::F64, &Device::Cpu).unwrap();
    let whole = dot(&target, &target);
    let mut losses = Vec::new();
    for _ in 0..steps {
        let g = ((mm(&b, &a) * S).unwrap() - &target).unwrap();
        let (ga, gb) = ((mm(&t(&b), &g) * S).unwrap(), (mm(&g, &t(&a)) * S).unwrap());
        let (da, db) = match pro {
            true => Frame::new(&a, &b, S, Damping::Absolute).unwrap().adjusted(&ga, &gb, Freedom::Sylvester).unwrap(),
            false => (ga, gb),
        };
        a = (a - (da * lr).unwrap()).unwrap();
        b = (b - (db * lr).unwrap()).unwrap();
        let left = ((mm(&b, &a) * S).unwrap() - &target).unwrap();
        losses.push(dot(&left, &left) / whole);
    }
    losses
}

#[test]
fn lora_pro_is_stable_where_full_training_is_and_lora_is_behind() {
    for lr in [0.1, 0.3, 0.9] {
        let (lora, pro) = (descent(lr, false, 10), descent(lr, true, 10));
        assert!(pro.windows(2).all(|w| w[1] <= w[0] * (1.0 + 1e-9)), "{lr}: {pro:?}");
        assert!(pro[9] < 0.8 * lora[9] || !lora[9].is_finite(), "{lr}: {} against LoRA's {}", pro[9], lora[9]);
    }
}

#[test]
fn lora_fas_gradient_is_the_minimiser() {
    let c = case(7, 9, 3);
    let found = lora_fa::corrected(&c.gb, &c.a, SCALE).unwrap();
    let cost = |x: &Tensor| {
        let d = ((mm(x, &c.a) * SCALE).unwrap() - &c.g).unwrap();
        dot(&d, &d)
    };
    let least = cost(&found);
    for i in 0..20 {
        assert!(cost(&(&found + (random(&format!("y{i}"), 7, 3) * 1e-3).unwrap()).unwrap()) > least, "{i}");
    }
}

/// A plain product.
#[derive(Debug)]
struct Product(Var, Var);

impl Adapter for Product {
    fn parameters(&self) -> ParameterMap {
        ParameterMap::new()
    }

    fn low_rank(&self, _: &Arc<FrozenWeight>) -> espalier_adapters::Result<Option<LowRankView>> {
        Ok(Some(LowRankView::new(self.0.as_tensor(), self.1.as_tensor(), 1.0)))
    }
}

#[test]
fn alloras_rates_act_on_a_and_b_and_on_nothing_else() {
    let (m, n, r, eta) = (6, 8, 3, 1.6);
    let base = Arc::new(FrozenWeight::dense(random("w", m, n)).unwrap());
    let (a, b) = (Var::from_tensor(&random("a", r, n)).unwrap(), Var::from_tensor(&random("b", m, r)).unwrap());
    let x = Var::from_tensor(&random("x", 5, n)).unwrap();
    let delta = random("delta", 5, m);
    let h = rates(a.as_tensor(), b.as_tensor(), eta).unwrap();
    let product = rows(&mm(b.as_tensor(), a.as_tensor()));
    for (i, h) in h.to_vec1::<f64>().unwrap().into_iter().enumerate() {
        let norm = product[i].iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!((h - 1.0 / (norm + 1.0 / (eta * eta)).sqrt()).abs() < 1e-12, "row {i}");
    }
    let inner: Arc<dyn Adapter> = Arc::new(Product(a.clone(), b.clone()));
    let layer = RowRates::new(inner.clone(), eta);
    let of = |layer: &dyn Adapter, flow: &Flow| {
        let y = layer.forward(&base, x.as_tensor(), flow).unwrap();
        let grads = (&y * &delta).unwrap().sum_all().unwrap().backward().unwrap();
        let of = |v: &Var| grads.get(v.as_tensor()).unwrap().clone();
        (y.detach(), of(&a), of(&b), of(&x))
    };
    let train = Flow::train(0, 0, 0);
    let (y, ga, gb, gx) = of(&*inner, &train);
    let (y1, ga1, gb1, gx1) = of(&layer, &train);
    assert!(far(&y, &y1) < 1e-12 && far(&gx, &gx1) < 1e-12, "the pass or the input's gradient changed");
    let h = h.unsqueeze(1).unwrap();
    assert!(far(&gb1, &gb.broadcast_mul(&h).unwrap()) < 1e-12);
    let outer = mm(&t(&delta), x.as_tensor());
    let expected = mm(&t(b.as_tensor()), &outer.broadcast_mul(&h).unwrap());
    assert!(far(&ga1, &expected) < 1e-12);
    assert!(far(&ga1, &ga) > 1e-1 && far(&gb1, &gb) > 1e-1, "the rates do nothing");
    // In evaluation it is the layer itself.
    let (_, ga2, ..) = of(&layer, &Flow::eval());
    assert_eq!(far(&ga2, &ga), 0.0);
    // At B = 0 every rate is eta.
    b.set(&b.zeros_like().unwrap()).unwrap();
    let (.., gb, _) = of(&*inner, &train);
    let (_, ga1, gb1, _) = of(&layer, &train);
    assert!(far(&gb1, &(gb * eta).unwrap()) < 1e-12);
    assert_eq!(ga1.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap(), 0.0);
}

#[test]
fn galores_subspace_holds_the_most_of_the_gradient() {
    for (m, n) in [(6, 9), (9, 6)] {
        let g = random("g", m, n);
        let left = m < n;
        let p = galore::basis(&g.to_dtype(DType::F32).unwrap(), 2, left).unwrap().to_dtype(DType::F64).unwrap();
        assert!(far(&mm(&t(&p), &p), &identity(2)) < 1e-5, "not orthonormal");
        let (_, s, _) = espalier_adapters::decomposition::svd(&g).unwrap();
        let seen = if left { mm(&t(&p), &g) } else { mm(&g, &p) };
        let most = s[..2].iter().map(|s| s * s).sum::<f64>();
        assert!((dot(&seen, &seen) - most).abs() < 1e-4 * most);
    }
}

#[test]
fn pools_lose_no_vector_and_select_none_twice() {
    let (count, width, rank) = (9, 3, 4);
    let candidates: Vec<f32> = (0..count * width).map(|i| i as f32).collect();
    let mut pool = Pool::new(candidates.clone(), width, rank, 2);
    assert_eq!(pool.selected, [7, 8, 5, 6]);
    let mut live: Vec<f32> = pool.selected.clone().iter().flat_map(|i| pool.vector(*i).to_vec()).collect();
    let mut rng = 1usize;
    for round in 0..60 {
        // Training moves a live vector.
        live[(round % rank) * width] += 1000.0;
        rng = rng * 5 % 17;
        let slots = pool.exchange(&mut live, 1 + rng % rank, true);
        let mut selected = pool.selected.clone();
        selected.sort_unstable();
        selected.dedup();
        assert_eq!(selected.len(), rank, "round {round}: {:?}", pool.selected);
        assert_eq!(slots.len(), 1 + rng % rank);
        for slot in slots {
            assert_eq!(pool.vector(pool.selected[slot]), &live[slot * width..(slot + 1) * width]);
        }
    }
    // Every trained value is in a live vector or its candidate.
    for (slot, candidate) in pool.selected.clone().into_iter().enumerate() {
        let vector = live[slot * width..(slot + 1) * width].to_vec();
        assert!(vector.iter().zip(pool.vector(candidate)).filter(|(a, b)| a != b).count() <= 1);
    }
    let mut left: Vec<f32> = (0..count).flat_map(|i| pool.vector(i)[1..].to_vec()).collect();
    left.sort_by(f32::total_cmp);
    let mut all: Vec<f32> = (0..count).flat_map(|i| candidates[i * width + 1..(i + 1) * width].to_vec()).collect();
    all.sort_by(f32::total_cmp);
    assert_eq!(left, all);
    let mut read = Pool::new(vec![0.0; count * width], width, rank, 0);
    read.restore("p", &mut pool.state("p").unwrap().into_iter().collect()).unwrap();
    assert_eq!(read, pool);
}

#[test]
fn exchanges_grow_rarer() {
    let settings = Switchlora::default();
    let at = |step| settings.expected(256, step, 40_000);
    assert!((at(0) - 6.4).abs() < 0.01, "{}", at(0));
    assert!((at(3999) / at(0) - 0.3).abs() < 1e-3);
    let all: f64 = (0..40_000).map(at).sum();
    let closed = 6.4 * 4000.0 / (1.0f64 / 0.3).ln();
    assert!((all / closed - 1.0).abs() < 1e-3, "{all} against {closed}");
}
