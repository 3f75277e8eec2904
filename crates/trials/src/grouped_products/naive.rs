//! Maps with low-rank factors as loops in f64, forward and backward, and how large what is summed there is.

use candle_core::Tensor;

use crate::subject::values;

/// A matrix, row by row.
#[derive(Debug, Clone)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) values: Vec<f64>,
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, values: vec![0.0; rows * columns] }
    }

    /// A tensor of two dimensions.
    pub(super) fn of(t: &Tensor) -> anyhow::Result<Self> {
        let (rows, columns) = t.dims2()?;
        Ok(Self { rows, columns, values: values(t)? })
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    /// Some of its rows.
    pub(super) fn some(&self, rows: std::ops::Range<usize>) -> Self {
        let values = self.values[rows.start * self.columns..rows.end * self.columns].to_vec();
        Self { rows: rows.len(), columns: self.columns, values }
    }

    fn turned(&self) -> Self {
        let mut out = Self::zeros(self.columns, self.rows);
        for i in 0..self.rows {
            for j in 0..self.columns {
                out.values[j * self.rows + i] = self.at(i, j);
            }
        }
        out
    }

    /// self other^T.
    fn by_rows(&self, other: &Self) -> Self {
        let mut out = Self::zeros(self.rows, other.rows);
        for i in 0..self.rows {
            for j in 0..other.rows {
                let sum = (0..self.columns).map(|k| self.at(i, k) * other.at(j, k)).sum();
                out.values[i * other.rows + j] = sum;
            }
        }
        out
    }

    fn times(mut self, factor: f64) -> Self {
        self.values.iter_mut().for_each(|v| *v *= factor);
        self
    }

    fn plus(mut self, other: &Self) -> Self {
        self.values.iter_mut().zip(&other.values).for_each(|(a, b)| *a += b);
        self
    }

    fn scaled(mut self, by_column: &[f64]) -> Self {
        let columns = self.columns.max(1);
        self.values.iter_mut().enumerate().for_each(|(i, v)| *v *= by_column[i % columns]);
        self
    }

    pub(super) fn absolute(&self) -> Self {
        Self { values: self.values.iter().map(|v| v.abs()).collect(), ..*self }
    }

    fn with(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        let values = self.values.iter().zip(&other.values).map(|(a, b)| f(*a, *b)).collect();
        Self { values, ..*self }
    }
}

/// y = g * (W x + s B A x) + bias.
#[derive(Debug)]
pub(super) struct Map {
    weight: Matrix,
    factors: Option<(Matrix, Matrix, f64)>,
    gain: Option<Vec<f64>>,
    bias: Option<Vec<f64>>,
}

/// Gradients of a map.
pub(super) struct Gradients {
    pub(super) x: Matrix,
    pub(super) a: Matrix,
    pub(super) b: Matrix,
    gain: Option<Matrix>,
}

impl Map {
    pub(super) fn new(
        weight: &Tensor,
        factors: Option<(&Tensor, &Tensor, f64)>,
        gain: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> anyhow::Result<Self> {
        let factors = factors.map(|(a, b, s)| anyhow::Ok((Matrix::of(a)?, Matrix::of(b)?, s))).transpose()?;
        let (gain, bias) = (gain.map(values).transpose()?, bias.map(values).transpose()?);
        Ok(Self { weight: Matrix::of(weight)?, factors, gain, bias })
    }

    /// The map of absolute values: what it gives for absolute values is how large the terms of each sum are together.
    pub(super) fn absolute(&self) -> Self {
        let all = |values: &Option<Vec<f64>>| values.as_ref().map(|v| v.iter().map(|v| v.abs()).collect());
        Self {
            weight: self.weight.absolute(),
            factors: self.factors.as_ref().map(|(a, b, s)| (a.absolute(), b.absolute(), *s)),
            gain: all(&self.gain),
            bias: all(&self.bias),
        }
    }

    /// Outputs below the gain.
    fn sums(&self, x: &Matrix) -> Matrix {
        let y = x.by_rows(&self.weight);
        match &self.factors {
            Some((a, b, s)) => y.plus(&x.by_rows(a).by_rows(b).times(*s)),
            None => y,
        }
    }

    pub(super) fn forward(&self, x: &Matrix) -> Matrix {
        let mut y = self.sums(x);
        if let Some(gain) = &self.gain {
            y = y.scaled(gain);
        }
        if let Some(bias) = &self.bias {
            let columns = y.columns.max(1);
            y.values.iter_mut().enumerate().for_each(|(i, v)| *v += bias[i % columns]);
        }
        y
    }

    pub(super) fn backward(&self, x: &Matrix, dy: &Matrix) -> Gradients {
        let gain = self.gain.as_ref().map(|_| {
            let products = self.sums(x).with(dy, |y, d| y * d);
            let sum = |j| (0..products.rows).map(|i| products.at(i, j)).sum();
            Matrix { rows: 1, columns: products.columns, values: (0..products.columns).map(sum).collect() }
        });
        let below = match &self.gain {
            Some(gain) => dy.clone().scaled(gain),
            None => dy.clone(),
        };
        let mut dx = below.by_rows(&self.weight.turned());
        let (mut da, mut db) = (Matrix::zeros(0, 0), Matrix::zeros(0, 0));
        if let Some((a, b, s)) = &self.factors {
            let inner = below.by_rows(&b.turned()).times(*s);
            dx = dx.plus(&inner.by_rows(&a.turned()));
            da = inner.turned().by_rows(&x.turned());
            db = below.turned().by_rows(&x.by_rows(a).times(*s).turned());
        }
        Gradients { x: dx, a: da, b: db, gain }
    }
}

/// y = D(silu(G x) * (U x)), plus x where there is a residual sum.
pub(super) struct FeedForward {
    /// G, U and D.
    pub(super) maps: Vec<Map>,
    pub(super) residual: bool,
}

fn silu(v: f64) -> f64 {
    v / (1.0 + (-v).exp())
}

/// Its derivative.
fn silu_slope(v: f64) -> f64 {
    let s = 1.0 / (1.0 + (-v).exp());
    s * (1.0 + v * (1.0 - s))
}

impl FeedForward {
    pub(super) fn forward(&self, x: &Matrix) -> Matrix {
        let inner = self.maps[0].forward(x).with(&self.maps[1].forward(x), |g, u| silu(g) * u);
        let y = self.maps[2].forward(&inner);
        if self.residual { y.plus(x) } else { y }
    }

