//! Draws of torch's CPU generator, for frozen tensors that a file names by their seed alone.
//!
//! Equation: MT19937 of 32-bit words; a uniform f32 is the low 24 bits of a word over 2^24; a permutation is Fisher and Yates'
//!           from the front with words modulo what is left
//! Shapes:   any
//! Source:   M. Matsumoto, T. Nishimura, ACM TOMACS 8 (1998); values compared with torch 2
//! Cost:     one word a draw

use std::collections::HashMap;

use candle_core::{Device, Shape, Tensor};

use crate::Result;

/// Permutations from this length on are drawn another way by torch.
pub const LONGEST: usize = u32::MAX as usize / 20;

const WORDS: usize = 624;
const SHIFT: usize = 397;

/// A generator as `torch.Generator().manual_seed(seed)`.
#[derive(Debug, Clone)]
pub struct TorchGenerator {
    state: [u32; WORDS],
    next: usize,
}

impl TorchGenerator {
    /// The generator of a seed, of which torch uses the low 32 bits.
    pub fn new(seed: u64) -> Self {
        let mut state = [0u32; WORDS];
        state[0] = seed as u32;
        for i in 1..WORDS {
            let before = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: WORDS }
    }

    /// The next word.
    pub fn word(&mut self) -> u32 {
        if self.next == WORDS {
            for i in 0..WORDS {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % WORDS] & 0x7fff_ffff);
                let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + SHIFT) % WORDS] ^ (y >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Passes over `words` of them.
    pub fn skip(&mut self, words: usize) {
        for _ in 0..words {
            self.word();
        }
    }

    /// `tensor.uniform_(-bound, bound, generator=...)` of an f32 tensor.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn uniform(&mut self, bound: f64, shape: &Shape, device: &Device) -> Result<Tensor> {
        let (from, to) = (-bound as f32, bound as f32);
        let values: Vec<f32> = (0..shape.elem_count())
            .map(|_| (self.word() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0) * (to - from) + from)
            .collect();
        Ok(Tensor::from_vec(values, shape.clone(), device)?)
    }

    /// The first `count` of `torch.randperm(n, generator=...)`, for `n` below [`LONGEST`]. What is swapped to the front stays
    /// there, so that only the places that were touched are kept.
    pub fn permutation(&mut self, n: usize, count: usize) -> Vec<u32> {
        let count = count.min(n);
        let mut moved = HashMap::new();
        let mut first = Vec::with_capacity(count);
        for i in 0..count {
            let from = if i + 1 < n { i + self.word() as usize % (n - i) } else { i };
            let here = moved.remove(&i).unwrap_or(i as u32);
            match from == i {
                true => first.push(here),
                false => first.push(moved.insert(from, here).unwrap_or(from as u32)),
            }
        }
        first
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_those_of_torch() {
        let draw = TorchGenerator::new(777).uniform(0.5, &Shape::from(700), &Device::Cpu).unwrap();
        let draw = draw.to_vec1::<f32>().unwrap();
        let found = [0, 1, 2, 623, 624, 699].map(|i| draw[i]);
        assert_eq!(found, [-0.418_084_68, -0.008_862_555, -0.096_706_69, 0.448_827_68, 0.135_150_14, 0.193_055_39]);
        let all = TorchGenerator::new(777).permutation(1000, 1000);
        assert_eq!(all[..6], [735, 819, 201, 799, 435, 497]);
        assert_eq!(all[997..], [73, 889, 284]);
        assert_eq!(TorchGenerator::new((1 << 33) + 5).permutation(50, 6), [11, 34, 33, 43, 30, 4]);
    }
}
