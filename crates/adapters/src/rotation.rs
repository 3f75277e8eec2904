//! Orthogonal maps of the inputs: blocks along the diagonal, made of skew-symmetric matrices, and an inverse that has a gradient.
//!
//! Equation: y = W (R x): the frozen weight is not touched, whatever it is stored in. Cayley: R = (I - Q) (I + Q)^-1 with Q = -Q^T;
//!           the inverse is X = X0 (2 I - A X0), X0 = A^-1 off the tape, which has the value of A^-1 and its derivative -X0 dA X0
//! Shapes:   blocks [n, k, k] for n k inputs, or [1, k, k] for all of them alike; Q from its k (k - 1) / 2 values above the diagonal
//! Source:   OFT arXiv 2306.07280 section 3.3; the derivative of an inverse, Petersen and Pedersen eq. 59
//! Cost:     2 k d_in FLOPs a token; 2 n k^3 a pass for an inverse, on the CPU in f64

use candle_core::{DType, Device, Tensor};
use faer::Mat;
use faer::linalg::solvers::DenseSolveCore;
use rayon::prelude::*;

use crate::low_rank::{flatten, unflatten};
use crate::{Error, Result};

/// The unit matrix [k, k] with the dtype and device of `like`.
pub(crate) fn unit(k: usize, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::eye(k, DType::F32, like.device())?.to_dtype(like.dtype())?)
}

/// The inverses of `a` [n, k, k], differentiable once.
///
/// # Errors
/// If one has none; `name` says whose they are.
pub(crate) fn inverse(a: &Tensor, name: &str) -> Result<Tensor> {
    let (_, k, _) = a.dims3()?;
    let values = a.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let inverses: Vec<f64> = values
        .par_chunks(k * k)
        .flat_map_iter(|block| {
            let inverse = Mat::from_fn(k, k, |i, j| block[i * k + j]).partial_piv_lu().inverse();
            (0..k * k).map(move |i| inverse[(i / k, i % k)]).collect::<Vec<_>>()
        })
        .collect();
    if inverses.iter().any(|v| !v.is_finite()) {
        return Err(Error::config(
            name,
            "its vectors depend on each other, so that they span no space of their number",
        ));
    }
    let start = Tensor::from_vec(inverses, a.shape(), &Device::Cpu)?.to_dtype(a.dtype())?.to_device(a.device())?;
    let rest = (unit(k, a)? * 2.0)?.broadcast_sub(&a.matmul(&start)?)?;
    Ok(start.matmul(&rest)?)
}

/// Skew-symmetric matrices [n, k, k] of their values `above` the diagonal [n, k (k - 1) / 2], row by row.
///
/// # Errors
/// If shapes do not fit.
pub(crate) fn skew(above: &Tensor, k: usize) -> Result<Tensor> {
    let (mut places, mut signs) = (vec![0u32; k * k], vec![0f32; k * k]);
    let mut next = 0;
    for i in 0..k {
        for j in i + 1..k {
            (places[i * k + j], places[j * k + i]) = (next, next);
            (signs[i * k + j], signs[j * k + i]) = (1.0, -1.0);
            next += 1;
        }
    }
    let places = Tensor::from_vec(places, k * k, above.device())?;
    let signs = Tensor::from_vec(signs, k * k, above.device())?.to_dtype(above.dtype())?;
    Ok(above.index_select(&places, 1)?.broadcast_mul(&signs)?.reshape((above.dim(0)?, k, k))?)
}

/// (I - Q) (I + Q)^-1 = 2 (I + Q)^-1 - I for skew-symmetric `q` [n, k, k].
///
/// # Errors
/// As [`inverse`].
pub(crate) fn cayley(q: &Tensor, name: &str) -> Result<Tensor> {
    let unit = unit(q.dim(1)?, q)?;
    Ok((inverse(&q.broadcast_add(&unit)?, name)? * 2.0)?.broadcast_sub(&unit)?)
}

/// Each run of k values of `x` [.., n k] times its block of `blocks` [n, k, k], or times the only one.
///
/// # Errors
/// If shapes do not fit.
pub(crate) fn by_block(x: &Tensor, blocks: &Tensor) -> Result<Tensor> {
    let (n, k, _) = blocks.dims3()?;
    let (rows, leading) = flatten(&x.to_dtype(blocks.dtype())?)?;
    let (count, width) = rows.dims2()?;
    let turned = if n == 1 {
        rows.reshape((count * width / k, k))?.matmul(&blocks.squeeze(0)?)?
    } else {
        let rows = rows.reshape((count, n, k))?.transpose(0, 1)?.contiguous()?;
        rows.matmul(blocks)?.transpose(0, 1)?.contiguous()?
    };
    unflatten(&turned.reshape((count, width))?, &leading)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::random::{normal, stream};

    fn matrices(n: usize, k: usize) -> Tensor {
        normal(&mut stream(3, "rotation"), 0.4, (n, k, k), &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
    }

    fn largest(t: &Tensor) -> f64 {
        t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn an_inverse_has_the_value_and_the_derivative_of_one() {
        let a = Var::from_tensor(&matrices(3, 4).broadcast_add(&unit(4, &matrices(1, 4)).unwrap()).unwrap()).unwrap();
        let probe = matrices(3, 4).sin().unwrap();
        let x = inverse(&a, "a").unwrap();
        let product = a.matmul(&x).unwrap().broadcast_sub(&unit(4, &x).unwrap()).unwrap();
        assert!(largest(&product) < 1e-12);
        let grad = (&x * &probe).unwrap().sum_all().unwrap().backward().unwrap().get(&a).unwrap().clone();
        // -X^T G X^T
        let closed = x.t().unwrap().matmul(&probe).unwrap().matmul(&x.t().unwrap()).unwrap().neg().unwrap();
        assert!(largest(&(grad - closed).unwrap()) < 1e-11);
        assert!(inverse(&Tensor::zeros((1, 2, 2), DType::F64, &Device::Cpu).unwrap(), "zeros").is_err());
    }

    #[test]
    fn the_transform_is_orthogonal_and_blocks_are_those_of_the_diagonal() {
        let (n, k) = (3, 4);
        let above = matrices(1, 6).flatten_all().unwrap().narrow(0, 0, n * 6).unwrap().reshape((n, 6)).unwrap();
        let r = cayley(&skew(&above, k).unwrap(), "r").unwrap();
        let square = r.matmul(&r.t().unwrap()).unwrap().broadcast_sub(&unit(k, &r).unwrap()).unwrap();
        assert!(largest(&square) < 1e-12);
        let mut dense = vec![0.0; n * k * n * k];
        for (b, block) in r.to_vec3::<f64>().unwrap().iter().enumerate() {
            for (i, row) in block.iter().enumerate() {
                row.iter().enumerate().for_each(|(j, v)| dense[(b * k + i) * n * k + b * k + j] = *v);
            }
        }
        let dense = Tensor::from_vec(dense, (n * k, n * k), &Device::Cpu).unwrap();
        let x = matrices(2, 12).narrow(1, 0, 5).unwrap();
        let wide = x.flatten(0, 1).unwrap().matmul(&dense).unwrap().reshape((2, 5, 12)).unwrap();
        assert!(largest(&(by_block(&x, &r).unwrap() - wide).unwrap()) < 1e-12);
    }
}