    /// Of the rows, and of the parameters in the order of the flat vector: A of G and U, B and gain of each, then D's.
    pub(super) fn backward(&self, x: &Matrix, dy: &Matrix) -> (Matrix, Vec<Matrix>) {
        let (gate, up) = (self.maps[0].forward(x), self.maps[1].forward(x));
        let inner = gate.with(&up, |g, u| silu(g) * u);
        let down = self.maps[2].backward(&inner, dy);
        let d_gate = down.x.with(&gate.with(&up, |g, u| silu_slope(g) * u), |d, s| d * s);
        let d_up = down.x.with(&gate, |d, g| d * silu(g));
        let (first, second) = (self.maps[0].backward(x, &d_gate), self.maps[1].backward(x, &d_up));
        self.together(first, second, down, dy)
    }

    fn together(&self, first: Gradients, second: Gradients, down: Gradients, dy: &Matrix) -> (Matrix, Vec<Matrix>) {
        let mut dx = first.x.plus(&second.x);
        if self.residual {
            dx = dx.plus(dy);
        }
        let mut parameters = vec![first.a, second.a, first.b];
        parameters.extend(first.gain);
        parameters.push(second.b);
        parameters.extend(second.gain);
        parameters.extend([down.a, down.b]);
        parameters.extend(down.gain);
        (dx, parameters)
    }

    /// How large what is summed is together, in the result and in what [`Self::backward`] gives: to first order, with every
    /// sum passed on at its full size.
    pub(super) fn sizes(&self, x: &Matrix, dy: &Matrix) -> (Matrix, Matrix, Vec<Matrix>) {
        let [gate, up, down] = [0, 1, 2].map(|i| self.maps[i].absolute());
        let (g, u) = (self.maps[0].forward(x), self.maps[1].forward(x));
        let (x, dy) = (x.absolute(), dy.absolute());
        let (g_size, u_size) = (gate.forward(&x), up.forward(&x));
        let slope = g.with(&g, |g, _| silu_slope(g).abs());
        let by_gate = slope.with(&u, |s, u| s * u.abs());
        let by_up = g.with(&g, |g, _| silu(g).abs());
        let inner = by_gate.with(&g_size, |s, g| s * g).plus(&by_up.with(&u_size, |s, u| s * u));
        let mut y = down.forward(&inner);
        if self.residual {
            y = y.plus(&x);
        }
        let back = down.backward(&inner, &dy);
        // The slope of the slope is at most a half.
        let gate_factor =
            by_gate.plus(&u.with(&g_size, |u, g| 0.5 * u.abs() * g)).plus(&slope.with(&u_size, |s, u| s * u));
        let up_factor = by_up.plus(&slope.with(&g_size, |s, g| s * g));
        let d_gate = back.x.with(&gate_factor, |d, f| d * f);
        let d_up = back.x.with(&up_factor, |d, f| d * f);
        let (first, second) = (gate.backward(&x, &d_gate), up.backward(&x, &d_up));
        let (dx, parameters) = self.together(first, second, back, &dy);
        (y, dx, parameters)
    }
}
