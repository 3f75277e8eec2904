//! Random numbers by name: one seed, named sub-streams, the same bits on every run and for every thread count.

pub mod torch;

use candle_core::{Device, Shape, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::Result;

/// Mixes several numbers into one key (SplitMix64 finaliser over a running sum).
pub fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9e37_79b9_7f4a_7c15, |state, part| {
        let mut z = state.wrapping_add(*part).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^= z >> 30;
        z = z.wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// The stream called `name` under `seed`.
pub fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(name.as_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// Uniform on `[-bound, bound)`.
pub fn uniform(rng: &mut ChaCha8Rng, bound: f64, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let values: Vec<f32> = (0..shape.elem_count())
        .map(|_| if bound > 0.0 { rng.random_range(-bound..bound) as f32 } else { 0.0 })
        .collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Normal with mean 0 and standard deviation `std` (Box-Muller). Pieces are drawn on all threads: each knows its place in the
/// stream.
pub fn normal(rng: &mut ChaCha8Rng, std: f64, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    /// Values of a piece; even, as they come in pairs.
    const PIECE: usize = 1 << 15;
    /// 32-bit words that a value takes.
    const WORDS: u128 = 2;
    let shape = shape.into();
    let count = shape.elem_count();
    let mut values = vec![0f32; count];
    let start = rng.get_word_pos();
    values.par_chunks_mut(PIECE).enumerate().for_each(|(i, piece)| {
        let mut rng = rng.clone();
        rng.set_word_pos(start + (i * PIECE) as u128 * WORDS);
        for pair in piece.chunks_mut(2) {
            // In (0, 1], where a draw of f32 could be 0.
            let radius = (-2.0 * ((1.0 - rng.random::<f64>()) as f32).ln()).sqrt() * std as f32;
            let (sin, cos) = (std::f32::consts::TAU * rng.random::<f64>() as f32).sin_cos();
            for (value, part) in pair.iter_mut().zip([cos, sin]) {
                *value = radius * part;
            }
        }
    });
    rng.set_word_pos(start + count.next_multiple_of(2) as u128 * WORDS);
    Ok(Tensor::from_vec(values, shape, device)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_is_the_same_in_pieces_and_leaves_the_stream_where_it_ends() {
        let draw = |counts: &[usize]| {
            let mut rng = stream(3, "pieces");
            let all =
                counts.iter().flat_map(|n| normal(&mut rng, 0.5, *n, &Device::Cpu).unwrap().to_vec1::<f32>().unwrap());
            all.collect::<Vec<_>>()
        };
        // Longer than a piece, not a multiple of one; cut at an even place.
        let whole = draw(&[100_002]);
        assert_eq!(draw(&[40_000, 60_002]), whole);
        let mean = whole.iter().map(|x| f64::from(*x)).sum::<f64>() / whole.len() as f64;
        let square = whole.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / whole.len() as f64;
        assert!(mean.abs() < 0.01 && (square.sqrt() - 0.5).abs() < 0.01, "{mean} {square}");
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one_thread.install(|| draw(&[100_002])), whole);
    }
}
