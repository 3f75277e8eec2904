//! Seeded drawing: every sample has its own stream, so sample `i` never depends on how many were made before it.
//!
//! Equation: stream(seed, name, lane, index, attempt) = ChaCha8 keyed by (seed, fnv(name), lane, index), stream number `attempt`
//! Source:   ChaCha8 of `rand_chacha`; bounded integers by multiply-shift, so that values do not depend on the platform

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A random stream with the few operations that the grammars need.
pub(crate) struct Draw(ChaCha8Rng);

impl Draw {
    /// The stream of one attempt at one sample.
    pub(crate) fn new(seed: u64, name: &str, lane: u64, index: u64, attempt: u64) -> Self {
        let mut key = [0u8; 32];
        for (slot, word) in key.chunks_exact_mut(8).zip([seed, fingerprint(name), lane, index]) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(attempt);
        Self(rng)
    }

    /// Uniform in `0..n`; 0 for `n = 0`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in `low..=high`.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below((high - low + 1) as usize) as u64
    }

    /// True in `percent` of 100 draws.
    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// Uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One entry of a non-empty list.
    pub(crate) fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// One word of a non-empty list.
    pub(crate) fn word(&mut self, list: &[&'static str]) -> &'static str {
        list[self.below(list.len())]
    }

    /// `count` different entries of a list (fewer where the list is shorter), in random order.
    pub(crate) fn distinct<T: Copy + PartialEq>(&mut self, list: &[T], count: usize) -> Vec<T> {
        let count = count.min(list.len());
        let mut chosen: Vec<T> = Vec::with_capacity(count);
        // Few are wanted out of many: drawing again is cheaper than shuffling. Dense requests are shuffled.
        if count * 3 < list.len() {
            while chosen.len() < count {
                let entry = list[self.below(list.len())];
                if !chosen.contains(&entry) {
                    chosen.push(entry);
                }
            }
            return chosen;
        }
        let mut all = list.to_vec();
        self.shuffle(&mut all);
        all.truncate(count);
        all
    }

    /// Fisher-Yates.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// FNV-1a with a final mix (splitmix64): stable across platforms and versions.
pub(crate) fn fingerprint(text: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}
