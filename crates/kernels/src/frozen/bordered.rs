//! Dense weights of maps with one input, one below the other on a CUDA device, with room at the right and below for the factors of
//! low-rank products: a product of rows that go on with A x then has both in one sum.
//!
//! Equation: y = [x | A x] [W | s B]^T,  dx = [dy | s dy B] [W ; A]
//! Shapes:   the whole [sum of d_out + 64, d_in + 64] in bf16: W at the left and above, s B at the right (a block for each map),
//!           A below
//! Cost:     64 (d_in + sum of d_out) values of memory for a group
#![cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "made on CUDA devices only"))]

use candle_core::Tensor;
use std::sync::{Arc, Mutex};

/// Rows and columns of the border: the most that the ranks of a group may sum up to.
pub(crate) const BORDER: usize = 64;

/// Weights with a border.
#[derive(Debug)]
pub(crate) struct Whole {
    /// [sum of d_out + BORDER, d_in + BORDER].
    pub(crate) values: Tensor,
    /// Outputs of all maps.
    pub(crate) d_out: usize,
    /// Whose factors are in the border now; 0: nobody's. Locked until the product that reads them is in the stream.
    pub(crate) holds: Mutex<u64>,
}

/// One map's weight within.
#[derive(Debug, Clone)]
pub struct Bordered {
    /// [d_out, d_in], a view.
    pub(crate) weight: Tensor,
    pub(crate) whole: Arc<Whole>,
    /// First output within the whole.
    pub(crate) first: usize,
}
