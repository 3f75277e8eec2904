//! Launches by name.

use super::Gpu;
use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, sys};
use std::ffi::c_void;

/// An argument of a kernel: `u64` for addresses, `i32`, `f32`, a tensor map, or a structure of 32-bit or 64-bit words.
#[derive(Debug, Clone)]
pub(crate) enum Arg {
    Address(u64),
    Int(i32),
    Float(f32),
    Map(sys::CUtensorMap),
    Words([u32; 19]),
    Long(Box<[u64]>),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Address(value)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::Int(value)
    }
}

impl From<usize> for Arg {
    /// Sizes are `int` in the kernels; the callers refuse larger ones.
    fn from(value: usize) -> Self {
        Self::Int(i32::try_from(value).unwrap_or(i32::MAX))
    }
}

impl From<bool> for Arg {
    fn from(value: bool) -> Self {
        Self::Int(i32::from(value))
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl From<f64> for Arg {
    fn from(value: f64) -> Self {
        Self::Float(value as f32)
    }
}

impl From<sys::CUtensorMap> for Arg {
    fn from(value: sys::CUtensorMap) -> Self {
        Self::Map(value)
    }
}

impl From<[u32; 19]> for Arg {
    fn from(value: [u32; 19]) -> Self {
        Self::Words(value)
    }
}

impl From<Box<[u64]>> for Arg {
    fn from(value: Box<[u64]>) -> Self {
        Self::Long(value)
    }
}

impl Arg {
    pub(super) fn pointer(&self) -> *mut c_void {
        match self {
            Self::Address(value) => (&raw const *value).cast_mut().cast(),
            Self::Int(value) => (&raw const *value).cast_mut().cast(),
            Self::Float(value) => (&raw const *value).cast_mut().cast(),
            Self::Map(value) => (&raw const *value).cast_mut().cast(),
            Self::Words(value) => (&raw const *value).cast_mut().cast(),
            Self::Long(value) => value.as_ptr().cast_mut().cast(),
        }
    }
}

/// Blocks, threads a block, bytes of shared memory.
pub(crate) type Grid = ((usize, usize, usize), usize, usize);

/// Launches the kernel `name` on the stream of `gpu`. An empty grid launches nothing.
///
/// # Errors
/// If there is no such kernel or the driver refuses the launch.
pub(crate) fn launch(gpu: &Gpu, name: &'static str, (blocks, threads, shared): Grid, args: &[Arg]) -> Result<()> {
    if blocks.0 * blocks.1 * blocks.2 == 0 {
        return Ok(());
    }
    let function = gpu.function(name, shared as u32)?;
    let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::pointer).collect();
    let config = LaunchConfig {
        grid_dim: (blocks.0 as u32, blocks.1 as u32, blocks.2 as u32),
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    };
    gpu.stream.context().bind_to_thread().w()?;
    // SAFETY: the callers pass the arguments that the kernel of that name takes, in its order; addresses are of memory that
    // lives at least until the launch is in the stream.
    unsafe {
        candle_core::cuda_backend::cudarc::driver::result::launch_kernel(
            function.cu_function(),
            config.grid_dim,
            config.block_dim,
            config.shared_mem_bytes,
            gpu.stream.cu_stream(),
            &mut pointers,
        )
    }
    .w()
}

/// Launches a kernel: `launch!(gpu, "name", ((x, y, z), threads, shared), args...)`.
macro_rules! launch_with {
    ($gpu:expr, $name:expr, $grid:expr, $($arg:expr),+ $(,)?) => {
        $crate::cuda::launch($gpu, $name, $grid, &[$($crate::cuda::Arg::from($arg)),+])
    };
}
pub(crate) use launch_with;
