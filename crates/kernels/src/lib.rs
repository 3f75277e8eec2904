//! Differentiable fused operations over candle tensors.
//!
//! One folder per operation: `<op>/mod.rs` holds the public function and its checks and picks the implementation,
//! `<op>/reference.rs` states the mathematics in plain candle operations (slow, obvious, any device, f64 too), and
//! `<op>/cpu.rs` is the fused kernel for f32, bf16 and f16 on the CPU with its own backward pass. Both sides of every
//! dispatch give the same values and gradients; the tests hold each kernel against its reference.
//!
//! What all kernels share: arithmetic in f32 whatever the storage type, one rounding at the end, work cut into pieces
//! that depend on shapes only, so results do not depend on the number of threads. Gradients are computed only for inputs
//! that are on the tape.
//!
//! The crate knows matrices and nothing of models or adapters.

pub mod activation;
pub mod attention;
pub mod cross_entropy;
pub mod decode;
pub mod frozen;
pub mod low_rank;
pub mod norm;
pub mod part;
pub mod rope;
pub mod rows;
pub mod softmax;

#[cfg(feature = "cuda")]
pub mod cuda;
mod element;
mod math;
mod matmul;
mod parallel;
mod product;
mod simd;
mod vector;

use candle_core::{DType, Tensor};
pub use simd::instructions;

/// Whether `x` is handled by the fused CPU kernels: on the CPU, in f32, bf16 or f16.
fn fused(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// `x` in the type the references compute in: half types widen to f32, f32 and f64 stay.
fn widen(x: &Tensor) -> candle_core::Result<Tensor> {
    match x.dtype() {
        DType::BF16 | DType::F16 => x.to_dtype(DType::F32),
        _ => Ok(x.clone()),
    }
}
