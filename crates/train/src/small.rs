//! Small symmetric matrices, r by r, in f64: their eigenvectors, inverses, and the Sylvester equation of two of them.

use candle_core::{DType, Device, Tensor};
use faer::{Mat, Side};

use crate::{Error, Result};

/// The matrix `t` [r, r].
fn matrix(t: &Tensor) -> Result<Mat<f64>> {
    let (m, n) = t.dims2()?;
    let values = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(Mat::from_fn(m, n, |i, j| values[i * n + j]))
}

fn tensor(mat: &Mat<f64>, like: &Tensor) -> Result<Tensor> {
    let (m, n) = (mat.nrows(), mat.ncols());
    let values: Vec<f64> = (0..m).flat_map(|i| (0..n).map(move |j| mat[(i, j)])).collect();
    Ok(Tensor::from_vec(values, (m, n), &Device::Cpu)?.to_dtype(like.dtype())?.to_device(like.device())?)
}

/// A symmetric matrix as Q diag(values) Q^T.
#[derive(Debug, Clone)]
pub struct Eigen {
    vectors: Mat<f64>,
    values: Vec<f64>,
}

impl Eigen {
    /// Of the symmetric `t` [r, r]; only its lower triangle is read.
    ///
    /// # Errors
    /// If it is not finite or the iteration does not converge.
    pub fn of(t: &Tensor) -> Result<Self> {
        let found = matrix(t)?
            .self_adjoint_eigen(Side::Lower)
            .map_err(|e| Error::run("eigenvectors", format!("did not converge ({e:?}); are the values finite?")))?;
        let values = found.S().column_vector().iter().copied().collect();
        Ok(Self { vectors: found.U().to_owned(), values })
    }

    /// Of the products of all rows of `t` [r, n] with each other, T T^T.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn of_rows(t: &Tensor) -> Result<Self> {
        let t = t.detach().to_dtype(DType::F64)?;
        Self::of(&t.matmul(&t.t()?)?)
    }

    /// Sum of the eigenvalues.
    pub fn sum(&self) -> f64 {
        self.values.iter().sum()
    }

    /// (T + damping I)^-1, of the dtype and on the device of `like`; directions in which T is below the rounding of that dtype
    /// have no inverse, but 0.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn inverse(&self, damping: f64, like: &Tensor) -> Result<Tensor> {
        let r = self.values.len();
        // An eigenvalue that rounding made negative is 0.
        let rounding = if like.dtype() == DType::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
        let least = rounding * self.values.iter().fold(0.0f64, |m, v| m.max(*v));
        let scaled = Mat::from_fn(r, r, |i, j| match self.values[j].max(0.0) {
            value if value < least => 0.0,
            value => self.vectors[(i, j)] / (value + damping),
        });
        tensor(&(scaled * self.vectors.transpose()), like)
    }

    /// The X that solves T X + X U = C, with this one's T and the other's U, both without negative eigenvalues; where both have
    /// an eigenvalue of 0 the equation leaves a part of X open, which is 0.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn sylvester(&self, other: &Self, c: &Tensor) -> Result<Tensor> {
        let inner = self.vectors.transpose() * matrix(c)? * &other.vectors;
        let largest = self.values.iter().chain(&other.values).fold(0.0f64, |m, v| m.max(v.abs()));
        let solved = Mat::from_fn(inner.nrows(), inner.ncols(), |i, j| {
            let sum = self.values[i].max(0.0) + other.values[j].max(0.0);
            if sum > largest * f64::EPSILON { inner[(i, j)] / sum } else { 0.0 }
        });
        tensor(&(&self.vectors * solved * other.vectors.transpose()), c)
    }
}
