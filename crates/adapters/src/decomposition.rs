//! Matrix decompositions in f64 on the CPU, for initialisations and merging.

use candle_core::{DType, Device, Tensor};
use faer::Mat;
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result, random};

/// `t` [m, n] as an f64 matrix.
fn matrix(t: &Tensor) -> Result<Mat<f64>> {
    let rows = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let (m, n) = t.dims2()?;
    Ok(Mat::from_fn(m, n, |i, j| rows[i][j]))
}

/// An f64 matrix as an f32 tensor on the device of `like`.
fn tensor(mat: faer::MatRef<'_, f64>, like: &Tensor) -> Result<Tensor> {
    let (m, n) = (mat.nrows(), mat.ncols());
    let values: Vec<f32> = (0..m).flat_map(|i| (0..n).map(move |j| mat[(i, j)] as f32)).collect();
    Ok(Tensor::from_vec(values, (m, n), like.device())?)
}

/// Thin SVD of `t` [m, n]: U [m, k], singular values in falling order, V^T [k, n], with k = min(m, n).
///
/// # Errors
/// If the values are not finite or the iteration does not converge.
pub fn svd(t: &Tensor) -> Result<(Tensor, Vec<f64>, Tensor)> {
    let svd = matrix(t)?.thin_svd().map_err(|e| {
        Error::unsupported("singular value decomposition", format!("did not converge ({e:?}); are the weights finite?"))
    })?;
    let s = svd.S().column_vector().iter().copied().collect();
    Ok((tensor(svd.U(), t)?, s, tensor(svd.V().transpose(), t)?))
}

/// Thin QR of `t` [m, n]: Q [m, k], R [k, n], with k = min(m, n).
///
/// # Errors
/// If `t` is not a matrix.
pub fn qr(t: &Tensor) -> Result<(Tensor, Tensor)> {
    let qr = matrix(t)?.qr();
    Ok((tensor(qr.compute_thin_Q().as_ref(), t)?, tensor(qr.thin_R(), t)?))
}

/// The leading `rank` singular triplets of `t` [m, n] by subspace iteration with oversampling `2 rank`.
///
/// # Errors
/// As [`svd`].
pub fn randomised_svd(
    t: &Tensor,
    rank: usize,
    iterations: usize,
    rng: &mut ChaCha8Rng,
) -> Result<(Tensor, Vec<f64>, Tensor)> {
    let (m, n) = t.dims2()?;
    let width = (2 * rank).min(m).min(n);
    let weight = t.to_dtype(DType::F32)?;
    let start = random::normal(rng, 1.0, (n, width), t.device())?;
    let mut basis = qr(&weight.matmul(&start)?)?.0;
    for _ in 0..iterations {
        let back = qr(&weight.t()?.matmul(&basis)?)?.0;
        basis = qr(&weight.matmul(&back)?)?.0;
    }
    let (u, s, vt) = svd(&basis.t()?.matmul(&weight)?)?;
    Ok((basis.matmul(&u)?, s, vt))
}
